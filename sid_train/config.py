"""One configuration: dataclasses, filled by a TOML file and ``--set section.key=value`` overrides."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from . import configs
from .core.recipe import Unconditional
from .data.config import DataConfig
from .files.reading import half_character, other_kind, read_text, reading, shown
from .method.config import GANConfig, MethodConfig
from .method.methods import METHODS
from .models.adapter_config import AdapterConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SIZE_LIMIT = 64 << 10
"""Bytes of a configuration's file."""
DOTS_LIMIT = 1000
"""In a line of it: the parser's time grows with the square of the parts of a key."""
LARGEST = 2**63 - 1
"""What an integer may be: TOML promises no more, and neither does PyTorch."""


@dataclass
class ModelConfig:
    """The model that is distilled, and what the networks start from."""

    teacher: str = "demo"
    """The model to distil: a .safetensors file, diffusers folder or hub id of SDXL, SD 1.x or 2.x; or 'demo', the
    embedded one."""
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto"
    """What the teacher predicts, where its files do not say it; auto: what they say, epsilon if they say nothing."""
    resolution: int = 0
    """Height and width in pixels of what is generated; 0 is the model's own: 1,024 for SDXL, 512 for SD 1.x and 2.x,
    768 for SD 2.x where it predicts v."""
    init_generator: str = ""
    """A SiD generator of the same architecture to start from (SiD2a); empty: start from the teacher."""
    unconditional: Unconditional = "empty"
    """The embedding of no text: empty encodes "" (ComfyUI's way), zeros is diffusers' default for SDXL."""
    frozen_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type of weights that are not trained: the teacher's, which under adapters are those of all networks."""


@dataclass
class OptimizerConfig:
    """Adam for both networks and the generator's running average."""

    kind: Literal["adam", "adam8bit"] = "adam"
    """adam8bit: bitsandbytes' Adam with 8-bit states; needs pip install bitsandbytes."""
    generator_lr: float = 1e-6
    """Learning rate of the generator."""
    fake_score_lr: float = 1e-6
    """Learning rate of the fake score."""
    beta1: float = 0.0
    """Adam's first decay; 0 in the SiD family."""
    beta2: float = 0.999
    """Adam's second decay."""
    eps: float = 1e-8
    """Adam's epsilon; 1e-4 in pure bf16 (SiD-DiT)."""
    clip_norm: float = 0.0
    """Largest norm of a network's gradient; 0 does not clip."""
    skip_norm: float = 0.0
    """A step whose gradient's norm is this many times the median of the network's last 100 steps is skipped, and said:
    one such step makes all that follow too small for thousands of iterations, through Adam's second moment. 0 skips
    none."""
    warmup: int = 0
    """Iterations over which both learning rates rise from 0."""
    cooldown: float = 0.0
    """Share of the iterations, at the end, over which both learning rates fall linearly to 0."""
    ema_halflife_images: float = 50_000
    """Half-life of the generator's running average, in images; 0 averages nothing (SiD-DiT)."""
    ema_rampup: float = 0.05
    """The half-life is at most this share of the images seen."""

    def __post_init__(self) -> None:
        for name in ("generator_lr", "fake_score_lr", "eps", "ema_rampup"):
            if not getattr(self, name) > 0:
                raise ValueError(f"optimizer.{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optimizer.{name}: expected 0 to below 1, got {getattr(self, name)}")
        if not 0 <= self.cooldown <= 1:
            raise ValueError(f"optimizer.cooldown: expected 0 to 1, got {self.cooldown}")
        if self.skip_norm and not self.skip_norm > 1:
            raise ValueError(f"optimizer.skip_norm: expected more than 1, or 0 for none, got {self.skip_norm}")
        for name in ("clip_norm", "warmup", "ema_halflife_images"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"optimizer.{name}: expected 0 or more, got {getattr(self, name)}")

    def rate_factor(self, iteration: int, iterations: int) -> float:
        """By which the learning rates are multiplied after ``iteration`` of the run's ``iterations``."""
        factor = min(1.0, (iteration + 1) / self.warmup) if self.warmup else 1.0
        if self.cooldown:
            factor *= min(1.0, (iterations - iteration) / (self.cooldown * iterations))
        return factor


