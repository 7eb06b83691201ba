"""Which steps are not taken: those whose gradient is far longer than the network's last ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from statistics import median

import torch
from torch import Tensor


class NormGuard:
    """One loss of 10^6 without a NaN makes Adam's second moment so large that the steps after it stay too small for
    thousands of iterations. A step is refused whose norm is more than ``limit`` times the median of the last ones of
    its network; 0 refuses none. Norms are the same on all ranks, and so is what is decided.
    """

    WINDOW = 100
    ENOUGH = 20
    """Steps before any is refused: the first ones may grow from nothing."""
    PATIENCE = 10
    """Steps refused in a row after which the longer gradients are taken for what the network has now."""

    def __init__(self, networks: Iterable[str], limit: float):
        self.limit = limit
        self.norms: dict[str, deque[float]] = {name: deque(maxlen=self.WINDOW) for name in networks}
        self.refused = dict.fromkeys(self.norms, 0)

    def refuses(self, network: str, norm: float) -> str:
        """Why the step of ``network`` with this norm is not to be taken; "" where it is. To be asked once a step."""
        past = self.norms[network]
        usual = median(past) if len(past) >= self.ENOUGH else 0.0
        if not self.limit or not usual or norm <= self.limit * usual:
            self.refused[network] = 0
            past.append(norm)
            return ""
        self.refused[network] += 1
        told = f"the norm of its gradient, {norm:.3g}, is {norm / usual:,.0f} times the median of the last {len(past)}"
        if self.refused[network] == self.PATIENCE:
            past.clear()
            self.refused[network] = 0
            told += f"; after {self.PATIENCE} in a row such steps are taken from now on"
        return told

    # As a torch.Generator's, so that a checkpoint keeps both alike.

    def get_state(self) -> Tensor:
        """float64 [networks, 1 + WINDOW]: steps refused in a row, and the last norms, -1 where there are fewer."""
        rows = [
            [float(self.refused[name]), *norms, *[-1.0] * (self.WINDOW - len(norms))]
            for name, norms in self.norms.items()
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def set_state(self, state: Tensor) -> None:
        for name, (refused, *norms) in zip(self.norms, state.tolist(), strict=True):
            self.refused[name] = int(refused)
            self.norms[name] = deque((norm for norm in norms if norm >= 0), maxlen=self.WINDOW)
