"""One iteration of a run, traced: the real networks, losses and backward passes, without data and without a GPU."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, autocast, nn

from ..config import Config, TrainingConfig
from ..core.rng import BatchRNG
from ..data.config import DataConfig
from ..method.base import Batch, Losses, Update, role_name
from ..method.methods import METHODS
from ..models.bundle import ModelShapes
from ..models.conditioning import Conditioning, RealBatch
from ..models.networks import Networks, build_networks
from ..sample import pictures_at_once
from ..training.setup import make_adam, make_ema, make_method
from ..training.update import Figures, run_update
from .tracker import Tracker, normalise_as_cuda

Device = Literal["cuda", "cpu"]
Role = str
"""``teacher``, ``EMA``, or the name of an update: ``generator``, ``fake score``."""

# What memory is for; parameters, gradients, optimizer states and activations come once a role.
INPUTS, BACKWARD, OPTIMIZER_STEP = "inputs", "backward pass", "optimizer step"
LATE = 2**62  # more images than any run sees
PICTURES = {"pictures: sampling", "pictures: decoding"}  # phases between two iterations
VAE_WEIGHTS, VAE_ACTIVATIONS = "VAE: weights", "VAE: activations"


@dataclass(frozen=True)
class Call:
    """One call of a network."""

    phase: str
    role: Role
    pictures: int
    encoder_only: bool
    with_gradient: bool
    flops: int


@dataclass
class Trace:
    """What happened in one micro-batch (two, where gradients are accumulated) of every part of an iteration.

    labels, events: as ``Tracker`` recorded them, ``events`` as an array [n, 2]
    phases: name -> its first event and the one after its last
    flops: FLOPs of a phase in one micro-batch, phases that update a network only
    """

    labels: list[str]
    events: np.ndarray
    phases: dict[str, tuple[int, int]]
    calls: list[Call]
    flops: dict[str, int]
    parameters: dict[Role, int]
    micro_batch: int
    trained_shapes: dict[Role, list[int]] = field(default_factory=dict)
    """The number of elements of every parameter that is trained, in the order of the updates."""

    repeats: dict[Role, int] = field(default_factory=dict)
    """How many updates of each network an iteration has."""
    extra_calls: float = 0.0
    """How many more calls of the generator without gradient an update has on average than were traced."""

    @property
    def trained(self) -> list[Role]:
        return list(self.trained_shapes)

    @property
    def roles(self) -> list[Role]:
        return ["teacher", *self.trained, "EMA"]

    def live(self, factors: dict[str, float] | None = None) -> np.ndarray:
        """Bytes after each event, each label's weighed by its factor (1 where there is none)."""
        weights = np.array([(factors or {}).get(label, 1.0) for label in self.labels])
        return np.cumsum(weights[self.events[:, 0]] * self.events[:, 1])

    def breakdown(self, event: int) -> dict[str, int]:
        """Bytes by label after one event."""
        part = self.events[: event + 1]
        sums = np.bincount(part[:, 0], weights=part[:, 1].astype(np.float64), minlength=len(self.labels))
        return {label: int(size) for label, size in zip(self.labels, sums, strict=True)}


def trace_iteration(
    shapes: ModelShapes,
    config: Config,
    micro_batch: int,
    device: Device = "cuda",
    compute_dtype: torch.dtype | None = None,
) -> Trace:
    """Traces an iteration of ``config`` with ``micro_batch`` pictures a pass, as ``device`` would run it.

    compute_dtype: of networks that are sharded: these gather their weights in it and are not autocast
    """
    return _Run(shapes, config, micro_batch, device, compute_dtype).trace()


