"""What files and folders say of a model's prediction type and noise schedule, and which of it is supported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.noise_schedule import PredictionType
from ...files.reading import shown
from ..family import AUTO
from .keys import EDM_MARKERS, MARKERS, UNET

SUPPORTED = "expected a model that predicts epsilon or v on SDXL's own noise schedule"

# All spelled without punctuation, in lower case. Keys are those of the model metadata standard (modelspec.*), of
# kohya's trainers (ss_*), of recipes (sid.*) and of diffusers, after the prefix.
TYPE_KEYS = {"predictkey", "predictiontype", "predtype", "prediction", "parameterization"}
V_KEYS = {"vparameterization", "vpred", "vprediction"}
FLOW_KEYS = {"flow", "flowmatching", "rectifiedflow", "useflowsigmas"}
ZERO_SNR_KEYS = {"zeroterminalsnr", "ztsnr", "zsnr", "rescalebetaszerosnr"}
KINDS = {
    **dict.fromkeys(("epsilon", "eps", "epsilonprediction", "epsprediction", "epspred", "noise"), "epsilon"),
    **dict.fromkeys(("v", "vpred", "vprediction", "vparameterization", "vparam"), "v_prediction"),
    **dict.fromkeys(("sample", "x0", "xstart", "sampleprediction", "x0prediction"), "sample"),
    **dict.fromkeys(("flow", "flowmatching", "flowmatch", "flowprediction", "rectifiedflow", "velocity"), "flow"),
    **dict.fromkeys(("edm", "edmprediction", "edmvpred", "edmvprediction"), "edm"),
}
UNSUPPORTED = {
    "sample": "predicts the picture itself (sample)",
    "flow": "is a flow-matching model",
    "edm": "is an EDM model",
}
UNSAID = {"", "none", "null"}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SCHEDULERS = {
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep", "DPMSolverSDE"),
        *("DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete"),
        *("KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD", "UniPCMultistep"),
    )
}
"""diffusers' samplers of such models."""


@dataclass(frozen=True)
class Statement:
    """What one place says; None where it says nothing of it.

    where: the place, for people
    prediction_type: epsilon, v_prediction, or a word that is not known
    """

    where: str
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None


@dataclass(frozen=True)
class Stated:
    """What all places together say; None where none does."""

    prediction_type: PredictionType | None
    zero_terminal_snr: bool | None


def of_tensors(names: Iterable[str], source: str) -> list[Statement]:
    """What marker tensors among ``names`` say. ValueError for those of another kind of model."""
    found = []
    for name in names:
        marker = name.removeprefix(UNET)
        if marker in EDM_MARKERS:
            raise ValueError(
                f"{source}: it is an EDM model (tensor {marker}, as in {EDM_MARKERS[marker]}): {SUPPORTED}"
            )
        if marker == MARKERS[0]:
            found.append(Statement(f"its tensor {marker}", prediction_type="v_prediction"))
        elif marker == MARKERS[1]:
            found.append(Statement(f"its tensor {marker}", zero_terminal_snr=True))
    return found


def of_settings(settings: Mapping[str, Any], where: str, source: str) -> list[Statement]:
    """What the entries of a safetensors header or of a scheduler's configuration say. ValueError for what is not
    supported.
    """
    found = []
    for name, value in settings.items():
        key, said = _plain(re.sub(r"^(modelspec\.|ss_|sid\.)", "", name)), _plain(value)
        place = f"{name} in {where}"
        if said in UNSAID:
            continue
        if key in TYPE_KEYS:
            kind = KINDS.get(said, str(value))
            if kind in UNSUPPORTED:
                raise ValueError(f"{source}: it {UNSUPPORTED[kind]} ({place} is {shown(value, 60)}): {SUPPORTED}")
            found.append(Statement(place, prediction_type=kind))
        elif key in V_KEYS | FLOW_KEYS | ZERO_SNR_KEYS:
            is_so = _boolean(said, place, source)
            if key in V_KEYS:
                found.append(Statement(place, prediction_type="v_prediction" if is_so else "epsilon"))
            elif key in ZERO_SNR_KEYS:
                found.append(Statement(place, zero_terminal_snr=is_so))
            elif is_so:
                raise ValueError(f"{source}: it {UNSUPPORTED['flow']} ({place} is {shown(value, 60)}): {SUPPORTED}")
    return found


