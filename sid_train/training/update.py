"""One update of one network: the same code in training and in a plan."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..core.rng import BatchRNG
from ..errors import NonFiniteError
from ..method.base import Batch, Losses, Update


@dataclass
class Figures:
    """What an update came to, the same on every rank.

    losses: the mean of each
    norm: of the gradient, before it was clipped
    refused: why its step is not taken; "" where it is
    """

    losses: dict[str, float]
    norm: float
    refused: str = ""


class Passes(Protocol):
    """What surrounds the passes of an update: ranks and data in training, shapes without data in a plan."""

    micro_batches: int

    def draws(self) -> Iterator[BatchRNG]:
        """The random numbers of each micro-batch, in order."""
        ...

    def batch(self, update: Update, rng: BatchRNG) -> Batch: ...

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Around one part of the update, such as ``generator: backward``."""
        ...

    def autocast(self) -> AbstractContextManager[object]:
        """Around the networks' forward passes."""
        ...

    def reducing(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        """Around a micro-batch: gradients leave this process in the ``last`` one."""
        ...

    def backward(self, loss: Tensor) -> None: ...

    def note(self, losses: Losses) -> None:
        """Takes the losses of a micro-batch, before its backward pass."""
        ...

    def finish(self, update: Update, norm: Tensor) -> Figures:
        """What the update came to. Raises on all ranks where a loss or the norm is not finite."""
        ...


def run_update(
    update: Update,
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    passes: Passes,
    clip_norm: float,
    foreach: bool | None = None,
) -> Figures:
    """One optimizer step on the mean of the micro-batches, unless it is refused.

    clip_norm: largest norm of the gradient; 0 does not clip
    foreach: PyTorch's choice between one call for all parameters and one for each; None is its default
    """
    for number, rng in enumerate(passes.draws()):
        with passes.reducing(network, last=number == passes.micro_batches - 1):
            with passes.phase(f"{update.name}: forward"):
                losses = _forward(update, passes, rng)
            passes.note(losses)
            with passes.phase(f"{update.name}: backward"):
                passes.backward(torch.stack(list(losses.values())).sum() / passes.micro_batches)
    with passes.phase(f"{update.name}: optimizer"):
        limit = clip_norm or float("inf")
        figures = passes.finish(update, nn.utils.clip_grad_norm_(network.parameters(), limit, foreach=foreach))
        if not figures.refused:
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return figures


def _forward(update: Update, passes: Passes, rng: BatchRNG) -> Losses:
    """A function of its own, so that the batch is freed before the backward pass."""
    batch = passes.batch(update, rng)  # not autocast: what it encodes is as exact as in a cache
    with passes.autocast():
        return update.loss(batch, rng)


def require_finite(values: dict[str, float], what: str) -> None:
    """NonFiniteError where one of ``values`` is not."""
    bad = [f"{name} = {value}" for name, value in values.items() if not abs(value) < float("inf")]
    if bad:
        raise NonFiniteError(f"the {what} is not finite ({', '.join(bad)})")
