"""The configuration of adapters. Apart from them: it is read inside ComfyUI, where peft may be absent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class AdapterConfig:
    """LoRA distillation: one frozen network in memory instead of four trained or copied ones."""

    rank: int = 0
    """Rank of the generator's and the fake score's adapters; 0 trains whole copies of the network instead."""
    targets: Literal["all", "attention"] = "all"
    """Which modules get adapters. all: attention, feed-forward, convolutions and time projections, as in LCM's and
    DMD2's LoRAs; attention: the attention's projections alone."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"adapter.rank: expected 0 or more, got {self.rank}")
