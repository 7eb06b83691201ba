"""``study``: what the method's choices are worth on the demo's model, cell by cell."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from ..study.cells import CELLS, QUICK, SEEDS, TEACHER_CELLS, quick_cells
from ..study.run import Job, Results, run_study


def study(
    out: Path,
    results: Path | None,
    only: list[str],
    seeds: list[int],
    quick: bool,
    workers: int | None,
    page: Path | None,
) -> None:
    if quick and only:
        raise ValueError(f"--quick: runs {', '.join(QUICK)}: drop it, or --only")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: expected 1 or more, got {workers}")
    found = Results(results or out / ("quick.json" if quick else "study.json"))
    if page is not None:
        from ..study.page import write_page  # matplotlib is slow to import

        write_page(found, page)
        print(f"{page}: {len(found.rows)} results")
        return
    cells = quick_cells() if quick else CELLS
    for name in only:
        if name not in {**CELLS, **TEACHER_CELLS}:
            close = difflib.get_close_matches(name, [*CELLS, *TEACHER_CELLS], n=3)
            raise ValueError(f"--only: no cell is called {name!r}" + (f": {', '.join(close)}?" if close else ""))
    wanted = [cell for name, cell in cells.items() if not only or name in only]
    jobs = [Job(cell, seed) for cell in wanted for seed in (seeds or (SEEDS[:1] if quick else SEEDS))]
    teacher = [Job(cell) for name, cell in TEACHER_CELLS.items() if name in only or not (only or quick)]
    run_study([*teacher, *jobs], out / "quick" if quick else out, found, workers or os.cpu_count() or 1)
