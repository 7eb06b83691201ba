"""``demo``: distils the embedded teacher, measures it and shows it."""

from __future__ import annotations

from pathlib import Path

from ..demo.run import demo_folder, run_demo


def demo(
    out: Path | None,
    steps: int,
    guidance: str | None,
    seed: int,
    minutes: float | None,
    full: bool,
    overrides: list[str],
) -> None:
    run_demo(out or demo_folder(steps, guidance, seed, minutes), steps, guidance, seed, minutes, full, overrides)
