"""SD 1.x, 2.x, SDXL and their fine-tunes as teachers: a single file with ldm names, a diffusers folder, or a hub id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from ...core.noise_schedule import PredictionType, VPSchedule
from ...core.recipe import has_recipe
from ...files.header import read_safetensors_metadata
from ...files.pickles import open_pickled
from ...files.reading import reading, shown
from ...files.tensors import LazyTensor, open_tensors
from ..adapters import Adapter
from ..bundle import ModelBundle
from ..family import AUTO, OpenedModel, Tensors
from ..lora import is_kohya, read_lora
from ..unet import UNetDenoiser
from . import statements
from .folder import (
    HUB_FILES,
    SCHEDULER_FILE,
    TOKENIZERS,
    WEIGHTS,
    find_folder,
    load_text,
    load_tokenizers,
    open_vae,
    read_settings,
    require_unet_config,
    rest_of_folder,
    weights_of,
)
from .keys import MARKERS, TIME_ID_WIDTH, UNET, VAE
from .kinds import SD2_KIND, SDXL_KIND, Kind, TextEncoder, kind_of_unet
from .lora import kohya_modules
from .networks import (
    NOT_READ,
    PROJECTION,
    TEXT,
    build_text,
    build_unet,
    build_vae,
    read_unet,
    read_vae,
    shapes_of,
)
from .statements import Stated
from .text import SDConditioner, SDXLConditioner, TextEncoders, Tokenizers, clip_tokenizers

__all__ = ["HUB_FILES", "MARKERS", "StableDiffusionParts", "build_unet", "check_resolution", "open_parts"]

CONFIGURATION = "model.prediction_type"
# ComfyUI takes a UNet of SD 2.x for one that predicts v where the numbers in this tensor are spread wider than this:
# the files do not say it. diffusers' name, and ldm's for people.
SPREAD_OF_V = 0.09
TELLS_V, TELLS_V_LDM = (
    f"{block}.transformer_blocks.0.norm1.bias" for block in ("up_blocks.3.attentions.2", "output_blocks.11.1")
)


class LoadText(Protocol):
    """Reads the text encoders in ``dtype``; None checks them and leaves them on the meta device."""

    def __call__(self, dtype: torch.dtype | None = torch.float32) -> TextEncoders: ...


class LoadVAE(Protocol):
    """As ``LoadText``, for the VAE."""

    def __call__(self, dtype: torch.dtype | None = torch.float32) -> AutoencoderKL: ...


class VAECodec:
    """The VAE in fp32 (SDXL's overflows in fp16), loaded when it is first needed."""

    def __init__(self, load: Callable[[], AutoencoderKL]):
        self._load = load
        self._vae: AutoencoderKL | None = None
        self.device = torch.device("cpu")

    def to(self, device: torch.device) -> VAECodec:
        self.device = torch.device(device)
        if self._vae is not None:
            self._vae.to(self.device)
        return self

    @property
    def vae(self) -> AutoencoderKL:
        if self._vae is None:
            self._vae = self._load().float().eval().requires_grad_(False).to(self.device)
        return self._vae

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> latents [B, 4, H/8, W/8], the mean of the posterior."""
        return self.vae.encode(images.to(self.vae.device, torch.float32)).latent_dist.mean * self._scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 4, h, w] -> images [B, 3, 8h, 8w], not clamped; one at a time, to save memory."""
        latents = latents.to(self.vae.device, torch.float32) / self._scale
        return torch.cat([self.vae.decode(one[None], return_dict=False)[0] for one in latents])

    @property
    def _scale(self) -> float:
        return self.vae.config.scaling_factor


@dataclass(frozen=True)
class Rest:
    """All but the UNet, none of it read. ``load_rest`` gives both as they are named in single files."""

    load_text: LoadText
    load_tokenizers: Callable[[], Tokenizers]
    load_vae: LoadVAE
    load_rest: Callable[[], dict[str, LazyTensor]]
    read_from: tuple[Path, ...]


@dataclass(kw_only=True)
class StableDiffusionParts(OpenedModel):
    """Where a model's parts come from. ``tensors`` have diffusers' names.

    kind: the generation
    stated: what the model's own files say of its prediction type and schedule
    load_text, load_tokenizers, load_vae, load_rest: see ``Rest``
    """

    kind: Kind
    unet_config: dict[str, Any]
    prediction_type: PredictionType
    zero_terminal_snr: bool
    stated: Stated
    load_text: LoadText
    load_tokenizers: Callable[[], Tokenizers]
    load_vae: LoadVAE
    load_rest: Callable[[], dict[str, LazyTensor]]
    licence: str

    @property
    def architecture(self) -> str:
        return self.kind.architecture.name

    def load(self, dtype: torch.dtype | None, resolution: int = 0) -> ModelBundle:
        """As ``OpenedModel.load``. Text encoders and VAE are read when they are first used, in fp32."""
        unet = build_unet(self.unet_config, self.tensors, dtype, str(self.weights))
        resolution = resolution or self.kind.architecture.variant(self.prediction_type).resolution
        size = (resolution, resolution)
        conditioner = SDXLConditioner if self.kind is SDXL_KIND else SDConditioner
        return ModelBundle(
            name=self.name,
            architecture=self.architecture,
            denoiser=UNetDenoiser(unet, VPSchedule.sdxl(self.zero_terminal_snr, self.prediction_type)),
            conditioner=conditioner(self.load_text, self.load_tokenizers, size),
            codec=VAECodec(self.load_vae),
            latent_shape=(unet.config.in_channels, resolution // 8, resolution // 8),
            image_size=size,
            weights=self.weights,
            licence=self.licence,
            zero_terminal_snr=self.zero_terminal_snr,
        )

    def check(self, text: bool = True, codec: bool = True) -> None:
        """As ``OpenedModel.check``. The UNet was checked when it was opened."""
        if text:
            self.load_tokenizers()
            encoders = self.load_text(None)
            widths = [encoder.config.hidden_size for encoder in encoders]
            pooled = encoders[-1].config.projection_dim if self.kind.encoders[-1].has_projection else 0
            expected = self.unet_config["cross_attention_dim"]
            added = (self.unet_config["projection_class_embeddings_input_dim"] or 6 * TIME_ID_WIDTH) - 6 * TIME_ID_WIDTH
            if sum(widths) != expected or pooled != added:
                raise ValueError(
                    f"{self.weights}: its UNet needs embeddings of {expected} and a pooled one of {added or 'no'} "
                    f"numbers, but the text encoders give {' + '.join(map(str, widths))} and {pooled or 'none'}"
                )
        if codec:
            self.load_vae(None)

    def is_lora(self, path: Path) -> bool:
        return is_kohya(path)

    def read_lora(self, path: Path) -> Adapter:
        return read_lora(path, self.tensors, kohya_modules(self.tensors, self.unet_config))


def check_resolution(resolution: int) -> None:
    if resolution % 64 or resolution < 0:
        raise ValueError(f"model.resolution: expected a multiple of 64, or 0 for the model's own, got {resolution}")


def open_parts(source: str, prediction_type: str = AUTO, asked_by: str = CONFIGURATION) -> StableDiffusionParts:
    """The parts of a model, none of them read yet. ValueError for what is of none of the ``KINDS``.

    prediction_type: what it predicts, where its files do not say it; ValueError that names ``asked_by`` where they say
        otherwise
    """
    path = Path(source)
    if path.exists() and not path.is_dir():
        return _from_file(path, prediction_type, asked_by)
    return _from_diffusers(source, prediction_type, asked_by)


def rest_of(source: str, kind: Kind) -> Rest:
    """Text encoders and VAE of a model of ``kind`` in any of the forms that ``open_parts`` takes; its UNet does not
    matter.
    """
    path = Path(source)
    if path.exists() and not path.is_dir():
        return _rest_in_file(path, kind)
    return _rest_in_folder(find_folder(source), kind)


def _predicts(stated: Stated, asked: str) -> PredictionType:
    return "v_prediction" if "v_prediction" in (stated.prediction_type, asked) else "epsilon"


# -- a single file -----------------------------------------------------------------------------------------------------


def open_pickled_parts(path: Path) -> StableDiffusionParts:
    """The UNet in a pickled file (see ``open_pickled``), without text encoders and VAE."""
    return _from_file(path, AUTO, CONFIGURATION, open_pickled(path))


def _from_file(path: Path, asked: str, asked_by: str, pickled: Tensors | None = None) -> StableDiffusionParts:
    with reading(path, "a model of SD 1.x, 2.x or SDXL"):
        tensors = open_tensors(path) if pickled is None else pickled
        metadata = read_safetensors_metadata(path) if pickled is None else {}
        told = statements.of_tensors(tensors, shown(path)) + statements.of_settings(metadata, "its header", shown(path))
        prefix = UNET if any(name.startswith(UNET) for name in tensors) else ""
        unet = {name: tensor for name, tensor in _under(tensors, prefix).items() if name not in MARKERS}
        config, named = read_unet(unet, shown(path), prefix)
        kind = kind_of_unet(shapes_of(unet))
        is_decided = asked != AUTO and asked_by == CONFIGURATION
        if kind is SD2_KIND and not is_decided and not any(statement.prediction_type for statement in told):
            told += _by_spread(named)
        stated = statements.combine(told, shown(path), asked, asked_by)
    return StableDiffusionParts(
        kind=kind,
        name=metadata.get("modelspec.title") or path.stem,
        unet_config=config,
        tensors=named,
        prediction_type=_predicts(stated, asked),
        zero_terminal_snr=bool(stated.zero_terminal_snr),
        stated=stated,
        weights=path,
        licence=metadata.get("modelspec.license", ""),
        is_generator=has_recipe(metadata),
        **vars(_rest_in_file(path, kind)),
    )


def _by_spread(unet: Tensors) -> list[statements.Statement]:
    """What is said by ``TELLS_V``. Small UNets have no such tensor."""
    tensor = unet.get(TELLS_V)
    if tensor is None or float(tensor.load_finite().float().std(correction=0)) <= SPREAD_OF_V:
        return []
    return [statements.Statement(f"the spread of its tensor {TELLS_V_LDM}", prediction_type="v_prediction")]


def _rest_in_file(path: Path, kind: Kind) -> Rest:
    return Rest(
        load_text=partial(_text_from_file, path, kind),
        load_tokenizers=partial(_own_tokenizers, kind),
        load_vae=partial(_vae_from_file, path, kind),
        load_rest=lambda: {k: tensor for k, tensor in open_tensors(path).items() if k.startswith((*kind.text, VAE))},
        read_from=(path,),
    )


def _under(tensors: Tensors, prefix: str) -> dict[str, LazyTensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _found(path: Path, prefix: str, what: str) -> dict[str, LazyTensor]:
    part = _under(open_tensors(path), prefix)
    if not part:
        raise ValueError(
            f"{path}: expected {what} under {prefix}*, but the file holds none. Use a whole checkpoint, or a cache of "
            "encoded prompts (python -m sid_train encode) where only the text encoders are missing."
        )
    return part


def _own_tokenizers(kind: Kind) -> Tokenizers:
    of_openai, of_open_clip = clip_tokenizers()
    return tuple(of_open_clip if encoder.is_open_clip else of_openai for encoder in kind.encoders)


def _text_from_file(path: Path, kind: Kind, dtype: torch.dtype | None = torch.float32) -> TextEncoders:
    with reading(path, f"the text encoders of {kind.architecture.people}"):
        return tuple(_encoder_from_file(path, encoder, dtype) for encoder in kind.encoders)


def _encoder_from_file(
    path: Path, encoder: TextEncoder, dtype: torch.dtype | None
) -> CLIPTextModel | CLIPTextModelWithProjection:
    names = open_tensors(path)
    prefix = next((p for p in encoder.prefixes if any(name.startswith(p) for name in names)), encoder.prefixes[0])
    tensors = _found(path, prefix, encoder.people)
    if not encoder.is_open_clip:  # old files of SD 1.x leave out the first part of the names
        unread = (TEXT, PROJECTION, *NOT_READ)
        tensors = {name if name.startswith(unread) else TEXT + name: tensor for name, tensor in tensors.items()}
    return build_text(encoder, tensors, dtype, shown(path), prefix)


def _vae_from_file(path: Path, kind: Kind, dtype: torch.dtype | None = torch.float32) -> AutoencoderKL:
    with reading(path, f"the VAE of {kind.architecture.people}"):
        tensors = read_vae(_found(path, VAE, "a VAE"), shown(path), VAE)
        return build_vae(tensors, dtype, shown(path), kind.scaling_factor)


def load_vae(path: Path, kind: Kind) -> AutoencoderKL:
    """A VAE in a file of its own, fp32, in any of the forms that ``vae_tensors`` reads."""
    return build_vae(_under(vae_tensors(path), VAE), torch.float32, shown(path), kind.scaling_factor)


def vae_tensors(path: Path) -> dict[str, LazyTensor]:
    """A VAE's tensors named as in single files, from a file with such names, with bare ldm names or diffusers'."""
    with reading(path, "a VAE"):
        tensors = open_tensors(path)
        return {VAE + name: t for name, t in read_vae(_under(tensors, VAE) or tensors, shown(path)).items()}


# -- a diffusers folder ------------------------------------------------------------------------------------------------


def _from_diffusers(source: str, asked: str, asked_by: str) -> StableDiffusionParts:
    folder = find_folder(source)
    scheduler, config_file = folder / SCHEDULER_FILE, folder / "unet" / "config.json"
    with reading(scheduler, "a scheduler's configuration"):
        told = statements.of_scheduler(read_settings(scheduler, folder), SCHEDULER_FILE, shown(folder))
    settings, file = read_settings(config_file, folder), weights_of(folder, "unet")
    with reading(file, "a model of SD 1.x, 2.x or SDXL"):
        metadata = read_safetensors_metadata(file)
        told += statements.of_settings(metadata, f"the header of {file.name}", shown(folder))
        stated = statements.combine(told, shown(folder), asked, asked_by)
        config, tensors = read_unet(open_tensors(file), shown(file))
    with reading(config_file, "a UNet's configuration"):
        require_unet_config(config_file, settings, config)
    kind = kind_of_unet(shapes_of(tensors))
    return StableDiffusionParts(
        kind=kind,
        name=Path(source).name,
        unet_config=config,
        tensors=tensors,
        prediction_type=_predicts(stated, asked),
        zero_terminal_snr=bool(stated.zero_terminal_snr),
        stated=stated,
        weights=file,
        licence="",
        is_generator=has_recipe(metadata),
        **vars(_rest_in_folder(folder, kind)),
    )


def _rest_in_folder(folder: Path, kind: Kind) -> Rest:
    def vae(dtype: torch.dtype | None = torch.float32) -> AutoencoderKL:
        return build_vae(open_vae(folder, kind), dtype, str(weights_of(folder, "vae")), kind.scaling_factor)

    return Rest(
        load_text=lambda dtype=torch.float32: load_text(folder, kind, dtype),
        load_tokenizers=partial(load_tokenizers, folder, kind),
        load_vae=vae,
        load_rest=lambda: rest_of_folder(folder, kind),
        read_from=tuple(folder / name for name in (*WEIGHTS, *TOKENIZERS, "scheduler")),
    )
