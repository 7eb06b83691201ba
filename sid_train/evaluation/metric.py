"""What a metric of pictures is. One is a class in this package; whoever wants its figures makes one and calls it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

CLIP_SCORE = "clip_score"


class PictureMetric(Protocol):
    """A figure of pictures and what they were asked to show; higher is better.

    name: in logs
    """

    name: str

    def score(self, images: Tensor, prompts: Sequence[str]) -> float:
        """Of images [N, 3, H, W] in [-1, 1], one for each prompt."""
        ...
