"""How much a figure would differ with other pictures: the bootstrap (Efron, 1979)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 1.96
"""Standard errors on both sides of a value: 95% of a normal variable."""


@dataclass(frozen=True)
class Estimate:
    """A figure, and 1.96 bootstrap standard errors below and above it. Quantiles of the resamples would not do: a
    Frechet distance of pictures that occur more than once is larger, and they can all lie above the value.
    """

    value: float
    low: float
    high: float


def bootstrap(figure: Callable[[Tensor], float], count: int, resamples: int, seed: int = 0) -> Estimate:
    """``figure`` of the rows 0 to ``count - 1``, and of ``resamples`` draws of as many of them.

    figure: rows [count], with repeats, -> its value
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor(
        [figure(torch.randint(count, (count,), generator=generator)) for _ in range(resamples)], dtype=torch.float64
    )
    value = figure(torch.arange(count))
    error = WIDTH * float(values.std()) if resamples > 1 else 0.0
    return Estimate(value, value - error, value + error)
