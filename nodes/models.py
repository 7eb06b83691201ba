"""Checks of a MODEL against what SD 1.x, 2.x and SDXL are, and against a recipe."""

from __future__ import annotations

import dataclasses

import comfy.model_base
import comfy.model_sampling

from ..sid_train.core.architectures import DIGITS, SAMPLED, SD1, SD2, SDXL, Architecture
from ..sid_train.core.noise_schedule import X0
from ..sid_train.core.recipe import SiDRecipe, split_architecture
from .digits import DigitsNetwork

# What ComfyUI calls other samplings of networks of these classes, and what they are.
PARAMETRISATIONS = {
    "EDM": "an EDM model (Playground 2.5, for instance)",
    "V_PREDICTION on ModelSamplingContinuousEDM": "an EDM model with v-prediction (CosXL, for instance)",
    "CONST": "a flow-matching model",
}


def _architecture_of(network, source: str) -> Architecture:
    """Of ComfyUI's BaseModel; ValueError for a model of another class. source: whose it is."""
    if isinstance(network, comfy.model_base.SDXL):
        return SDXL
    if isinstance(network, DigitsNetwork):
        return DIGITS
    found = type(network).__name__
    if found == "BaseModel":  # SD 1.x and 2.x have no class of their own
        width = network.model_config.unet_config.get("context_dim")
        for architecture in (SD1, SD2):
            if width == architecture.text_width:
                return architecture
        found = f"a UNet for prompts {width} wide"
    raise ValueError(
        f"{source}: expected a model of SD 1.x, 2.x or SDXL, got {found}. SiD's loaders and ComfyUI's Load Checkpoint "
        "give one from such a file."
    )


def check_network(network, sampling, source: str, is_file: bool = False) -> tuple[Architecture, str]:
    """The architecture, and ``epsilon``, ``v_prediction`` or ``x0``; ValueError for a model that is none of SD 1.x, 2.x
    and SDXL, or is not sampled as these are.

    network: ComfyUI's BaseModel; sampling: its ``model_sampling``, patches included; source: whose model it is;
    is_file: ``source`` is the model's own file, with no node in between
    """
    architecture = _architecture_of(network, source)
    bases = type(sampling).__bases__
    if comfy.model_sampling.ModelSamplingDiscrete in bases and len(sampling.sigmas) == 1000:
        if comfy.model_sampling.EPS in bases:
            return architecture, "epsilon"
        if comfy.model_sampling.V_PREDICTION in bases:
            return architecture, "v_prediction"
        if comfy.model_sampling.X0 in bases:
            return architecture, X0
    names = [base.__name__ for base in bases]
    kind = PARAMETRISATIONS.get(f"{names[-1]} on {names[0]}") or PARAMETRISATIONS.get(names[-1])
    cure = (
        "Few-step presets are not for it: sample it with ComfyUI's own nodes."
        if is_file
        else "SiD generators are sampled on their own timesteps: remove ModelSampling... nodes from between loader and "
        "sampler. Where there are none, the model's file is of this kind, and few-step presets are not for it."
    )
    raise ValueError(
        f"{source}: expected 1,000 discrete timesteps with eps-, v- or x0-prediction, got "
        f"{f'{kind}: ' if kind else ''}{' + '.join(names)}. {cure}"
    )


def has_zero_terminal_snr(sampling) -> bool:
    """Whether the highest noise level is that of a zero-terminal-SNR schedule (the usual one ends at 14.6)."""
    return float(sampling.sigma_max) > 100


def fit_preset(model, recipe: SiDRecipe, source: str, is_file: bool = False) -> SiDRecipe:
    """A preset with MODEL's architecture, prediction type and noise schedule (see ``check_network``)."""
    sampling = model.get_model_object("model_sampling")
    architecture, predicts = check_network(model.model, sampling, source, is_file)
    _check_parametrisation(sampling, predicts, recipe, source)
    facts = {"prediction_type": predicts, "zero_terminal_snr": has_zero_terminal_snr(sampling)}
    return dataclasses.replace(recipe, **facts).for_architecture(architecture)


def _check_parametrisation(sampling, predicts: str, recipe: SiDRecipe, source: str) -> None:
    """ValueError where the network is another one than the recipe says in what SiD's loaders alone set up."""
    cure = "SiD's loaders set that up: load the file with one of them and with this recipe, and connect what it gives."
    if recipe.prediction_type == X0 and predicts != X0:
        raise ValueError(
            f"{source}: its recipe is for a network that predicts the picture itself (x0), but ComfyUI takes it for "
            f"{predicts}. {cure} ModelSamplingDiscrete with 'x0' does the same."
        )
    scale = getattr(sampling, "timestep_scale", 1.0)
    if scale != recipe.timestep_scale:
        raise ValueError(
            f"{source}: its recipe is for a network that is told timesteps scaled by {recipe.timestep_scale:g}, but "
            f"this one is told timesteps scaled by {scale:g}. {cure}"
        )


def check_model(model, recipe: SiDRecipe, source: str, is_file: bool = False) -> None:
    """ValueError unless MODEL is as ``recipe`` says (see ``check_network``)."""
    sampling = model.get_model_object("model_sampling")
    architecture, predicts = check_network(model.model, sampling, source, is_file)
    people = architecture.people
    wanted = SAMPLED.get(split_architecture(recipe.architecture)[0])
    if wanted is not architecture:
        raise ValueError(
            f"{source}: its recipe is for {wanted.people if wanted else recipe.architecture}, but the model is one of "
            f"{people}. Recipe and model belong together: choose the other one. A preset takes the "
            "model's: connect 'model' of SiD Recipe Override."
        )
    _check_parametrisation(sampling, predicts, recipe, source)
    cure = (
        "(ComfyUI takes an SDXL file for v-prediction if it holds an empty tensor named 'v_pred'; sid_train writes it.)"
        if architecture is SDXL
        else f"ComfyUI cannot tell what files of {people} predict: if the model is right, put ModelSamplingDiscrete "
        f"with '{'v_prediction' if recipe.prediction_type == 'v_prediction' else 'eps'}'"
        f"{' and zsnr' * recipe.zero_terminal_snr} behind ComfyUI's loader, before this."
    )
    if recipe.prediction_type != predicts:
        raise ValueError(
            f"{source}: its recipe says prediction type {recipe.prediction_type}, but ComfyUI loaded the model as "
            f"{predicts}. Recipe and model belong together: choose the other one. A preset takes the model's: connect "
            f"'model' of SiD Recipe Override. {cure}"
        )
    is_ztsnr = has_zero_terminal_snr(sampling)
    if recipe.zero_terminal_snr != is_ztsnr:
        raise ValueError(
            f"{source}: its recipe says zero terminal SNR is {str(recipe.zero_terminal_snr).lower()}, but ComfyUI "
            f"loaded the model with {str(is_ztsnr).lower()}. Choose the recipe that belongs to this model."
            f"{'' if architecture is SDXL else f' {cure}'}"
        )
