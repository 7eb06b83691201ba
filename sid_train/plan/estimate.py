"""From the trace of a micro-batch to a run: memory, network calls, FLOPs, disk, and what would make it fit."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import Config, config_from_dict
from ..data.pictures import expand_braces, open_pictures
from ..data.rows import EAGER_LIMIT, prompts_of
from ..files.tensors import DTYPES
from ..models.bundle import ModelShapes, count_parameters
from ..models.families import model_shapes, shipped_by
from .trace import (
    BACKWARD,
    INPUTS,
    OPTIMIZER_STEP,
    PICTURES,
    VAE_ACTIVATIONS,
    VAE_WEIGHTS,
    Call,
    Role,
    Trace,
    encodes_pairs,
    makes_pictures,
    trace_iteration,
)

GIB = 2**30
FP32 = 4  # bytes

# bitsandbytes' blockwise states: a byte an element and an fp32 scale a block; small tensors keep fp32 states.
ADAM8BIT_BLOCK, ADAM8BIT_SMALLEST = 256, 4096


@dataclass(frozen=True)
class Hardware:
    """``memory``: GiB of each GPU, of which ``reserve`` are left for what is not counted."""

    gpus: int
    memory: float
    reserve: float

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"--gpus: expected 1 or more, got {self.gpus}")
        if not 0 <= self.reserve < self.memory:
            raise ValueError(
                f"--gpu-memory, --reserve: expected 0 <= reserve < memory, got {self.reserve:g} and {self.memory:g}"
            )


@dataclass(frozen=True)
class RoleMemory:
    """Bytes of one network on each GPU; ``activations`` are those that live at the peak."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int


@dataclass(frozen=True)
class NetworkCalls:
    """Calls of one network in one part of an iteration, on each GPU: the mean over the step that is drawn."""

    update: str
    role: Role
    calls: float
    pictures: int
    encoder_only: bool
    with_gradient: bool


@dataclass(frozen=True)
class Plan:
    """What a run needs. Memory and disk in bytes; per GPU where nothing else is said."""

    model: str
    gpus: int
    gpu_memory: float
    sharding: str
    batch_size: int
    micro_batch: int
    accumulate: int
    roles: dict[str, RoleMemory]
    other: dict[str, int]
    phases: dict[str, int]
    peak: int
    peak_phase: str
    fits: bool
    calls: list[NetworkCalls]
    flops_per_iteration: int
    forward_flops: int
    checkpoint: int
    snapshots: int
    cache: int | None
    cache_per_prompt: int
    iterations: int


@dataclass(frozen=True)
class Change:
    """What makes a run fit, as ``--set`` takes it, and the peak that it then has."""

    settings: tuple[str, ...]
    peak: int


