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

CATEGORY = "SiD"
RecipeType = io.Custom("SID_RECIPE")
StrategyType = io.Custom("SID_STRATEGY")

_log = logging.getLogger("ComfyUI-SiD")
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
    """Shows what the user should know on the node, and logs it."""
    if text := "\n".join(messages):
        _log.warning("%s: %s", node.__name__, text)
        show(node, text)


def check_choice(name: str, value: str, options: Iterable[str]) -> str:
    """``value`` if it is one of ``options`` (ComfyUI 0.3.64 does not check combos of V3 nodes); ValueError if not."""
    if value not in (allowed := list(options)):
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
    return value


def prediction_type(model) -> str:
    """``epsilon`` or ``v_prediction``; ValueError for a MODEL that is not sampled as SDXL is."""
    sampling = model.get_model_object("model_sampling")
    bases = type(sampling).__bases__
    if comfy.model_sampling.ModelSamplingDiscrete in bases and len(sampling.sigmas) == 1000:
        if comfy.model_sampling.EPS in bases:
            return "epsilon"
        if comfy.model_sampling.V_PREDICTION in bases:
            return "v_prediction"
    raise ValueError(
        "MODEL: expected SDXL's 1,000 discrete timesteps with eps- or v-prediction, got "
        f"{type(model.model).__name__} with {' + '.join(b.__name__ for b in bases)}. SiD generators are sampled on "
        "their own timesteps: remove ModelSampling... nodes from between loader and sampler, and do not use a "
        "flow-matching model (SD3, FLUX)."
    )


def check_model(model, recipe: SiDRecipe | None, source: str) -> None:
    """ValueError unless ``model`` is SDXL and as ``recipe`` says; ``source`` is who says so."""
    if not isinstance(model.model, comfy.model_base.SDXL):
        raise ValueError(f"{source}: expected an SDXL model, got {type(model.model).__name__}")
    predicts = prediction_type(model)
    if recipe is None:
        return
    if recipe.prediction_type != predicts:
        raise ValueError(
            f"{source}: its recipe says prediction type {recipe.prediction_type}, but ComfyUI loaded the model as "
            f"{predicts}. Recipe and model belong together: choose the other one. (ComfyUI takes a file for "
            "v-prediction if it holds an empty tensor named 'v_pred'; sid_train writes it.)"
        )
    is_ztsnr = float(model.get_model_object("model_sampling").sigma_max) > 100
    if recipe.zero_terminal_snr != is_ztsnr:
        raise ValueError(
            f"{source}: its recipe says zero terminal SNR is {str(recipe.zero_terminal_snr).lower()}, but ComfyUI "
            f"loaded the model with {str(is_ztsnr).lower()}. Choose the recipe that belongs to this model."
        )
