"""Random numbers that do not depend on how a batch is split over processes and micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def step_generator(seed: int) -> torch.Generator:
    """A CPU generator, the same on every rank, for what a whole iteration shares."""
    return torch.Generator().manual_seed(seed * 10_007)


def batch_generator(device: torch.device, seed: int) -> torch.Generator:
    """A generator on ``device``, in the same state on every rank, for what is drawn a sample."""
    return torch.Generator(device).manual_seed(seed * 10_007 + 1)


def batch_parts(generator: torch.Generator, places: Iterable[int], parts: int) -> Iterator[BatchRNG]:
    """The draws of those of a batch's ``parts`` that are at ``places``. Each draws for the whole batch, from the same
    state.
    """
    state = generator.get_state()
    on_host: list[list[int]] = []
    for place in places:
        generator.set_state(state)
        yield BatchRNG(generator, place, parts, on_host)


class BatchRNG:
    """The draws of one of ``parts`` equal parts of a batch.

    Whatever has a row for each sample is drawn for the whole batch, and this part's rows are taken: parts whose
    generators start in one state get the rows of one draw. ``count`` is always the number of samples in a part.
    """

    def __init__(
        self, generator: torch.Generator, part: int = 0, parts: int = 1, on_host: list[list[int]] | None = None
    ):
        self.generator, self.part, self.parts = generator, part, parts
        # What parts of one batch drew on the host, in order: they all draw the same, so the device is asked once.
        self.on_host = [] if on_host is None else on_host
        self.host_draws = 0

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

    def indices(self, high: int, count: int) -> list[int]:
        """``randint(0, high, count)`` on the host."""
        shape = (count * self.parts,)
        drawn = torch.randint(high, shape, generator=self.generator, device=self.device)
        return self._host(drawn)[self.rows(count)]

    def integer(self, high: int) -> int:
        """One integer in [0, high) for the whole batch, the same in every part."""
        return self._host(torch.randint(high, (1,), generator=self.generator, device=self.device))[0]

    def _host(self, drawn: Tensor) -> list[int]:
        if self.host_draws == len(self.on_host):
            self.on_host.append(drawn.tolist())
        self.host_draws += 1
        return self.on_host[self.host_draws - 1]