class _Run:
    """The ``Passes`` of a trace: shapes without data instead of batches, one rank, phases that are recorded."""

    def __init__(
        self,
        shapes: ModelShapes,
        config: Config,
        micro_batch: int,
        device: Device,
        compute_dtype: torch.dtype | None,
    ):
        self.shapes, self.config, self.micro_batch, self.device = shapes, config, micro_batch, device
        self.denoiser = copy.deepcopy(shapes.denoiser)  # which becomes a network of the run
        self.tracker = Tracker()
        self.current = ""
        self.phases: dict[str, tuple[int, int]] = {}
        self.calls: list[Call] = []
        self.flops: dict[str, int] = {}
        self.networks = self._build(compute_dtype)
        self.is_autocast = config.training.mixed_precision == "bf16" and compute_dtype is None
        # A third micro-batch would be like the second, whose gradients are added up.
        self.micro_batches = min(config.training.accumulate, 2)

    def _build(self, compute_dtype: torch.dtype | None) -> Networks:
        config = self.config
        with torch.device("meta"):  # new adapters, too, take no memory
            networks = build_networks(
                self.denoiser,
                None,
                config.adapter,
                config.model.frozen_dtype,
                config.training.gradient_checkpointing,
                place=lambda network: None,
                trained=METHODS[config.method.kind].trained,
            )
            if compute_dtype is not None:
                for network in (*networks.trained.values(), networks.generator_ema, networks.teacher):
                    network.to(compute_dtype)
        return networks

    def trace(self) -> Trace:
        config, networks = self.config, self.networks
        with self.tracker:
            parameters = self._place_networks()
            self._watch_calls()
            if self.device == "cuda":
                normalise_as_cuda(self.denoiser, *(network for _, network in self._roles()))
            method = make_method(
                config,
                networks,
                self.denoiser.schedule,
                self._conditioning(1),
                self.shapes.latent_shape,
                wrapped=networks.trained,
            )
            step, extra_calls = method.planned_step()
            every = method.updates(step, images_seen=LATE)  # late enough for all that waits
            updates = {update.network: update for update in every}  # each network's once
            optimizers = {role: self._optimizer(role) for role in updates}
            ema = make_ema(config.optimizer, networks.generator_ema)
            for role, update in updates.items():
                foreach = self.device == "cuda"
                run_update(update, networks.trained[role], optimizers[role], self, config.optimizer.clip_norm, foreach)
            ema.update(networks.trained["generator"], config.training.batch_size, config.training.batch_size)
            self._pictures()
        return Trace(
            self.tracker.labels,
            np.array(self.tracker.events, dtype=np.int64),
            self.phases,
            self.calls,
            self.flops,
            parameters,
            self.micro_batch,
            {update.name: [p.numel() for p in networks.trained[role].parameters()] for role, update in updates.items()},
            Counter(update.name for update in every),
            extra_calls,
        )

    # -- networks ------------------------------------------------------------------------------------------------

    def _place_networks(self) -> dict[Role, int]:
        """Gives every parameter memory; returns their number by role. A role's own are those of its adapter."""
        placed: dict[int, tuple[Tensor, nn.Parameter]] = {}
        # The UNet under adapters is in none of the networks: it is the teacher's.
        counts = {role: self._place(network, f"{role}: weights", placed) for role, network in self._roles()}
        counts["teacher"] += self._place(self.denoiser, "teacher: weights", placed)
        for role, network in self._roles():
            for parameter in network.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(
                        lambda p, role=role: self.tracker.relabel([p.grad], f"{role}: gradients")
                    )
        return counts

    def _place(self, network: nn.Module, label: str, placed: dict[int, tuple[Tensor, nn.Parameter]]) -> int:
        """Replaces parameters on the meta device, those that modules share by the same one; returns the new ones'
        number of elements. ``placed``: id of the old -> the old (so that the id stays its own) and the new.
        """
        count = 0
        with self._labelled(label):
            for module in network.modules():
                for name, old in module._parameters.items():
                    if old is None or not old.is_meta:
                        continue
                    if id(old) not in placed:
                        placed[id(old)] = (old, nn.Parameter(self.tracker.empty(old), old.requires_grad))
                        count += old.numel()
                    module._parameters[name] = placed[id(old)][1]
        return count

    def _roles(self) -> list[tuple[Role, nn.Module]]:
        trained = [(role_name(role), network) for role, network in self.networks.trained.items()]
        return [*trained, ("EMA", self.networks.generator_ema), ("teacher", self.networks.teacher)]

    def _watch_calls(self) -> None:
        """Labels what a network's call allocates, and keeps a list of calls."""
        for role, network in self._roles():
            before: list[Any] = []

            def enter(module: nn.Module, args: tuple, role: Role = role, before: list[Any] = before) -> None:
                before[:] = self.tracker.label, self.tracker.flops
                self.tracker.label = f"{role}: activations"

            def leave(
                module: nn.Module, args: tuple, kwargs: dict, out: Any, role: Role = role, before: list[Any] = before
            ) -> None:
                self.tracker.label, flops = before
                call = (self.current, role, len(args[0]), kwargs.get("call") == "logits", torch.is_grad_enabled())
                self.calls.append(Call(*call, flops=self.tracker.flops - flops))

            network.register_forward_pre_hook(enter)
            network.register_forward_hook(leave, with_kwargs=True)

    def _optimizer(self, role: str) -> torch.optim.Optimizer:
        """Adam with its states, as it has them after the first step. 8-bit Adam's kernels need a GPU: what is traced
        for it is Adam, whose states ``estimate`` replaces.

        foreach is PyTorch's default on CUDA: one call for all parameters, with temporary copies.
        """
        network = self.networks.trained[role]
        config = replace(self.config.optimizer, kind="adam")
        optimizer = make_adam(config, role, network, foreach=self.device == "cuda")
        with self._labelled(OPTIMIZER_STEP):
            for parameter in network.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        states = [s for state in optimizer.state.values() for s in state.values() if isinstance(s, Tensor)]
        self.tracker.relabel(states, f"{role_name(role)}: optimizer states")
        return optimizer

    # -- data ----------------------------------------------------------------------------------------------------

    def _tensor(self, *shape: int) -> Tensor:
        with self._labelled(INPUTS):
            return self.tracker.empty(torch.empty(shape, device="meta"))

    def _conditioning(self, batch: int | None = None) -> Conditioning:
        shapes = self.shapes.conditioning
        return Conditioning(**{name: self._tensor(batch or self.micro_batch, *shape) for name, shape in shapes.items()})

    def _real(self) -> RealBatch:
        return RealBatch(self._tensor(self.micro_batch, *self.shapes.latent_shape), self._conditioning())

    # -- the passes of an update (``training.update.Passes``) ----------------------------------------------------

    def draws(self) -> Iterator[BatchRNG]:
        rng = BatchRNG(torch.Generator())
        return (rng for _ in range(self.micro_batches))

    def batch(self, update: Update, rng: BatchRNG) -> Batch:
        cond = self._conditioning()
        return Batch(cond, self._real() if update.wants_real else None)

    def phase(self, name: str) -> AbstractContextManager[object]:
        role, _, part = name.partition(": ")
        return self._recorded(name, {"forward": INPUTS, "backward": BACKWARD}.get(part, OPTIMIZER_STEP), role)

    def autocast(self) -> AbstractContextManager[object]:
        return autocast("cpu", torch.bfloat16) if self.is_autocast else nullcontext()

    def reducing(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def note(self, losses: Losses) -> None:
        """There are no figures."""

    def finish(self, update: Update, norm: Tensor) -> Figures:
        return Figures({}, 0.0)

    # -- what a run makes besides --------------------------------------------------------------------------------

    @torch.no_grad()
    def _pictures(self) -> None:
        """What the run shows of itself, and its pairs where they are encoded when they are drawn."""
        encodes, shows = encodes_pairs(self.config.data), makes_pictures(self.config.training)
        if shows:
            latents = self._tensor(pictures_at_once(self.shapes.latent_shape), *self.shapes.latent_shape)
            cond = self._conditioning(len(latents))
            with self._phase("pictures: sampling"):
                self.networks.generator_ema(latents, self._tensor(len(latents)), cond)
        if self.shapes.vae is None or not (encodes or shows):
            return
        vae = copy.deepcopy(self.shapes.vae)
        self._place(vae, VAE_WEIGHTS, {})
        channels, height, width = self.shapes.latent_shape
        with self._labelled(VAE_ACTIVATIONS):
            if shows:
                with self._phase("pictures: decoding"):
                    vae.decode(self._tensor(1, channels, height, width), return_dict=False)
            if encodes:
                with self._phase("pairs: encoding"):
                    vae.encode(self._tensor(1, 3, 8 * height, 8 * width), return_dict=False)

    @contextmanager
    def _labelled(self, label: str) -> Iterator[None]:
        before, self.tracker.label = self.tracker.label, label
        yield
        self.tracker.label = before

    @contextmanager
    def _recorded(self, name: str, label: str, role: Role) -> Iterator[None]:
        """A phase of an update of ``role``; its FLOPs are those of the last micro-batch."""
        before = self.tracker.flops
        with self._phase(name), self._labelled(label):
            yield
        spent = self.tracker.flops - before
        if label == INPUTS:
            self.flops[role] = spent
        elif label == BACKWARD:
            self.flops[role] += spent

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        self.current, begin = name, len(self.tracker.events)
        yield
        first = self.phases.get(name, (begin, 0))[0]
        self.phases[name] = (first, len(self.tracker.events))
        self.current = ""


def makes_pictures(training: TrainingConfig) -> bool:
    """Whether a run samples and decodes pictures: for grids, or for the CLIP score of its snapshots."""
    return bool(training.grid_every or training.clip_model)


def encodes_pairs(data: DataConfig) -> bool:
    """Whether a run encodes its pairs when they are drawn."""
    return bool(data.pairs and not data.cache)
