"""What files and folders say of a model's prediction type and noise schedule, and which of it is supported."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ...core.noise_schedule import PREDICTION_TYPES, PredictionType
from ...files.reading import shown
from .keys import EDM_MARKERS, MARKERS, UNET

SUPPORTED = "expected a model that predicts epsilon or v on the noise schedule of Stable Diffusion and SDXL"

# All spelled without punctuation, in lower case. Keys are those of the model metadata standard (modelspec.*), of
# kohya's trainers (ss_*), of recipes (sid.*) and of diffusers, after the prefix.
TYPE_KEYS = {"predictkey", "predictiontype", "predtype", "prediction", "parameterization"}
V_KEYS = {"vparameterization", "vpred", "vprediction"}
FLOW_KEYS = {"flow", "flowmatching", "rectifiedflow", "useflowsigmas"}
# In a header without a prefix these may be anything, such as a note.
WITH_PREFIX = {"prediction", "flow", "useflowsigmas"}
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
UNSAID = {"", "none", "null", "unknown", "auto", "default", "na"}
BOOLEANS = dict.fromkeys(("true", "1", "yes"), True) | dict.fromkeys(("false", "0", "no"), False)
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
# What diffusers takes where the file does not say it: SDXL's betas for some, and how they rise between them for two.
WITH_BETAS = {
    f"{name}Scheduler" for name in ("DPMSolverSDE", "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete")
}
WITH_SCHEDULE = {"LCMScheduler", "TCDScheduler"}


@dataclass(frozen=True)
class Statement:
    """What one place says; None where it says nothing of it.

    where: the place, for people
    prediction_type: epsilon, v_prediction, or a word that is not known
    by_tensor: ComfyUI goes by tensors, and tools that merge models carry headers over: a tensor is right
    """

    where: str
    prediction_type: str | None = None
    zero_terminal_snr: bool | None = None
    by_tensor: bool = False


@dataclass(frozen=True)
class Stated:
    """What all places together say; None where none does."""

    prediction_type: str | None
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
            found.append(Statement(f"its tensor {marker}", prediction_type="v_prediction", by_tensor=True))
        elif marker == MARKERS[1]:
            found.append(Statement(f"its tensor {marker}", zero_terminal_snr=True, by_tensor=True))
    return found


def kinds(settings: Mapping[str, Any], is_scheduler: bool = False) -> Iterator[tuple[str, Any, str]]:
    """(name, value, kind) of the entries of a safetensors header, or of a scheduler's configuration, that say what a
    model predicts.

    kind: epsilon, v_prediction, one of ``UNSUPPORTED``, a word that is not known, or nothing for neither true nor false
    """
    for name, key, said, value in _said(settings, is_scheduler):
        if key in TYPE_KEYS:
            yield name, value, KINDS.get(said, str(value))
        elif key in V_KEYS | FLOW_KEYS:
            if said not in BOOLEANS:
                yield name, value, ""
            elif key in V_KEYS:
                yield name, value, "v_prediction" if BOOLEANS[said] else "epsilon"
            elif BOOLEANS[said]:
                yield name, value, "flow"


def of_settings(settings: Mapping[str, Any], where: str, source: str, is_scheduler: bool = False) -> list[Statement]:
    """What such entries say, and those of the noise schedule. ValueError for what is not supported."""
    found = []
    for name, value, kind in kinds(settings, is_scheduler):
        place = f"{name} in {where}"
        if name == "sid.prediction_type" and kind == "sample":
            continue  # of a generator, whose recipe is followed, and which is no teacher
        if kind in UNSUPPORTED:
            raise ValueError(f"{source}: it {UNSUPPORTED[kind]} ({place} is {shown(value, 60)}): {SUPPORTED}")
        if not kind:
            raise _neither(value, place, source)
        found.append(Statement(place, prediction_type=kind))
    for name, key, said, value in _said(settings, is_scheduler):
        if key in ZERO_SNR_KEYS:
            place = f"{name} in {where}"
            if said not in BOOLEANS:
                raise _neither(value, place, source)
            found.append(Statement(place, zero_terminal_snr=BOOLEANS[said]))
    return found


def _said(settings: Mapping[str, Any], is_scheduler: bool) -> Iterator[tuple[str, str, str, Any]]:
    """(name, its key, the value without punctuation, the value) of the entries that say anything."""
    for name, value in settings.items():
        bare = re.sub(r"^(modelspec\.|ss_|sid\.)", "", name[:100])
        key, said = _plain(bare), _plain(value)
        is_note = key in WITH_PREFIX and bare == name[:100] and not is_scheduler
        if said not in UNSAID and not is_note:
            yield name, key, said, value


def _neither(value: object, place: str, source: str) -> ValueError:
    return ValueError(f"{source}: {place}: expected true or false, got {shown(value, 60)!r}")


def of_scheduler(config: Mapping[str, Any], where: str, source: str) -> list[Statement]:
    """What a ``scheduler_config.json`` says. How a model is to be sampled is not read; ValueError for a noise schedule
    that is another.
    """
    kind = config.get("_class_name")
    if kind is not None and str(kind) not in SCHEDULERS:
        said = _plain(kind)
        reason = next((f": it {UNSUPPORTED[word]}" for word in ("flow", "edm") if word in said), "")
        raise ValueError(f"{source}: {where} names {shown(kind, 80)}{reason}: {SUPPORTED}")
    for key, ours in SCHEDULE.items():
        is_default = kind in WITH_SCHEDULE or (kind in WITH_BETAS and key != "beta_schedule")
        value = config.get(key, ours if is_default or key == "num_train_timesteps" else "nothing")
        if value != ours and not (isinstance(ours, float) and _is_close(value, ours)):
            raise ValueError(
                f"{source}: {where}: {key}: expected {ours}, as all have, got {shown(value, 60)}: {SUPPORTED}"
            )
    if config.get("trained_betas") is not None:
        raise ValueError(f"{source}: {where}: trained_betas: expected none: {SUPPORTED}")
    for key in ("sigma_min", "sigma_max", "sigma_data"):
        if config.get(key) is not None:
            raise ValueError(f"{source}: {where}: {key} is set, as for an EDM model: {SUPPORTED}")
    if config.get("timestep_type", "discrete") != "discrete":
        kind = shown(config["timestep_type"], 60)
        raise ValueError(f"{source}: {where}: timestep_type: expected discrete, got {kind}: {SUPPORTED}")
    return of_settings(config, where, source, is_scheduler=True)


def combine(statements: Iterable[Statement], source: str, asked: str = "", asked_by: str = "") -> Stated:
    """What they say together. ValueError where they contradict each other and ``asked`` does not decide it, or where
    they contradict what was ``asked``.

    asked: epsilon or v_prediction, which ``asked_by`` says; anything else where nobody says it
    """
    found = list(statements)
    types: dict[str, str] = _places(found, "prediction_type")
    snrs: dict[bool, str] = _places(found, "zero_terminal_snr")
    cure = (
        "model.prediction_type in a run's configuration says which is right; for other commands save the model without "
        "the entry that is wrong"
    )
    if len(snrs) > 1:
        raise ValueError(
            f"{source}: it contradicts itself: by {snrs[True]} its schedule has zero terminal SNR, by {snrs[False]} "
            "not: save it without the entry that is wrong"
        )
    if asked in types:
        types = {asked: types[asked]}
    if len(types) > 1:
        told = ", but ".join(f"{where} says {shown(kind, 60)}" for kind, where in types.items())
        raise ValueError(f"{source}: it contradicts itself: {told}: {cure}")
    for kind, where in types.items():
        if kind not in ("epsilon", "v_prediction"):
            if asked not in PREDICTION_TYPES:
                raise ValueError(f"{source}: {where}: expected epsilon or v, got {shown(kind, 60)}: {cure}")
            types = {}
        elif asked in PREDICTION_TYPES and asked != kind:
            raise ValueError(f"{source}: it is a {kind} model ({where} says so), but {asked_by} says {asked}")
    said: PredictionType | None = "v_prediction" if "v_prediction" in types else "epsilon" if types else None
    return Stated(said, next(iter(snrs), None))


def _places(statements: list[Statement], field: str) -> dict[Any, str]:
    """Where each value of ``field`` is said: by tensors alone where some say it."""
    saying = [s for s in statements if getattr(s, field) is not None]
    return {getattr(s, field): s.where for s in [s for s in saying if s.by_tensor] or saying}


def _plain(value: object) -> str:
    return re.sub(r"[^a-z0-9]", "", str(value)[:200].lower())


def _is_close(value: object, ours: float) -> bool:
    return isinstance(value, int | float) and math.isclose(value, ours, rel_tol=1e-6)
