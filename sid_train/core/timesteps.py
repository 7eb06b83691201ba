"""The integer timesteps of a few-step generator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

MAX_STEPS = 16
MAX_SID_STEPS = 8
DEFAULT_T_INIT = 625


def timestep_ladder(steps: int, t_init: int = DEFAULT_T_INIT) -> list[int]:
    """The ``steps`` timesteps ``t_init * (K - k) // K``, k = 0..K-1, in integer arithmetic: descending, all above 0."""
    if not 1 <= steps <= MAX_SID_STEPS:
        raise ValueError(f"steps: expected 1 to {MAX_SID_STEPS}, got {steps}")
    if not steps <= t_init <= 999:
        raise ValueError(f"t_init: expected {steps} (the number of steps) to 999, got {t_init}")
    return [t_init * (steps - k) // steps for k in range(steps)]


def trailing_timesteps(steps: int) -> list[int]:
    """The last of each of ``steps`` equal parts of 1,000: what diffusers calls the spacing ``trailing``."""
    return [round(1000 - 1000 * k / steps) - 1 for k in range(steps)]


def consistency_timesteps(steps: int) -> list[int]:
    """``steps`` of the 50 timesteps 999, 979 ... 19 on which consistency models are distilled (LCM, TCD), spread as
    diffusers' ``LCMScheduler`` spreads them.
    """
    return [999 - 20 * (50 * k // steps) for k in range(steps)]


def turbo_timesteps(steps: int) -> list[int]:
    """The first ``steps`` of 999, 899 ... 99: Turbo's, as ComfyUI's own SDTurboScheduler has them."""
    if steps > 10:
        raise ValueError(f"steps: expected 1 to 10 of Turbo's timesteps, got {steps}")
    return [999 - 100 * k for k in range(steps)]


def quarter_timesteps(steps: int) -> list[int]:
    """``steps`` of 999, 749, 499, 249, spread as diffusers' ``LCMScheduler`` spreads them: NitroFusion's."""
    if steps > 4:
        raise ValueError(f"steps: expected 1 to 4 of NitroFusion's timesteps, got {steps}")
    return [999 - 250 * (4 * k // steps) for k in range(steps)]


LADDERS: dict[str, Callable[[int], list[int]]] = {
    "trailing": trailing_timesteps,
    "consistency": consistency_timesteps,
    "turbo": turbo_timesteps,
    "quarters": quarter_timesteps,
}
"""How other families than SiD take another number of steps. All begin at 999."""


def ladder_timesteps(ladder: str, steps: int, t_init: int) -> list[int]:
    """``steps`` timesteps by the rule called ``ladder``. ValueError for a number that the rule has no timesteps for.

    ``explicit``, where nothing is known but the list itself, takes SiD's rule for other numbers.
    """
    if ladder not in LADDERS:
        return timestep_ladder(steps, t_init)
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps: expected 1 to {MAX_STEPS}, got {steps}")
    return LADDERS[ladder](steps)


def check_timesteps(timesteps: Sequence[int]) -> None:
    """ValueError unless ``timesteps`` are 1 to 16 falling integers between 999 and 0."""
    falling = all(a > b for a, b in itertools.pairwise([1000, *timesteps, -1]))
    if not falling or not 1 <= len(timesteps) <= MAX_STEPS:
        raise ValueError(
            f"timesteps: expected 1 to {MAX_STEPS} integers that fall, between 999 and 0, got {list(timesteps)}"
        )


def last_timesteps(timesteps: Sequence[int], denoise: float) -> list[int]:
    """The trained timesteps that an image-to-image pass of strength ``denoise`` in (0, 1] runs.

    All of them at 1, else the last ``max(1, floor(K * denoise + 1/2))``.
    """
    if not 0 < denoise <= 1:
        raise ValueError(f"denoise: expected more than 0 and at most 1, got {denoise}")
    keep = max(1, int(len(timesteps) * denoise + 0.5))
    return list(timesteps[-keep:])