def of_scheduler(config: Mapping[str, Any], where: str, source: str) -> list[Statement]:
    """What a ``scheduler_config.json`` says. How a model is to be sampled is not read; ValueError for a noise schedule
    that is not SDXL's.
    """
    kind = config.get("_class_name")
    if kind is not None and str(kind) not in SCHEDULERS:
        said = _plain(kind)
        reason = next((f": it {UNSUPPORTED[word]}" for word in ("flow", "edm") if word in said), "")
        raise ValueError(f"{source}: {where} names {shown(kind, 80)}{reason}: {SUPPORTED}")
    for key, ours in SCHEDULE.items():
        value = config.get(key, ours)
        if value != ours and not (isinstance(ours, float) and _is_close(value, ours)):
            raise ValueError(
                f"{source}: {where}: {key}: expected {ours}, as SDXL has, got {shown(value, 60)}: {SUPPORTED}"
            )
    if config.get("trained_betas") is not None:
        raise ValueError(f"{source}: {where}: trained_betas: expected none, as SDXL has: {SUPPORTED}")
    for key in ("sigma_min", "sigma_max", "sigma_data"):
        if config.get(key) is not None:
            raise ValueError(f"{source}: {where}: {key} is set, as for an EDM model: {SUPPORTED}")
    if config.get("timestep_type", "discrete") != "discrete":
        kind = shown(config["timestep_type"], 60)
        raise ValueError(f"{source}: {where}: timestep_type: expected discrete, got {kind}: {SUPPORTED}")
    return of_settings(config, where, source)


def combine(statements: Iterable[Statement], source: str, asked: str = AUTO, asked_by: str = "") -> Stated:
    """What they say together. ValueError where they contradict each other and ``asked`` does not decide it, or where
    they contradict what was ``asked``.

    asked: epsilon or v_prediction, which ``asked_by`` says; auto where nobody says anything
    """
    types = {s.prediction_type: s.where for s in statements if s.prediction_type is not None}
    snrs = {s.zero_terminal_snr: s.where for s in statements if s.zero_terminal_snr is not None}
    cure = "model.prediction_type in a run's configuration says which is right"
    if len(snrs) > 1:
        raise ValueError(
            f"{source}: it contradicts itself: by {snrs[True]} its schedule has zero terminal SNR, by {snrs[False]} not"
        )
    if asked in types:
        types = {asked: types[asked]}
    if len(types) > 1:
        told = ", but ".join(f"{where} says {shown(kind, 60)}" for kind, where in types.items())
        raise ValueError(f"{source}: it contradicts itself: {told}: {cure}")
    for kind, where in types.items():
        if kind not in ("epsilon", "v_prediction"):
            if asked == AUTO:
                raise ValueError(f"{source}: {where}: expected epsilon or v, got {shown(kind, 60)}: {cure}")
            types = {}
        elif asked not in (AUTO, kind):
            raise ValueError(f"{source}: it is a {kind} model ({where} says so), but {asked_by} says {asked}")
    said: PredictionType | None = "v_prediction" if "v_prediction" in types else "epsilon" if types else None
    return Stated(said, next(iter(snrs), None))


def _plain(value: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(value)[:200].lower())


def _boolean(said: str, place: str, source: str) -> bool:
    if said not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError(f"{source}: {place}: expected true or false, got {said[:60]!r}")
    return said in ("true", "1", "yes")


def _is_close(value: object, ours: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, ours, rel_tol=1e-6)
