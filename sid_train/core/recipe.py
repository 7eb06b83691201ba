"""``SiDRecipe``: what a distilled checkpoint has to say about itself, as flat strings in its safetensors header.

Facts about training and instructions for sampling are kept apart: the guidance that a generator was distilled under
never changes how it is sampled; only ``sid.sampling.*`` does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..files.header import read_safetensors_metadata
from ..files.reading import shown
from .architectures import SDXL, STABLE_DIFFUSION, Architecture
from .noise_schedule import PREDICTION_TYPES, X0, VPSchedule
from .sampling import DEFAULT_GAMMA, NOISE_MODES, SID_NOISE_MODES, NoiseMode
from .timesteps import (
    DEFAULT_T_INIT,
    LADDERS,
    MAX_SID_STEPS,
    MAX_STEPS,
    check_timesteps,
    ladder_timesteps,
    timestep_ladder,
)

FORMAT_VERSION = 3
"""The newest that is read. A recipe is written as the oldest that can say it (see ``SiDRecipe.format_version``)."""
Unconditional = Literal["empty", "zeros"]
UNCONDITIONALS: tuple[str, ...] = get_args(Unconditional)
SamplingGuidance = Literal["none", "cfg", "cfg first step only", "nag"]
SAMPLING_GUIDANCES: tuple[str, ...] = get_args(SamplingGuidance)

SAI_MODEL_SPEC = "1.0.0"
LORA_SUFFIX = "/lora"
OTHER_IMPLEMENTATION = "sid_train"  # modelspec.implementation of what is no Stable Diffusion
FLOW = "flow"
SHOWN = 600  # characters of a problem
MAX_FACTS = 100  # of training, that are described
# What generic tools call the prediction types that they know.
PREDICT_KEYS = {"epsilon": "epsilon", "v_prediction": "v"}


def split_architecture(text: str) -> tuple[str, bool]:
    """The architecture that a recipe, or ``modelspec.architecture``, names, and whether the file is a LoRA for it."""
    return text.removesuffix(LORA_SUFFIX), text.endswith(LORA_SUFFIX)


class RecipeError(ValueError):
    """A recipe that is missing, malformed, contradictory or newer than this code; names the file and the key."""


@dataclass(frozen=True)
class TrainingGuidance:
    """The guidance strategy of the distillation: a training fact, never an instruction for sampling."""

    strategy: str = "none"
    fake_train: float = 1.0
    fake_eval: float = 1.0
    teacher: float = 1.0


@dataclass(frozen=True)
class SiDRecipe:
    """How a few-step generator was made and how to sample it.

    architecture: the name of one of ``architectures``, or of a family of models that is no Stable Diffusion
    timesteps: the integers it was trained on, descending; ``t_init`` is their first, and if the rest is not the ladder
        of ``t_init`` that is an error unless ``ladder`` is ``explicit``
    trained_steps: all numbers of steps that it was trained for, if there are several (an any-step generator)
    ladder: the rule for another number of steps: ``sid`` (t_init * (K - k) // K), one of ``timesteps.LADDERS``, or
        ``explicit`` (none but the timesteps themselves)
    noise_mode: of the steps after the first, see ``sampling.noise_sampler``
    noise_gamma: of the noise mode ``tcd``: 0 takes the implied noise alone, 1 a fresh one alone
    unit_variance_start: the network's first input is noise of unit variance (DMD2, LCM), not noised zeros (SiD)
    prediction_type: what the network predicts: epsilon, v_prediction, x0 (the picture itself), or flow (the velocity of
        rectified flow)
    timestep_scale: of the timestep that the network is told, see ``VPSchedule``
    training_resolution: height and width in pixels
    base_model_hash: SHA-256 of the teacher's file, hex, or "" when unknown
    sampling_guidance, sampling_cfg: how to sample it; ``none`` and 1.0 for every SiD generator
    training_summary: free facts as strings (images seen, learning rates, date ...)
    """

    base_model: str = SDXL.base_model
    architecture: str = SDXL.name
    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False
    timesteps: tuple[int, ...] = tuple(timestep_ladder(4))
    t_init: int = DEFAULT_T_INIT
    trained_steps: tuple[int, ...] = ()
    ladder: str = "sid"
    noise_mode: NoiseMode = "fresh"
    noise_gamma: float = DEFAULT_GAMMA
    unit_variance_start: bool = False
    timestep_scale: float = 1.0
    training_resolution: tuple[int, int] = (1024, 1024)
    base_model_hash: str = ""
    licence: str = ""
    title: str = ""
    unconditional: Unconditional = "empty"
    guidance: TrainingGuidance = field(default_factory=TrainingGuidance)
    sampling_guidance: SamplingGuidance = "none"
    sampling_cfg: float = 1.0
    training_summary: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
            if value not in allowed:
                raise RecipeError(f"{key}: expected one of {', '.join(allowed)}, got {value!r}")

        one_of("sid.prediction_type", self.prediction_type, (*PREDICTION_TYPES, X0, FLOW))
        one_of("sid.noise_mode", self.noise_mode, NOISE_MODES)
        one_of("sid.unconditional", self.unconditional, UNCONDITIONALS)
        one_of("sid.sampling.guidance", self.sampling_guidance, SAMPLING_GUIDANCES)
        one_of("sid.ladder", self.ladder, ("sid", "explicit", *LADDERS))
        steps = self.timesteps
        try:
            check_timesteps(steps)
        except ValueError as error:
            raise RecipeError(f"sid.{error}") from None
        if steps[0] != self.t_init:
            raise RecipeError(f"sid.t_init: expected {steps[0]}, the first of sid.timesteps, got {self.t_init}")
        if self.ladder != "explicit":
            try:
                expected = ladder_timesteps(self.ladder, len(steps), self.t_init)
            except ValueError as error:
                raise RecipeError(f"sid.{error}") from None
            if list(steps) != expected:
                of = f"t_init {self.t_init}, whose ladder" if self.ladder == "sid" else f"{self.ladder}, whose ladder"
                raise RecipeError(
                    f"sid.timesteps: {list(steps)} disagree with {of} of {len(steps)} steps is {expected}"
                )
        self._check_trained_steps()
        if not 0 <= self.noise_gamma <= 1:
            raise RecipeError(f"sid.noise_gamma: expected 0 to 1, got {self.noise_gamma}")
        if not 0 < self.timestep_scale <= 1:
            raise RecipeError(f"sid.timestep_scale: expected more than 0 and at most 1, got {self.timestep_scale}")
        if self.timestep_scale != 1 and self.noise_mode == "tcd":  # it steps by what the network is told
            raise RecipeError("sid.noise_mode: expected another one than tcd with a sid.timestep_scale, got tcd")
        if min(self.training_resolution) <= 0:
            raise RecipeError(f"sid.training_resolution: expected two sizes above 0, got {self.training_resolution}")
        for scale in ("fake_train", "fake_eval", "teacher"):
            if not math.isfinite(getattr(self.guidance, scale)):
                raise RecipeError(
                    f"sid.guidance.{scale}: expected a finite number, got {getattr(self.guidance, scale)}"
                )
        if not 0 <= self.sampling_cfg < math.inf:
            raise RecipeError(f"sid.sampling.cfg: expected a finite number from 0, got {self.sampling_cfg}")

    def _check_trained_steps(self) -> None:
        counts = self.trained_steps
        if not counts:
            return
        if len(counts) > MAX_STEPS or len(set(counts)) != len(counts) or self.steps not in counts:
            raise RecipeError(
                f"sid.trained_steps: expected up to {MAX_STEPS} different numbers, {self.steps} among them, "
                f"got {shown(counts, 100)}"
            )
        for count in counts:
            try:
                ladder_timesteps(self.ladder, count, self.t_init)
            except ValueError as error:
                raise RecipeError(f"sid.trained_steps: {error}") from None

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def default_title(self) -> str:
        """What a file is called whose ``title`` is empty."""
        return f"{self.base_model} SiD {self.steps}-step"

    @property
    def kohya_version(self) -> str:
        """What kohya's trainers call the base model (``ss_base_model_version``); empty for no Stable Diffusion."""
        known = STABLE_DIFFUSION.get(split_architecture(self.architecture)[0])
        return known.variant(self.prediction_type).kohya if known else ""

    @property
    def description(self) -> str:
        """One line for people who see the file in a model manager: what it is, and how it is sampled."""
        noise = "" if self.steps == 1 else f", {self.noise_mode} noise between them"
        guidance = "without classifier-free guidance (CFG 1)"
        if self.sampling_guidance != "none":
            guidance = f"with guidance: {self.sampling_guidance} (scale {self.sampling_cfg:g})"
        return (
            f"A few-step generator distilled from {self.base_model}. Sample it in {self.steps} step"
            f"{'s' * (self.steps > 1)} (timestep{'s' * (self.steps > 1)} {' '.join(map(str, self.timesteps))}{noise}), "
            f"{guidance}." + (f" It was trained for {self.trained_numbers} steps." if self.trained_steps else "")
        )

    @property
    def trained_numbers(self) -> str:
        """The numbers of steps that it was trained for, in words."""
        return " ".join(map(str, self.trained_steps or (self.steps,)))

    def is_trained_for(self, steps: int) -> bool:
        """Whether it was distilled to be sampled in so many steps."""
        return steps == self.steps or steps in self.trained_steps

    def timesteps_for(self, steps: int | None = None) -> list[int]:
        """The trained timesteps, or for another number of steps those of its ladder."""
        if steps is None or steps == self.steps:
            return list(self.timesteps)
        return ladder_timesteps(self.ladder, steps, self.t_init)

    def for_architecture(self, architecture: Architecture) -> SiDRecipe:
        """The same chain for a generator of which nothing but its architecture is known."""
        size = architecture.variant(self.prediction_type).resolution
        facts: dict[str, Any] = {"architecture": architecture.name, "base_model": architecture.base_model}
        return replace(self, training_resolution=(size, size), **facts)

    @property
    def format_version(self) -> int:
        """The oldest that can say this recipe: 2 knows other families' chains, 3 SD 1.x and 2.x, networks that predict
        x0 and those that are told other timesteps.
        """
        is_newest = self.prediction_type == X0 or self.timestep_scale != 1 or self.ladder == "quarters"
        if is_newest or "sid.architecture" in self._architecture_keys():
            return 3
        known = self.ladder in ("sid", "explicit") and self.noise_mode in SID_NOISE_MODES
        return 1 if known and self.steps <= MAX_SID_STEPS else 2

    # -- files ---------------------------------------------------------------------------------------------------

    def to_metadata(self) -> dict[str, str]:
        """Flat string metadata for a safetensors header: ``sid.*`` and the ``modelspec.*`` that other tools read."""
        height, width = self.training_resolution
        metadata = {
            "sid.format_version": str(self.format_version),
            "sid.base_model": self.base_model,
            "sid.base_model_hash": self.base_model_hash,
            "sid.prediction_type": self.prediction_type,
            "sid.zero_terminal_snr": _from_bool(self.zero_terminal_snr),
            "sid.steps": str(self.steps),
            "sid.t_init": str(self.t_init),
            "sid.ladder": self.ladder,
            "sid.timesteps": ",".join(map(str, self.timesteps)),
            "sid.noise_mode": self.noise_mode,
            "sid.unit_variance_start": _from_bool(self.unit_variance_start),
            "sid.training_resolution": f"{height}x{width}",
            "sid.licence": self.licence,
            "sid.unconditional": self.unconditional,
            "sid.guidance.strategy": self.guidance.strategy,
            "sid.guidance.fake_train": repr(float(self.guidance.fake_train)),
            "sid.guidance.fake_eval": repr(float(self.guidance.fake_eval)),
            "sid.guidance.teacher": repr(float(self.guidance.teacher)),
            "sid.training_summary": json.dumps(dict(self.training_summary), sort_keys=True),
            "sid.sampling.guidance": self.sampling_guidance,
            "sid.sampling.cfg": repr(float(self.sampling_cfg)),
            "modelspec.sai_model_spec": SAI_MODEL_SPEC,
            **self._architecture_keys(),
            "modelspec.title": self.title or self.default_title,
            "modelspec.description": self.description,
            "modelspec.tags": ", ".join(self._tags()),
            "modelspec.base_model": self.base_model,
            "modelspec.resolution": f"{width}x{height}",
            "modelspec.license": self.licence,
        }
        if self.noise_mode == "tcd":
            metadata["sid.noise_gamma"] = repr(float(self.noise_gamma))
        if self.trained_steps:
            metadata["sid.trained_steps"] = ",".join(map(str, self.trained_steps))
        if self.timestep_scale != 1:
            metadata["sid.timestep_scale"] = repr(float(self.timestep_scale))
        if (key := PREDICT_KEYS.get(self.prediction_type)) is not None:
            # The second is the standard's own word for it, the first that of the tools that came before it was one.
            metadata |= {"modelspec.predict_key": key, "modelspec.prediction_type": key}
        return metadata

    def _tags(self) -> list[str]:
        known = STABLE_DIFFUSION.get(split_architecture(self.architecture)[0])
        return [*(["text-to-image", known.people] if known else []), "distilled", "few-step", f"{self.steps}-step"]

    def _architecture_keys(self) -> dict[str, str]:
        name, is_lora = split_architecture(self.architecture)
        known = STABLE_DIFFUSION.get(name)
        if known is None:
            return {"modelspec.architecture": self.architecture, "modelspec.implementation": OTHER_IMPLEMENTATION}
        word = known.variant(self.prediction_type).spec
        keys = {
            "modelspec.architecture": word + LORA_SUFFIX * is_lora,
            "modelspec.implementation": known.implementation,
        }
        return keys if known is SDXL else {"sid.architecture": name, **keys}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str] | None, source: str | Path) -> SiDRecipe:
        """Reads what ``to_metadata`` wrote. ``source`` names the file in errors (RecipeError).

        ``sid.*`` says all that sampling needs: model managers drop ``modelspec.*``, or write words of their own there.
        """
        reader = _Reader(metadata or {}, str(source))
        version = reader.number("sid.format_version", int)
        if version < 1:
            raise reader.error("sid.format_version", f"expected 1 to {FORMAT_VERSION}, got {version}")
        if version > FORMAT_VERSION:
            raise reader.error(
                "sid.format_version", f"expected at most {FORMAT_VERSION}, got {version}: update ComfyUI-SiD"
            )
        timesteps = reader.integers("sid.timesteps", ",")
        steps = reader.number("sid.steps", int)
        if steps != len(timesteps):
            raise reader.error("sid.steps", f"expected {len(timesteps)}, the number of sid.timesteps, got {steps}")
        resolution = reader.integers("sid.training_resolution", "x")
        if len(resolution) != 2:
            raise reader.error("sid.training_resolution", f"expected HEIGHTxWIDTH, got {resolution}")
        facts: dict[str, Any] = {
            "base_model": reader.text("sid.base_model"),
            "architecture": _architecture(reader),
            "prediction_type": reader.text("sid.prediction_type"),
            "zero_terminal_snr": reader.boolean("sid.zero_terminal_snr"),
            "timesteps": timesteps,
            "t_init": reader.number("sid.t_init", int),
            "trained_steps": reader.integers("sid.trained_steps", ",", ""),
            "ladder": reader.text("sid.ladder"),
            "noise_mode": reader.text("sid.noise_mode"),
            "noise_gamma": reader.number("sid.noise_gamma", float, str(DEFAULT_GAMMA)),
            "unit_variance_start": reader.boolean("sid.unit_variance_start"),
            "timestep_scale": reader.number("sid.timestep_scale", float, "1.0"),
            "training_resolution": (resolution[0], resolution[1]),
            "base_model_hash": reader.text("sid.base_model_hash"),
            "licence": reader.text("sid.licence"),
            "title": reader.text("modelspec.title", ""),
            "unconditional": reader.text("sid.unconditional"),
            "guidance": TrainingGuidance(
                strategy=reader.text("sid.guidance.strategy"),
                fake_train=reader.number("sid.guidance.fake_train", float),
                fake_eval=reader.number("sid.guidance.fake_eval", float),
                teacher=reader.number("sid.guidance.teacher", float),
            ),
            "sampling_guidance": reader.text("sid.sampling.guidance", "none"),
            "sampling_cfg": reader.number("sid.sampling.cfg", float, "1.0"),
            "training_summary": reader.mapping("sid.training_summary"),
        }
        try:
            recipe = cls(**facts)
        except RecipeError as error:
            raise RecipeError(f"{source}: {shown(error, SHOWN)}") from None
        return replace(recipe, title="") if recipe.title == recipe.default_title else recipe

    def describe(self) -> str:
        """The recipe for people: a line a fact, what matters for sampling first. What strangers wrote is escaped and
        cut to a length that a line can have.
        """
        facts = sorted(self.training_summary.items())
        rows: list[tuple[str, Any]] = [
            ("title", self.title or self.default_title),
            ("timesteps", " ".join(map(str, self.timesteps)) + f"  ({self.ladder} ladder from {self.t_init})"),
            *([("trained for", f"{self.trained_numbers} steps")] if self.trained_steps else []),
            *([("sigmas", self._sigmas())] if self.prediction_type != FLOW else []),
            *([("the network is told", self._told())] if self.timestep_scale != 1 else []),
            (
                "noise mode",
                self.noise_mode
                + f" (gamma {self.noise_gamma:g})" * (self.noise_mode == "tcd")
                + ", first noise of unit variance" * self.unit_variance_start,
            ),
            ("sample with guidance", f"{self.sampling_guidance} (CFG {self.sampling_cfg:g})"),
            (
                "trained with guidance",
                f"{self.guidance.strategy} (teacher {self.guidance.teacher:g}, fake score trained at "
                f"{self.guidance.fake_train:g} and evaluated at {self.guidance.fake_eval:g})",
            ),
            ("prediction type", self.prediction_type + (", zero terminal SNR" * self.zero_terminal_snr)),
            ("architecture", self.architecture),
            ("base model", self.base_model),
            ("base model hash", self.base_model_hash or "unknown"),
            ("training resolution", "x".join(map(str, self.training_resolution))),
            ("unconditional", self.unconditional),
            ("licence", self.licence or "not stated"),
            *((f"training: {shown(key, 60)}", value) for key, value in facts[:MAX_FACTS]),
            *([("training", f"{len(facts) - MAX_FACTS:,} more facts")] if len(facts) > MAX_FACTS else []),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {shown(value)}" for name, value in rows)

    def _sigmas(self) -> str:
        sigmas = VPSchedule.sdxl(self.zero_terminal_snr).sigma(torch.tensor(self.timesteps))
        return " ".join(f"{s:.4f}" for s in sigmas.tolist())

    def _told(self) -> str:
        told = " ".join(str(math.floor(t * self.timestep_scale)) for t in self.timesteps)
        return f"timesteps {told}  (scaled by {self.timestep_scale:g})"

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        values["guidance"] = dict(vars(self.guidance))
        values["training_summary"] = dict(self.training_summary)
        return values | {"steps": self.steps}


def has_recipe(metadata: Mapping[str, str] | None) -> bool:
    return any(key.startswith("sid.") for key in metadata or {})


def read_recipe(path: str | Path) -> SiDRecipe:
    """The recipe in a safetensors file; RecipeError where there is none."""
    return SiDRecipe.from_metadata(read_safetensors_metadata(path), path)


def _preset(timesteps: tuple[int, ...], **facts: Any) -> SiDRecipe:
    values: dict[str, Any] = {"timesteps": timesteps, "t_init": timesteps[0], "ladder": "explicit"}
    return SiDRecipe(**values | facts)


def _of_ladder(ladder: str, steps: int, **facts: Any) -> SiDRecipe:
    return _preset(tuple(ladder_timesteps(ladder, steps, 999)), ladder=ladder, **facts)


# For files that carry no recipe: how the publishers of each kind say that they are to be sampled.
PRESETS: dict[str, SiDRecipe] = {
    "SiD 625 (4 steps)": _preset((625, 468, 312, 156), ladder="sid"),
    "SiD 625 (2 steps)": _preset((625, 312), ladder="sid"),
    "SiD 625 (1 step)": _preset((625,), ladder="sid"),
    "SiD 999 (4 steps)": _preset((999, 749, 499, 249), ladder="sid"),
    "SiD 999 (2 steps)": _preset((999, 499), ladder="sid"),
    "SiD 999 (1 step)": _preset((999,), ladder="sid"),
    "DMD2 (4 steps)": _preset((999, 749, 499, 249), unit_variance_start=True),
    "DMD2 (1 step)": _preset((399,), unit_variance_start=True),
    "DMD2 SD 1.5 (1 step)": _preset((999,), unit_variance_start=True),
    "LCM (4 steps)": _of_ladder("consistency", 4, unit_variance_start=True),
    "LCM (8 steps)": _of_ladder("consistency", 8, unit_variance_start=True),
    "Lightning (8 steps)": _of_ladder("trailing", 8, noise_mode="ddim"),
    "Lightning (4 steps)": _of_ladder("trailing", 4, noise_mode="ddim"),
    "Lightning (2 steps)": _of_ladder("trailing", 2, noise_mode="ddim"),
    "Lightning (1 step)": _preset((999,), prediction_type=X0),
    "Hyper-SD (8 steps)": _of_ladder("trailing", 8, noise_mode="ddim", unit_variance_start=True),
    "Hyper-SD (4 steps)": _of_ladder("trailing", 4, noise_mode="ddim", unit_variance_start=True),
    "Hyper-SD (2 steps)": _of_ladder("trailing", 2, noise_mode="ddim", unit_variance_start=True),
    "Hyper-SD (1 step)": _preset((800,), unit_variance_start=True),
    "Turbo (4 steps)": _of_ladder("turbo", 4, noise_mode="ancestral"),
    "Turbo (1 step)": _of_ladder("turbo", 1, noise_mode="ancestral"),
    "TCD (4 steps)": _of_ladder("consistency", 4, noise_mode="tcd", unit_variance_start=True),
    "TCD (8 steps)": _of_ladder("consistency", 8, noise_mode="tcd", unit_variance_start=True),
    "PCM (16 steps)": _of_ladder("trailing", 16, noise_mode="ddim", unit_variance_start=True),
    "PCM (8 steps)": _of_ladder("trailing", 8, noise_mode="ddim", unit_variance_start=True),
    "PCM (4 steps)": _of_ladder("trailing", 4, noise_mode="ddim", unit_variance_start=True),
    "PCM (2 steps)": _of_ladder("trailing", 2, noise_mode="ddim", unit_variance_start=True),
    "Flash (4 steps)": _of_ladder("consistency", 4, unit_variance_start=True),
    "NitroFusion Realism (4 steps)": _of_ladder("quarters", 4, unit_variance_start=True, timestep_scale=0.25),
    "NitroFusion Realism (1 step)": _of_ladder("quarters", 1, unit_variance_start=True, timestep_scale=0.25),
    "NitroFusion Vibrant (4 steps)": _of_ladder("quarters", 4, unit_variance_start=True, timestep_scale=0.5),
    "NitroFusion Vibrant (1 step)": _of_ladder("quarters", 1, unit_variance_start=True, timestep_scale=0.5),
}


def _architecture(reader: _Reader) -> str:
    """What ``sid.architecture`` says, else SDXL. ``modelspec.architecture``, in which every tool has its own words, is
    read for whether the file is a LoRA, and for families that are ours alone.
    """
    text = reader.text("modelspec.architecture", "")
    name = reader.text("sid.architecture", "")
    if not name and text and reader.text("modelspec.implementation", "") == OTHER_IMPLEMENTATION:
        return text
    if name and name not in STABLE_DIFFUSION:
        raise reader.error("sid.architecture", f"expected one of {', '.join(STABLE_DIFFUSION)}, got {name!r}")
    return (name or SDXL.name) + LORA_SUFFIX * split_architecture(text)[1]


def _from_bool(value: bool) -> str:
    return "true" if value else "false"


class _Reader:
    """Typed access to string metadata; errors name the file and the key."""

    def __init__(self, metadata: Mapping[str, str], source: str):
        self.metadata, self.source = metadata, source

    def error(self, key: str, problem: str) -> RecipeError:
        return RecipeError(f"{self.source}: {key}: {shown(problem, SHOWN)}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if value is None:
            hint = "" if has_recipe(self.metadata) else " (the file carries no SiD recipe: choose a preset for it)"
            raise self.error(key, f"expected in the file's metadata, but it is missing{hint}")
        if not isinstance(value, str):  # a hand-made header
            raise self.error(key, f"expected text, got {value!r}")
        return value

    def number(self, key: str, kind: type, default: str | None = None) -> Any:
        text = self.text(key, default)
        try:
            return kind(text)
        except ValueError:
            raise self.error(key, f"expected {_NUMBER_NAMES[kind]}, got {text!r}") from None

    def integers(self, key: str, separator: str, default: str | None = None) -> tuple[int, ...]:
        text = self.text(key, default)
        try:
            return tuple(int(part) for part in text.split(separator)) if text != default else ()
        except ValueError:
            raise self.error(key, f"expected integers joined by {separator!r}, got {text!r}") from None

    def boolean(self, key: str) -> bool:
        text = self.text(key)
        if text not in ("true", "false"):
            raise self.error(key, f"expected true or false, got {text!r}")
        return text == "true"

    def mapping(self, key: str) -> dict[str, str]:
        text = self.text(key)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
            raise self.error(key, f"expected a JSON object of strings, got {text!r}")
        return value


_NUMBER_NAMES = {int: "an integer", float: "a number"}
