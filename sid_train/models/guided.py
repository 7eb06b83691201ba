"""Classifier-free guidance (arXiv 2207.12598).

A scale kappa combines a network's conditional (c) and unconditional (u) x0 to ``u + kappa * (c - u)``. 1 is
conditional, 0 is unconditional, one network call each; anything else takes two calls in one batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .conditioning import Conditioning
from .denoiser import Network, denoise_with_logits, logits


def guided_denoise(
    denoiser: Network, x: Tensor, sigma: Tensor, cond: Conditioning, unconditional: Conditioning, scale: float
) -> Tensor:
    """x0 of ``x`` [B, ...] at sigma [B] under guidance ``scale``; ``unconditional`` is a single row."""
    if scale == 1:
        return denoiser(x, sigma, cond)
    if scale == 0:
        return denoiser(x, sigma, unconditional.expand(len(x)))
    both = Conditioning.cat([unconditional.expand(len(x)), cond])
    u, c = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
    return u + scale * (c - u)


def guided_denoise_with_logits(
    denoiser: Network, x: Tensor, sigma: Tensor, cond: Conditioning, unconditional: Conditioning, scale: float
) -> tuple[Tensor, Tensor]:
    """``guided_denoise`` and the discriminator's logits [B, h, w], which always see the text.

    They come from the conditional pass; where there is none (scale 0) an encoder pass is added.
    """
    if scale == 1:
        return denoise_with_logits(denoiser, x, sigma, cond)
    if scale == 0:
        x0 = guided_denoise(denoiser, x, sigma, cond, unconditional, scale)
        return x0, logits(denoiser, x, sigma, cond)
    both = Conditioning.cat([unconditional.expand(len(x)), cond])
    x0, maps = denoise_with_logits(denoiser, torch.cat([x, x]), torch.cat([sigma, sigma]), both)
    u, c = x0.chunk(2)
    return u + scale * (c - u), maps.chunk(2)[1]
