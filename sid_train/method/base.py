"""What a distillation method is to the loop that runs it: SiD is one, a baseline is one more file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..core.noise_schedule import NoiseSchedule
from ..core.rng import BatchRNG
from ..models.conditioning import Conditioning, RealBatch
from ..models.denoiser import Denoiser, Network
from .config import GANConfig, MethodConfig

Losses = dict[str, Tensor]
"""Scalar parts of one loss by name; their sum is what is minimised."""


@dataclass
class Batch:
    """What a loss is computed on: prompts, and real pictures where an update asked for them."""

    cond: Conditioning
    real: RealBatch | None = None


@dataclass(frozen=True)
class Update:
    """One optimizer step of an iteration.

    network: the role of the network that it changes
    loss: of one micro-batch, with gradient
    wants_real: whether its batches need real pictures
    """

    network: str
    loss: Callable[[Batch, BatchRNG], Losses]
    wants_real: bool = False

    @property
    def name(self) -> str:
        """For logs, errors and plans."""
        return role_name(self.network)


def role_name(role: str) -> str:
    """A network's role in words."""
    return role.replace("_", " ")


def require_default(config: MethodConfig, key: str, title: str) -> None:
    """ValueError where a method that would ignore ``key`` is given a value for it."""
    default, value = getattr(MethodConfig(), key), getattr(config, key)
    if value != default:
        raise ValueError(f"method.{key}: unused by {title}: expected {default!r}, got {value!r}")


class TrainingSettings(Protocol):
    """What a method reads of the loop's configuration."""

    @property
    def fake_score_updates(self) -> int: ...

    @property
    def generator_start_images(self) -> int: ...


class DataSettings(Protocol):
    """What a method reads of the data's configuration."""

    @property
    def pairs(self) -> str: ...


class MethodSettings(Protocol):
    """What a method reads of a run's configuration."""

    @property
    def data(self) -> DataSettings: ...

    @property
    def method(self) -> MethodConfig: ...

    @property
    def gan(self) -> GANConfig: ...

    @property
    def training(self) -> TrainingSettings: ...


@dataclass
class Setting:
    """What a method is built from.

    networks: by role, as they are called with gradients for themselves: those that it trains, and the teacher
    unwrapped: the trained ones without a data-parallel wrapper, for gradients that only pass through
    unconditional: the embedding of no text, a single row
    latent_shape: channels, height, width
    """

    networks: Mapping[str, Network]
    unwrapped: Mapping[str, Denoiser]
    schedule: NoiseSchedule
    unconditional: Conditioning
    latent_shape: tuple[int, ...]
    config: MethodSettings


class Method(ABC):
    """A distillation method: which networks it trains, and the updates of an iteration. It knows no ranks, optimizers
    or files.

    title: what the files that it makes are called
    trained: the roles of its trained networks; ``generator`` is one of them, and each starts as a copy of the teacher
    """

    title: ClassVar[str]
    trained: ClassVar[tuple[str, ...]]

    @classmethod
    def check(cls, config: MethodSettings) -> None:
        """ValueError for a configuration of which the method would ignore something."""
        return

    @classmethod
    def summary(cls, config: MethodSettings) -> dict[str, str]:
        """What a file's recipe says of its training, beside what every method's says."""
        return {}

    @classmethod
    @abstractmethod
    def build(cls, setting: Setting) -> Method:
        """The method over a run's networks."""

    @abstractmethod
    def draw_step(self, rng: torch.Generator) -> int:
        """The step k in 1..K of the chain that an iteration works on; ``rng`` is the same on all ranks."""

    def planned_step(self) -> tuple[int, float]:
        """A step whose updates need as much memory as any; and by how many calls of the generator without gradient an
        update has more on average than at that step.
        """
        return 1, 0.0

    @abstractmethod
    def updates(self, step: int, images_seen: int) -> list[Update]:
        """The updates of an iteration, in order. ``images_seen``: those of the iterations before it."""
