"""Guidance strategies: at which scale (``models/guided.py``) each network is asked during distillation. None of this
affects sampling: a distilled generator always runs with text only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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
