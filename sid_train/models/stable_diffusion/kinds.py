"""In what the files of the generations of Stable Diffusion differ: a ``Kind`` each. No network is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...core.architectures import SD1, SD2, SDXL, Architecture
from .keys import Shapes


@dataclass(frozen=True)
class TextEncoder:
    """One of the text encoders of a model.

    people: what people call it
    prefixes: of its tensors in single files, without ``text_model.``; the first is the one that is written
    folder, tokenizer: where a diffusers folder has it and its tokenizer
    is_open_clip: single files have OpenCLIP's names, and prompts are padded with "!" instead of the end token
    activation: as transformers names it
    has_projection: whether the vector of the whole prompt is read
    layers: so many of them are read in single files; 0 is all. diffusers' folders leave out the others
    """

    people: str
    prefixes: tuple[str, ...]
    folder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    is_open_clip: bool = False
    activation: str = "gelu"
    has_projection: bool = False
    layers: int = 0


@dataclass(frozen=True)
class Kind:
    """One generation.

    encoders: the text encoders, in the order in which their hidden states are put side by side
    scaling_factor: of the VAE's latents, to about unit variance
    known_as: how names of its models begin that are not here to be read
    text: the prefixes of all that single files have of text encoders
    has_markers: ComfyUI knows v-prediction and a zero-terminal-SNR schedule of its files by ``keys.MARKERS``
    """

    architecture: Architecture
    encoders: tuple[TextEncoder, ...]
    scaling_factor: float
    known_as: re.Pattern[str]
    text: tuple[str, ...]
    has_markers: bool = False


SDXL_KIND = Kind(
    SDXL,
    (
        TextEncoder("CLIP-L", ("conditioner.embedders.0.transformer.",), activation="quick_gelu"),
        TextEncoder(
            "OpenCLIP bigG",
            ("conditioner.embedders.1.model.",),
            "text_encoder_2",
            "tokenizer_2",
            is_open_clip=True,
            has_projection=True,
        ),
    ),
    0.13025,
    re.compile(r"sd_?xl|stable-diffusion-xl", re.IGNORECASE),
    ("conditioner.",),
    has_markers=True,
)
SD1_KIND = Kind(
    SD1,
    (TextEncoder("CLIP-L", ("cond_stage_model.transformer.",), activation="quick_gelu"),),
    0.18215,
    re.compile(r"stable-diffusion-v?1|sd[-_]?v?1|v1-[45]", re.IGNORECASE),
    ("cond_stage_model.",),
)
SD2_KIND = Kind(
    SD2,
    (
        TextEncoder(
            "OpenCLIP H",
            ("cond_stage_model.model.", "conditioner.embedders.0.model."),  # the second in files of Stability's sgm
            is_open_clip=True,
            layers=23,
        ),
    ),
    0.18215,
    re.compile(r"stable-diffusion-v?2|sd[-_]?v?2|v2-[01]|768-v|512-base|sd[-_]turbo", re.IGNORECASE),
    ("cond_stage_model.", "conditioner."),
)
KINDS = (SD1_KIND, SD2_KIND, SDXL_KIND)
V_NAMES = re.compile(r"stable-diffusion-2(-1)?$|v2-[01]_768|768-v", re.IGNORECASE)


def kind_named(architecture: str) -> Kind:
    """That of an architecture's name, one of ``architectures``."""
    return next(kind for kind in KINDS if kind.architecture.name == architecture)


def kind_of_unet(shapes: Shapes) -> Kind:
    """That of a UNet's tensors in either layout, by what ComfyUI tells them by, too."""
    if any(name.startswith(("label_emb.", "add_embedding.")) for name in shapes):
        return SDXL_KIND
    projection = next((shape for name, shape in shapes.items() if name.endswith(".proj_in.weight")), ())
    return SD2_KIND if len(projection) == 2 else SD1_KIND


def kind_of_name(source: str) -> Kind:
    """That of a model that is not here, by its name: a hub id's last part or a file's name. SDXL where it says none."""
    name = _last_part(source)
    return next((kind for kind in KINDS if kind.known_as.match(name)), SDXL_KIND)


def predicts_by_name(source: str) -> str:
    """What a model that is not here predicts, by its name: SD 2.0 and 2.1 for 768 pixels say no "base"."""
    return "v_prediction" if V_NAMES.match(_last_part(source)) else "epsilon"


def _last_part(source: str) -> str:
    return re.split(r"[/\\]", source)[-1]
