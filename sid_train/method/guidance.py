"""Guidance strategies: at which scale each network's text guidance is taken during distillation.

kappa combines a network's conditional (c) and unconditional (u) x0: ``u + kappa * (c - u)``. 1 is conditional, 0 is
unconditional, one network call each; anything else takes two calls in one batch. None of this affects sampling: a
distilled generator always runs with text only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.conditioning import Conditioning
from ..models.denoiser import Network, denoise_with_logits, logits

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
        form = STRATEGIES.get(name)
        scales = scales or list(form.default if form else ())
        if form is None or len(scales) != form.arguments:
            forms = [f"{name}={form.told}" if form.told else name for name, form in STRATEGIES.items()]
            raise ValueError(f"guidance: expected {', '.join(forms[:-1])} or {forms[-1]}, got {text!r}")
        if name == "anti-cfg" and scales[0] >= 0:
            raise ValueError(f"guidance: expected a negative scale for anti-cfg, got {scales[0]:g}")
        return cls(name, *form.scales(*scales))

    @property
    def fake_needs_both(self) -> bool:
        """Whether the fake score is asked with text and without, so that some prompts must be dropped to teach it."""
        scales = (self.fake_train, self.fake_eval)
        return any(s != 0 for s in scales) and any(s != 1 for s in scales)


@dataclass(frozen=True)
class StrategyForm:
    """How a strategy is written, and the scales that its arguments mean.

    scales: arguments -> fake_train, fake_eval, teacher
    told: its arguments in messages
    default: its arguments where none are given
    """

    scales: Callable[..., tuple[float, float, float]]
    told: str = ""
    default: tuple[float, ...] = ()

    @property
    def arguments(self) -> int:
        return len(self.told.split(",")) if self.told else 0


# Every strategy there is: a new one is a line here.
STRATEGIES: dict[str, StrategyForm] = {
    "none": StrategyForm(lambda: (1.0, 1.0, 1.0)),
    "lsg": StrategyForm(lambda scale: (scale, scale, scale), "SCALE", (DEFAULT_LSG_SCALE,)),
    "zero-cfg": StrategyForm(lambda: (0.0, 0.0, 1.0)),
    "anti-cfg": StrategyForm(lambda scale: (scale, scale, 1.0), "NEGATIVE_SCALE", (DEFAULT_ANTI_CFG_SCALE,)),
    "custom": StrategyForm(lambda *scales: scales, "FAKE_TRAIN,FAKE_EVAL,TEACHER"),
}


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