@dataclass
class TrainingConfig:
    """How long, how large and in which precision a run trains, and what it keeps and shows."""

    iterations: int = 1000
    """Rounds of the method: fake_score_updates of the fake score, then one of the generator."""
    batch_size: int = 32
    """Images in one update, over all processes together."""
    accumulate: int = 1
    """Micro-batches that each process splits its share of an update into, to save memory."""
    sharding: Literal["none", "full"] = "none"
    """How several processes hold whole networks. none: every process all of them (DDP); full: each its part of every
    weight, gradient, average and optimizer state (FSDP2), with checkpoints in parts. One process holds all either way;
    adapters are small: none."""
    fake_score_updates: int = 1
    """Updates of the fake score for each of the generator."""
    generator_start_images: int = 0
    """The fake score, which is the discriminator too, learns alone for this many images first."""
    gradient_checkpointing: bool = False
    """Keep only the blocks' inputs and compute the rest again in the backward pass: less memory, a third more time."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """no: fp32; bf16: autocast. fp16 is not offered: the method diverges in it."""
    seed: int = 0
    """Every random number of the run follows from it."""
    log_every: int = 20
    """Iterations between log lines."""
    grid_every: int = 0
    """Iterations between image grids; 0 makes none."""
    checkpoint_every: int = 200
    """Iterations between checkpoints."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, the last one included: if it is damaged, the run goes on from the one before."""
    snapshot_every: int = 0
    """Iterations between copies of the averaged generator that are kept, for ``export --iteration``; 0 keeps none."""
    clip_model: str = ""
    """A CLIP model, as a folder or hub id such as openai/clip-vit-large-patch14, that scores each snapshot on the CPU:
    what is exported in the end is the one with the highest score. Empty: it is the last."""
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    """Where losses and grids are logged besides the run folder."""

    def __post_init__(self) -> None:
        at_least_1 = ("iterations", "batch_size", "accumulate", "fake_score_updates", "log_every", "checkpoint_every")
        for name in (*at_least_1, "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"training.{name}: expected 1 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"training.seed: expected 0 to {2**32 - 1}, got {self.seed}")
        for name in ("generator_start_images", "grid_every", "snapshot_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"training.{name}: expected 0 or more, got {getattr(self, name)}")
        if self.clip_model and not self.snapshot_every:
            raise ValueError(
                "training.clip_model: unused while training.snapshot_every is 0: set it, or drop the model"
            )
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"training.accumulate: expected a divisor of training.batch_size ({self.batch_size}), "
                f"got {self.accumulate}"
            )


# A run may be resumed with other values of these: how long and how carefully it goes on, how far back its average
# looks, what is kept and reported, how much memory a batch takes.
FREE_KEYS = {
    "optimizer.generator_lr",
    "optimizer.fake_score_lr",
    "optimizer.clip_norm",
    "optimizer.skip_norm",
    "optimizer.warmup",
    "optimizer.cooldown",
    "optimizer.ema_halflife_images",
    "optimizer.ema_rampup",
    "training.iterations",
    "training.accumulate",
    "training.gradient_checkpointing",
    "training.log_every",
    "training.grid_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "training.snapshot_every",
    "training.clip_model",
    "training.tracker",
}
# And of these, which say where something is: a run knows its teacher, prompts and pairs by what they are.
SOURCE_KEYS = {"model.teacher", "model.init_generator", "data.prompts", "data.pairs", "data.cache"}


