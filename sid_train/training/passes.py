"""The passes of an update on this rank, on its share of the run's batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.profiler import record_function

from ..config import TrainingConfig
from ..core.rng import BatchRNG, batch_parts
from ..data.rows import PromptTable
from ..method.base import Batch, Losses, Update
from ..models.conditioning import PairSource
from .distributed import autocast, mean_over_ranks, micro_batch_size, reducing_gradients
from .guard import NormGuard
from .update import Figures, require_finite


class RankPasses:
    """``update.Passes`` of a run."""

    def __init__(
        self,
        accelerator: Accelerator,
        training: TrainingConfig,
        prompts: PromptTable,
        pairs: PairSource | None,
        rng: torch.Generator,
        guard: NormGuard,
    ):
        self.accelerator, self.training, self.prompts, self.pairs, self.rng = accelerator, training, prompts, pairs, rng
        self.guard = guard
        self.micro_batches, self.micro_batch = training.accumulate, micro_batch_size(accelerator, training)
        self._noted: list[Losses] = []

    def draws(self) -> Iterator[BatchRNG]:
        """Those of this rank: every micro-batch has a part for each."""
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        places = (micro_batch * ranks + rank for micro_batch in range(self.micro_batches))
        return batch_parts(self.rng, places, self.micro_batches * ranks)

    def batch(self, update: Update, rng: BatchRNG) -> Batch:
        cond = self.prompts.draw(self.micro_batch, rng)
        if not update.wants_real:
            return Batch(cond)
        if self.pairs is None:
            raise ValueError("data.pairs: expected real pairs, which the method asks for")
        return Batch(cond, self.pairs.draw(self.micro_batch, rng))

    def phase(self, name: str) -> AbstractContextManager[object]:
        return record_function(name)

    def autocast(self) -> AbstractContextManager[object]:
        return autocast(self.accelerator, self.training)

    def reducing(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        return reducing_gradients(self.accelerator, network, last)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def note(self, losses: Losses) -> None:
        self._noted.append({name: loss.detach() for name, loss in losses.items()})

    def finish(self, update: Update, norm: Tensor) -> Figures:
        """The host waits for the device here, for all figures of the update at once."""
        noted, self._noted = self._noted, []
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        values = mean_over_ranks(self.accelerator, [*(loss for losses in noted for loss in losses.values()), norm])
        names, means = [name for losses in noted for name in losses], dict.fromkeys(noted[0], 0.0)
        for name, value in zip(names, values[:-1], strict=True):
            means[name] += value / len(noted)
        require_finite(means, f"{update.name} loss")
        require_finite({"norm": values[-1]}, f"{update.name} gradient")
        return Figures(means, values[-1], self.guard.refuses(update.network, values[-1]))