class Planner:
    """Plans of one model; traces and the sizes of its data are kept, since several plans share them."""

    def __init__(self, shapes: ModelShapes, progress: bool = False):
        self.shapes, self.progress = shapes, progress
        self._traces: dict[tuple, Trace] = {}
        self._counts: dict[tuple, int | None] = {}

    def plan(self, config: Config, hardware: Hardware) -> Plan:
        """ValueError for a batch that cannot be divided."""
        training = config.training
        parts = hardware.gpus * training.accumulate
        if training.batch_size % parts:
            raise ValueError(
                f"training.batch_size: expected a multiple of {hardware.gpus} GPU(s) times {training.accumulate} "
                f"micro-batch(es), got {training.batch_size}"
            )
        sharded = training.sharding == "full" and hardware.gpus > 1
        trace = self._trace(config, training.batch_size // parts, sharded)
        factors, fixed = _sharded(trace, self.shapes, config, hardware.gpus) if sharded else _whole(trace, config)
        prompts = self._count(_count_prompts, config.data.prompts)
        encoded = [] if config.data.cache else [prompts, self._count(_count_pairs, config.data.pairs)]
        fixed |= _beside(self.shapes, config, encoded)
        if hardware.gpus > 1 and not sharded:
            fixed["DDP's gradient buckets"] = FP32 * sum(trace.parameters[role] for role in trace.trained)

        # Each GPU's bytes after each event of the trace.
        live = trace.live(factors) + sum(fixed.values())
        if sharded:  # while pictures are made there are no gradients
            for name in PICTURES & trace.phases.keys():
                begin, end = trace.phases[name]
                live[begin:end] -= fixed["gradients"]
        phases = {name: int(live[begin:end].max()) for name, (begin, end) in trace.phases.items() if end > begin}
        peak_phase = max(phases, key=lambda name: phases[name])
        begin, end = trace.phases[peak_phase]
        at_peak = trace.breakdown(begin + int(live[begin:end].argmax()))
        at_peak = {label: round(size * factors.get(label, 1)) for label, size in at_peak.items()}
        if peak_phase in PICTURES:
            fixed.pop("gradients", None)
        roles, other = _by_role(trace, at_peak, fixed)
        per_prompt = FP32 * sum(map(_elements, self.shapes.conditioning.values()))
        ema = FP32 * trace.parameters["EMA"]
        states = FP32 * 2 * sum(trace.parameters[role] for role in trace.trained)
        if config.optimizer.kind == "adam8bit":
            states = sum(adam8bit_states(trace.trained_shapes[role]) for role in trace.trained)
        return Plan(
            model=self.shapes.name,
            gpus=hardware.gpus,
            gpu_memory=hardware.memory,
            sharding="full" if sharded else "none",
            batch_size=training.batch_size,
            micro_batch=trace.micro_batch,
            accumulate=training.accumulate,
            roles=roles,
            other=other,
            phases=phases,
            peak=phases[peak_phase],
            peak_phase=peak_phase,
            fits=phases[peak_phase] <= (hardware.memory - hardware.reserve) * GIB,
            calls=_calls(trace, config),
            flops_per_iteration=hardware.gpus * _flops(trace, config),
            forward_flops=next(c.flops // c.pictures for c in trace.calls if c.role == "generator"),
            checkpoint=FP32 * sum(trace.parameters[role] for role in trace.trained) + ema + states,
            snapshots=ema * (training.iterations // training.snapshot_every) if training.snapshot_every else 0,
            cache=None if prompts is None else prompts * per_prompt,
            cache_per_prompt=per_prompt,
            iterations=training.iterations,
        )

    def _trace(self, config: Config, micro_batch: int, sharded: bool) -> Trace:
        training, compute_dtype = config.training, None
        if sharded:
            compute_dtype = torch.bfloat16 if training.mixed_precision == "bf16" else torch.float32
        # All that a trace depends on.
        key = (
            micro_batch,
            compute_dtype,
            min(training.accumulate, 2),
            training.fake_score_updates,
            training.gradient_checkpointing,
            training.mixed_precision,
            makes_pictures(training),
            encodes_pairs(config.data),
            str((config.model.frozen_dtype, config.adapter, config.method, config.gan)),
        )
        if key not in self._traces:
            if self.progress:
                print("tracing an iteration without data ...", file=sys.stderr, flush=True)
            self._traces[key] = trace_iteration(self.shapes, config, micro_batch, compute_dtype=compute_dtype)
        return self._traces[key]

    def _count(self, count: Callable[[str], int | None], source: str) -> int | None:
        key = (count, source)
        if key not in self._counts:
            self._counts[key] = count(source)
        return self._counts[key]

    def changes_that_fit(self, config: Config, hardware: Hardware) -> list[Change]:
        """Sets of changes, each of which makes the run fit: one that keeps what is trained, and one with adapters.

        What alters the result comes after what does not, and nothing is named that is not needed.
        """
        keeping: list[dict[str, Any]] = [
            {"training.accumulate": config.training.batch_size // hardware.gpus},
            {"training.gradient_checkpointing": True},
            {"training.mixed_precision": "bf16", "model.frozen_dtype": "bf16"},
            {"optimizer.kind": "adam8bit", "training.sharding": "none"},
        ]
        sets = [keeping]
        if not config.adapter.rank:
            if not config.model.init_generator:  # a whole one, which is no start for adapters
                sets.append([{"adapter.rank": 64, "training.sharding": "none"}, *keeping])
            if hardware.gpus > 1:
                sets.insert(0, [*keeping[:2], {"training.sharding": "full", "optimizer.kind": "adam"}, keeping[2]])
        found = []
        for candidates in sets:
            needed = self._needed(candidates, config, hardware)
            if needed is not None and (not found or needed.settings[0].startswith("adapter.")):
                found.append(needed)
        return found

    def _needed(self, candidates: list[dict[str, Any]], config: Config, hardware: Hardware) -> Change | None:
        """As few of ``candidates`` as make the run fit, None if all of them do not."""
        flat = config.flat()

        def plan(changes: list[dict[str, Any]]) -> tuple[dict[str, Any], Plan]:
            values = {k: v for change in changes for k, v in change.items() if flat[k] != v}
            return values, self.plan(_changed(config, values), hardware)

        chosen: list[dict[str, Any]] = []
        for change in candidates:
            chosen.append(change)
            if plan(chosen)[1].fits:
                break
        else:
            return None
        for change in chosen[:-1]:
            fewer = [c for c in chosen if c is not change]
            if plan(fewer)[1].fits:
                chosen = fewer
        values, fitting = plan(chosen)
        return Change(tuple(f"{key}={_toml(value)}" for key, value in values.items()), fitting.peak)


def make_planner(config: Config, progress: bool = False) -> Planner:
    model = config.model
    return Planner(model_shapes(model.teacher, model.resolution, model.prediction_type), progress)


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    values = dataclasses.asdict(config)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        values[section][name] = value
    return config_from_dict(values, "plan")


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- memory ------------------------------------------------------------------------------------------------------

Factors = dict[str, float]
"""By which a label's bytes in the trace are multiplied; 1 where there is none."""


def _whole(trace: Trace, config: Config) -> tuple[Factors, dict[str, int]]:
    """Every GPU holds whole networks, as the trace does."""
    factors: Factors = {VAE_WEIGHTS: 0}
    if config.optimizer.kind == "adam8bit":
        # Its kernels need a GPU, so it is Adam that was traced. They change weights and states in place.
        factors[OPTIMIZER_STEP] = 0
        for role in trace.trained:
            fp32_states = 2 * FP32 * trace.parameters[role]
            factors[f"{role}: optimizer states"] = adam8bit_states(trace.trained_shapes[role]) / fp32_states
    return factors, {}


def _sharded(trace: Trace, shapes: ModelShapes, config: Config, gpus: int) -> tuple[Factors, dict[str, int]]:
    """Every GPU holds its part of weights, gradients and states, and what is gathered of them in passing.

    The trace has the activations. Its weights and gradients are whole and in the type that is computed in, so they are
    left out, and the parts put in their place.
    """
    left_out = [f"{role}: {what}" for role in trace.roles for what in ("weights", "gradients", "optimizer states")]
    frozen = DTYPES[config.model.frozen_dtype].itemsize
    compute = DTYPES[config.training.mixed_precision.replace("no", "fp32")].itemsize
    fixed: dict[str, int] = {}
    for role, count in trace.parameters.items():
        fixed[f"{role}: weights"] = -(-count // gpus) * (frozen if role == "teacher" else FP32)
        if role in trace.trained:
            fixed[f"{role}: optimizer states"] = -(-count // gpus) * 2 * FP32
    blocks, rest = _block_sizes(shapes)
    # One update at a time has gradients. Those of all but an update's last micro-batch are added up whole, in fp32.
    count = trace.parameters["generator"]
    fixed["gradients"] = -(-count // gpus) * FP32 + (count * FP32 if config.training.accumulate > 1 else 0)
    # The block that computes and the next, a block's gradient, in fp32 too while it is averaged, and all the rest.
    fixed["gathered weights and gradients"] = (2 * blocks + rest) * compute + blocks * (compute + FP32) + rest * compute
    return dict.fromkeys([*left_out, OPTIMIZER_STEP, VAE_WEIGHTS], 0.0), fixed


def _block_sizes(shapes: ModelShapes) -> tuple[int, int]:
    """Parameters of the largest block that is gathered alone, and of all that is in none."""
    blocks = [count_parameters(block) for block in shapes.denoiser.blocks()]
    return max(blocks, default=0), count_parameters(shapes.denoiser) - sum(blocks)


def _beside(shapes: ModelShapes, config: Config, encoded: list[int | None]) -> dict[str, int]:
    """What stays on the device besides the networks. ``encoded``: how many texts of each kind the run itself encodes,
    None where that is not known.
    """
    fixed = {}
    if any(count is None or count > EAGER_LIMIT for count in encoded):
        fixed["text encoders"] = FP32 * shapes.text_parameters
    if shapes.vae is not None and (makes_pictures(config.training) or encodes_pairs(config.data)):
        fixed["VAE"] = FP32 * count_parameters(shapes.vae)
    return fixed


def _count_prompts(source: str) -> int | None:
    """None where they are not here."""
    if not shipped_by(source) and not Path(source).exists():
        return None
    return len(prompts_of(source))


def _count_pairs(source: str) -> int | None:
    """As ``_count_prompts``. The captions of pairs that ship are encoded once, at the start."""
    if not source or shipped_by(source):
        return 0
    if not all(Path(name).exists() for name in expand_braces(source)):
        return None
    return len(open_pictures(source))


def adam8bit_states(sizes: Iterable[int]) -> int:
    """Bytes of bitsandbytes' two states for parameters of these numbers of elements."""
    return sum(2 * FP32 * n if n < ADAM8BIT_SMALLEST else 2 * (n + FP32 * -(-n // ADAM8BIT_BLOCK)) for n in sizes)


def _by_role(
    trace: Trace, at_peak: dict[str, int], fixed: dict[str, int]
) -> tuple[dict[str, RoleMemory], dict[str, int]]:
    """The bytes at the peak, by network, and what belongs to none."""
    found = {label: at_peak.get(label, 0) + fixed.get(label, 0) for label in {**at_peak, **fixed}}
    roles = {
        role: RoleMemory(
            trace.parameters.get(role, 0),
            *(found.pop(f"{role}: {what}", 0) for what in ("weights", "gradients", "optimizer states", "activations")),
        )
        for role in trace.roles
    }
    order = [INPUTS, BACKWARD, OPTIMIZER_STEP, VAE_ACTIVATIONS, *fixed]
    return roles, {label: found[label] for label in order if found.get(label)}


def _elements(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


# -- calls and FLOPs ---------------------------------------------------------------------------------------------


def _one_pass(trace: Trace, config: Config, role: Role) -> list[Call]:
    """The calls of one micro-batch of an update."""
    calls = [call for call in trace.calls if call.phase == f"{role}: forward"]
    return calls[: len(calls) // min(config.training.accumulate, 2)]


def _missing_calls(trace: Trace, config: Config, role: Role) -> tuple[float, Call | None]:
    """How many more calls of the generator without gradient an update has on average than the trace, and one of them;
    None where an update has no such call.
    """
    calls = [c for c in _one_pass(trace, config, role) if c.role == "generator" and not c.with_gradient]
    return (trace.extra_calls, calls[0]) if calls else (0.0, None)


def _repeats(trace: Trace, config: Config, role: Role) -> int:
    """Micro-batches an iteration, on each GPU."""
    return config.training.accumulate * trace.repeats[role]


def _flops(trace: Trace, config: Config) -> int:
    """Of an iteration, on one GPU."""
    total = 0.0
    for role in trace.trained:
        more, call = _missing_calls(trace, config, role)
        total += _repeats(trace, config, role) * (trace.flops[role] + (more * call.flops if call else 0))
    return round(total)


def _calls(trace: Trace, config: Config) -> list[NetworkCalls]:
    found = []
    for update in trace.trained:
        more, missing = _missing_calls(trace, config, update)
        counts: dict[tuple, float] = {}
        for call in _one_pass(trace, config, update):
            key = (call.role, call.pictures, call.encoder_only, call.with_gradient)
            counts[key] = counts.get(key, 0) + 1
        if missing is not None:
            counts[(missing.role, missing.pictures, missing.encoder_only, missing.with_gradient)] += more
        for (role, pictures, encoder_only, with_gradient), count in counts.items():
            calls = count * _repeats(trace, config, update)
            found.append(NetworkCalls(update, role, calls, pictures, encoder_only, with_gradient))
    return found