@dataclass
class Config:
    """Everything about a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    gan: GANConfig = field(default_factory=GANConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        if self.method.kind not in METHODS:
            raise ValueError(f"method.kind: expected one of {', '.join(METHODS)}, got {self.method.kind!r}")
        METHODS[self.method.kind].check(self)
        if self.data.buckets and not self.data.pairs:
            raise ValueError("data.buckets: unused without real pairs: set data.pairs, or buckets to false")
        changed = [f.name for f in dataclasses.fields(GANConfig) if getattr(self.gan, f.name) != f.default]
        if changed and not self.gan.enabled:
            raise ValueError(f"gan.{changed[0]}: unused while gan.generator_weight is 0")
        if self.adapter.targets != "all" and not self.adapter.rank:
            raise ValueError("adapter.targets: unused while adapter.rank is 0: set the rank, or drop the targets")
        if self.training.sharding == "full" and self.adapter.rank:
            raise ValueError(
                "training.sharding: 'full' is for whole networks, and adapter.rank is not 0: set it to none"
            )
        if self.training.sharding == "full" and self.optimizer.kind == "adam8bit":
            raise ValueError("training.sharding: 'full' does not go with optimizer.kind adam8bit: use adam, or none")
        if self.method.matching == "final" and self.method.steps == 1:
            raise ValueError("method.matching: 'final' is the same as 'uniform' at one step: use uniform")

    def flat(self) -> dict[str, Any]:
        """``{"section.key": value}``, in order."""
        return {
            f"{section.name}.{f.name}": getattr(getattr(self, section.name), f.name)
            for section in dataclasses.fields(self)
            for f in dataclasses.fields(getattr(self, section.name))
        }

    def to_toml(self) -> str:
        lines = []
        for section in dataclasses.fields(self):
            lines.append(f"[{section.name}]")
            values = dataclasses.asdict(getattr(self, section.name))
            lines += [f"{key} = {_toml_value(value)}" for key, value in values.items()]
            lines.append("")
        return "\n".join(lines)


def _toml_value(value: str | int | float | bool) -> str:
    """A value as TOML writes it: as JSON does, but for DEL, which TOML wants escaped like every control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_toml(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file, with or without a byte order mark; ValueError names the file."""
    with reading(path, "a configuration in TOML"):
        text = read_text(path, SIZE_LIMIT)
        if any(line.count(".") > DOTS_LIMIT for line in text.splitlines()):
            raise RecursionError
        try:
            values = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            reason = other_kind(text[:50].encode()) or error
            raise ValueError(f"{shown(path)}: not valid TOML: {shown(reason)}") from None
        for name, table in values.items():
            if not isinstance(table, dict):
                raise ValueError(
                    f"{shown(path)}: unknown section [{shown(name, 60)}]: expected tables, "
                    f"{', '.join(config_sections())}, got {_told(table)} outside of them"
                )
        return values


def load_config(name: str | None = None, overrides: list[str] | None = None) -> Config:
    """A TOML file's configuration, or one that ships, with ``section.key=value`` overrides on top."""
    values: dict[str, dict[str, Any]] = {}
    source = "--set"
    if name is not None:
        path = Path(name) if name.lower().endswith(".toml") else configs.path_of(name)
        if not path.exists():
            other = f"{name!r} does not end in .toml" if Path(name).exists() else f"no such file: {name!r}"
            raise ValueError(f"--config: expected a .toml file or one of {', '.join(configs.shipped())}; {other}")
        values, source = read_toml(path), shown(path)
    flat = Config().flat()
    for text in overrides or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set: expected section.key=value, got {_told(text)}")
        section, _, name_ = key.partition(".")
        check_key(key, flat, "--set")
        values.setdefault(section, {})[name_] = _parse_value(value, isinstance(flat[key], str))
    return config_from_dict(values, f"{source} with --set" if name and overrides else source)


def _parse_value(text: str, is_text: bool) -> Any:
    """What ``--set`` gives a key: text as it is, else JSON; what is none is told by its type's check."""
    if is_text:
        return text
    try:
        return json.loads(text.replace("_", ""))
    except (ValueError, RecursionError):
        return text


def _told(value: Any) -> str:
    """A value in an error, in one line of bounded length."""
    try:
        return shown(repr(value), 100)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists in lists
        kinds = {int: "an integer", list: "a list", dict: "a table"}
        return f"{kinds.get(type(value), 'a value')} that is too large to show"


def check_key(key: str, known: dict[str, Any], source: str) -> None:
    if key not in known:
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]}?" if close else f"; the sections are {', '.join(config_sections())}"
        raise ValueError(f"{source}: unknown key {_told(key)}{hint}")


def config_sections() -> list[str]:
    """The names of the tables in a configuration."""
    return [f.name for f in dataclasses.fields(Config)]


def config_from_dict(values: dict[str, dict[str, Any]], source: str) -> Config:
    """A Config from nested tables, every key and type checked; ValueError names ``source``."""
    known = Config().flat()
    types = get_type_hints(Config)
    sections = {}
    for section, table in values.items():
        if section not in types or not isinstance(table, dict):
            raise ValueError(f"{source}: unknown section [{shown(section, 60)}]; expected {', '.join(types)}")
        hints = get_type_hints(types[section])
        for key, value in table.items():
            check_key(f"{section}.{key}", known, source)
            table[key] = _checked(value, hints[key], f"{source}: {section}.{key}")
        try:
            sections[section] = types[section](**table)
        except ValueError as error:
            raise ValueError(f"{source}: {shown(error, 1000)}") from None
    try:
        return Config(**sections)
    except ValueError as error:
        raise ValueError(f"{source}: {shown(error, 1000)}") from None


def _checked(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where}: expected one of {', '.join(map(str, get_args(kind)))}, got {_told(value)}")
        return value
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(value, (int, float) if kind is float else kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {names[kind]}, got {_told(value)}")
    if whole and not -LARGEST <= value <= LARGEST:
        raise ValueError(f"{where}: expected at most {LARGEST:,}, got {_told(value)}")
    if kind is float:
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"{where}: expected a finite number, got {value}")
    if kind is str:
        _require_storable(value, where)
    return value


def _require_storable(text: str, where: str) -> None:
    """ValueError for text that no TOML file and no file's name can hold."""
    if half_character(text) >= 0:
        raise ValueError(
            f"{where}: expected text in UTF-8, got {_told(text)}: rename the file, or correct the encoding"
        )
    if "\0" in text:
        raise ValueError(f"{where}: expected text without the character 0, got {_told(text)}")
