"""What the nodes share: types, the category, messages to the user, and checks of a MODEL."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterable

import comfy.model_base
import comfy.model_sampling
from comfy_api.latest import io

from ..sid_train.core.recipe import SiDRecipe
from ..sid_train.files.header import read_safetensors_metadata

CATEGORY = "SiD"
RecipeType = io.Custom("SID_RECIPE")
StrategyType = io.Custom("SID_STRATEGY")

# What SDXL's text encoders make: CLIP-L and OpenCLIP bigG side by side, and bigG's pooled vector.
TEXT_WIDTH, POOLED_WIDTH = 2048, 1280

_log = logging.getLogger("ComfyUI-SiD")
_warned: set[str] = set()  # the ids of the nodes that show a message
_SCHEMA_FIELDS = {f.name for f in dataclasses.fields(io.Schema)}


def schema(**fields) -> io.Schema:
    """An ``io.Schema`` in our category, without the fields that this version of ComfyUI does not know."""
    return io.Schema(**{k: v for k, v in (fields | {"category": CATEGORY}).items() if k in _SCHEMA_FIELDS})


def show(node: type[io.ComfyNode], text: str) -> None:
    """Shows ``text`` on the node."""
    web = sys.modules.get("server")  # absent when ComfyUI is used as a library
    server = getattr(web.PromptServer, "instance", None) if web else None
    if server is not None and node.hidden is not None and node.hidden.unique_id is not None:
        server.send_progress_text(text, node.hidden.unique_id)


def warn(node: type[io.ComfyNode], messages: Iterable[str]) -> None:
    """Shows what the user should know on the node, and logs it; where there is nothing any more, says that."""
    unique_id = node.hidden.unique_id if node.hidden is not None else None
    if text := "\n".join(messages):
        _log.warning("%s: %s", node.__name__, text)
        show(node, text)
        _warned.add(unique_id)
    elif unique_id in _warned:
        show(node, "No warnings.")  # the frontend keeps the old text if it is sent nothing
        _warned.discard(unique_id)


def read_header(path: str, source: str) -> dict[str, str]:
    """The metadata of a file; ValueError, which names ``source``, for one that is no safetensors file."""
    if not path.lower().endswith((".safetensors", ".sft")):
        raise ValueError(f"{source}: expected a safetensors file. Convert it first: other formats can run code.")
    return read_safetensors_metadata(path)


def check_choice(name: str, value: str, options: Iterable[str]) -> str:
    """``value`` if it is one of ``options`` (ComfyUI 0.3.64 does not check combos of V3 nodes); ValueError if not."""
    if value not in (allowed := list(options)):
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def check_sdxl(network, sampling, source: str) -> str:
    """``epsilon`` or ``v_prediction``; ValueError for a model that is not SDXL or not sampled as SDXL is.

    network: ComfyUI's BaseModel; sampling: its ``model_sampling``, patches included; source: whose model it is
    """
    if not isinstance(network, comfy.model_base.SDXL):
        found = type(network).__name__
        found = "one of SD 1.x's or 2.x's class" if found == "BaseModel" else found
        raise ValueError(
            f"{source}: expected an SDXL model, got {found}. SiD's loaders and ComfyUI's Load Checkpoint give one from "
            "an SDXL file."
        )
    bases = type(sampling).__bases__
    if comfy.model_sampling.ModelSamplingDiscrete in bases and len(sampling.sigmas) == 1000:
        if comfy.model_sampling.EPS in bases:
            return "epsilon"
        if comfy.model_sampling.V_PREDICTION in bases:
            return "v_prediction"
    raise ValueError(
        f"{source}: expected SDXL's 1,000 discrete timesteps with eps- or v-prediction, got "
        f"{' + '.join(b.__name__ for b in bases)}. SiD generators are sampled on their own timesteps: remove "
        "ModelSampling... nodes from between loader and sampler."
    )


def has_zero_terminal_snr(sampling) -> bool:
    """Whether the highest noise level is that of a zero-terminal-SNR schedule (SDXL's own ends at 14.6)."""
    return float(sampling.sigma_max) > 100


def fit_preset(model, recipe: SiDRecipe, source: str) -> SiDRecipe:
    """A preset with MODEL's prediction type and noise schedule; ``source`` is whose model it is."""
    sampling = model.get_model_object("model_sampling")
    predicts = check_sdxl(model.model, sampling, source)
    return dataclasses.replace(recipe, prediction_type=predicts, zero_terminal_snr=has_zero_terminal_snr(sampling))


def check_model(model, recipe: SiDRecipe, source: str) -> None:
    """ValueError unless MODEL is SDXL and as ``recipe`` says; ``source`` is whose model it is."""
    sampling = model.get_model_object("model_sampling")
    predicts = check_sdxl(model.model, sampling, source)
    if recipe.prediction_type != predicts:
        raise ValueError(
            f"{source}: its recipe says prediction type {recipe.prediction_type}, but ComfyUI loaded the model as "
            f"{predicts}. Recipe and model belong together: choose the other one. A preset takes the model's: connect "
            "'model' of SiD Recipe Override. (ComfyUI takes a file for v-prediction if it holds an empty tensor named "
            "'v_pred'; sid_train writes it.)"
        )
    is_ztsnr = has_zero_terminal_snr(sampling)
    if recipe.zero_terminal_snr != is_ztsnr:
        raise ValueError(
            f"{source}: its recipe says zero terminal SNR is {str(recipe.zero_terminal_snr).lower()}, but ComfyUI "
            f"loaded the model with {str(is_ztsnr).lower()}. Choose the recipe that belongs to this model."
        )


def check_prompt(name: str, conditioning) -> None:
    """ValueError unless CONDITIONING was made by SDXL's two text encoders."""
    for text, extra in conditioning:
        pooled = extra.get("pooled_output")
        widths = text.shape[-1], None if pooled is None else pooled.shape[-1]
        if widths != (TEXT_WIDTH, POOLED_WIDTH):
            raise ValueError(
                f"{name}: expected a prompt encoded by SDXL's text encoders ({TEXT_WIDTH} wide, pooled "
                f"{POOLED_WIDTH}), got {widths[0]} wide, pooled {widths[1] or 'missing'}. Connect CLIP Text Encode to "
                "the CLIP of an SDXL checkpoint."
            )
