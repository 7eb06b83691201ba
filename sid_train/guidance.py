"""Guidance strategies: at which scale each network's text guidance is taken during distillation.

kappa combines a network's conditional (c) and unconditional (u) x0: ``u + kappa * (c - u)``. 1 is conditional, 0 is
unconditional, one network call each; anything else takes two calls in one batch. None of this affects sampling: a
distilled generator always runs with text only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .models.conditioning import Conditioning

DEFAULT_LSG_SCALE = 1.5
DEFAULT_ANTI_CFG_SCALE = -1.0


@dataclass(frozen=True)
class GuidanceStrategy:
    """The scales of one strategy (arXiv 2505.12674).

    fake_train: the fake score's while it learns (kappa_1)
    fake_eval: the fake score's in the generator loss (kappa_2 and kappa_3)
    teacher: the teacher's in the generator loss (kappa_4)
    """

    name: str
    fake_train: float
    fake_eval: float
    teacher: float

    @classmethod
    def parse(cls, text: str) -> GuidanceStrategy:
        """``none``, ``lsg=1.5``, ``zero-cfg``, ``anti-cfg=-1`` or ``custom=FAKE_TRAIN,FAKE_EVAL,TEACHER``."""
        name, _, argument = text.strip().partition("=")
        try:
            scales = [float(part) for part in argument.split(",")] if argument else []
            if not all(math.isfinite(s) for s in scales):
                raise ValueError
        except ValueError:
            raise ValueError(f"guidance: expected numbers after '=', got {text!r}") from None
        if name == "none" and not argument:
            return cls("none", 1.0, 1.0, 1.0)
        if name == "zero-cfg" and not argument:
            return cls("zero-cfg", 0.0, 0.0, 1.0)
        if name == "lsg" and len(scales) <= 1:
            scale = scales[0] if scales else DEFAULT_LSG_SCALE
            return cls("lsg", scale, scale, scale)
        if name == "anti-cfg" and len(scales) <= 1:
            scale = scales[0] if scales else DEFAULT_ANTI_CFG_SCALE
            if scale >= 0:
                raise ValueError(f"guidance: expected a negative scale for anti-cfg, got {scale:g}")
            return cls("anti-cfg", scale, scale, 1.0)
        if name == "custom" and len(scales) == 3:
            return cls("custom", *scales)
        raise ValueError(
            "guidance: expected none, lsg=SCALE, zero-cfg, anti-cfg=NEGATIVE_SCALE or "
            f"custom=FAKE_TRAIN,FAKE_EVAL,TEACHER, got {text!r}"
        )

    @property
    def fake_needs_both(self) -> bool:
        """Whether the fake score is asked with text and without, so that some prompts must be dropped to teach it."""
        scales = (self.fake_train, self.fake_eval)
        return any(s != 0 for s in scales) and any(s != 1 for s in scales)


def guided_denoise(
    denoiser, x: Tensor, sigma: Tensor, cond: Conditioning, unconditional: Conditioning, scale: float
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
    denoiser, x: Tensor, sigma: Tensor, cond: Conditioning, unconditional: Conditioning, scale: float
) -> tuple[Tensor, Tensor]:
    """``guided_denoise`` and the discriminator's logits [B, h, w], which always see the text.

    They come from the conditional pass; where there is none (scale 0) an encoder pass is added.
    """
    if scale == 1:
        return denoiser(x, sigma, cond, output="x0_and_logits")
    if scale == 0:
        x0 = guided_denoise(denoiser, x, sigma, cond, unconditional, scale)
        return x0, denoiser(x, sigma, cond, output="logits")
    both = Conditioning.cat([unconditional.expand(len(x)), cond])
    x0, logits = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), both, output="x0_and_logits")
    u, c = x0.chunk(2)
    return u + scale * (c - u), logits.chunk(2)[1]
