"""Random numbers that do not depend on how a batch is split over processes and micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor


class BatchRNG:
    """The draws of one of ``parts`` equal parts of a batch.

    Whatever has a row for each sample is drawn for the whole batch, and this part's rows are taken: parts whose
    generators start in one state get the rows of one draw. ``count`` is always the number of samples in a part.
    """

    def __init__(self, generator: torch.Generator, part: int = 0, parts: int = 1):
        self.generator, self.part, self.parts = generator, part, parts

    @property
    def device(self) -> torch.device:
        return self.generator.device

    def rows(self, count: int) -> slice:
        """Where this part is in the whole batch."""
        return slice(self.part * count, (self.part + 1) * count)

    def randn(self, count: int, *shape: int) -> Tensor:
        """Standard normal, [count, *shape]."""
        return torch.randn(count * self.parts, *shape, generator=self.generator, device=self.device)[self.rows(count)]

    def rand(self, count: int) -> Tensor:
        """Uniform in [0, 1), [count]."""
        return torch.rand(count * self.parts, generator=self.generator, device=self.device)[self.rows(count)]

    def randint(self, low: int, high: int, count: int) -> Tensor:
        """Uniform integers in [low, high), [count]."""
        shape = (count * self.parts,)
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)[self.rows(count)]

    def integer(self, high: int) -> int:
        """One integer in [0, high) for the whole batch, the same in every part."""
        return int(torch.randint(high, (1,), generator=self.generator, device=self.device).item())
