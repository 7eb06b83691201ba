"""The running average of the generator: what is evaluated and exported."""

from __future__ import annotations

import torch
from torch import nn

from ..models.denoiser import Denoiser
from .parts import local_part


class EMA:
    """Exponential moving average with a half-life in images, short at the start of a run (SiD, arXiv 2404.04057).

    ``average`` is the network that holds it; it starts with the weights that it has.
    """

    def __init__(self, average: Denoiser, halflife_images: float, rampup: float):
        self.average = average
        self.halflife_images, self.rampup = halflife_images, rampup

    def decay(self, images_seen: int, batch_size: int) -> float:
        """``0.5 ** (batch / half-life)``, the half-life at most ``rampup`` of the images seen."""
        halflife = min(self.halflife_images, self.rampup * images_seen)
        return 0.5 ** (batch_size / max(halflife, 1e-8))

    @torch.no_grad()
    def update(self, network: nn.Module, images_seen: int, batch_size: int) -> None:
        decay = self.decay(images_seen, batch_size)
        # Of sharded networks every rank averages its own parts: both networks are cut alike.
        ours, theirs = ([local_part(p) for p in n.parameters()] for n in (self.average, network))
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for mine, new in zip(self.average.buffers(), network.buffers(), strict=True):
            mine.copy_(new)
