"""The study's page: tables and plots, from its file of figures alone."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from scipy.stats import t as student

from ..demo.report import FIGURES
from ..files.atomic import replacing, write_text
from .cells import BASE, BUDGET, CELLS, GUIDANCE, SEEDS, STEPS, TEACHER, TEACHER_CELLS, Cell
from .claims import CLAIMS, Claim
from .run import Job, Results

SETS = {"held_out": "held-out", "trained": "trained"}
CONFIDENCE = 0.95
PAGE, FIGURES_FILE = "docs/study.md", "docs/study.json"
CLAIMED = (
    "A claim says that one row is better than another. What is found is the mean of their differences, seed by seed, "
    f"with its {CONFIDENCE:.0%} interval: better or worse where the interval leaves out 0. Where two are not told "
    "apart, three seeds are too few to say that they differ. The teacher's rows have one seed and are taken as exact."
)


class Figure:
    """One figure of a cell over its seeds."""

    def __init__(self, values: Sequence[float]):
        self.values = list(values)

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def half_width(self) -> float:
        """Of the mean's interval by Student's t; 0 for one value, which has none."""
        n = len(self.values)
        if n < 2:
            return 0.0
        return float(student.ppf((1 + CONFIDENCE) / 2, n - 1)) * stdev(self.values) / math.sqrt(n)

    def text(self, form: str) -> str:
        interval = f" ± {self.half_width:{form.lstrip('+')}}" if len(self.values) > 1 else ""
        return f"{self.mean:{form}}{interval}"


class Table:
    """The figures of a study, as its file has them. Those of cells that are others by now are left out."""

    def __init__(self, results: Results):
        cells = {**CELLS, **TEACHER_CELLS}
        jobs = {name: [Job(cell, s) for s in SEEDS] if name in CELLS else [Job(cell)] for name, cell in cells.items()}
        self._runs = {
            name: {job.seed: row for job in of if (row := results.figures_of(job))} for name, of in jobs.items()
        }

    def runs(self, name: str) -> list[dict[str, Any]]:
        """A cell's results, one a seed."""
        return list(self._runs[name].values())

    def steps(self, name: str) -> list[str]:
        """At which numbers of steps it was measured."""
        runs = self.runs(name)
        return sorted(runs[0]["figures"], key=int) if runs else []

    def figure(self, name: str, steps: str, prompts: str, figure: str) -> Figure:
        return Figure([run["figures"][steps][prompts][figure] for run in self.runs(name)])

    def difference(self, claim: Claim, prompts: str) -> Figure | None:
        """Of a claim's rows, by seed; the teacher's row is beside each. None where one of them is missing."""

        def values(name: str, steps: int) -> dict[int, float]:
            return {seed: run["figures"][str(steps)][prompts][claim.figure] for seed, run in self._runs[name].items()}

        better, worse = values(*claim.better), values(*claim.worse)
        if claim.worse[0] in TEACHER_CELLS and worse:
            worse = dict.fromkeys(better, worse[0])
        seeds = better.keys() & worse.keys()
        return Figure([better[seed] - worse[seed] for seed in sorted(seeds)]) if seeds else None

    def fact(self, name: str, fact: str) -> Figure | None:
        values = [run[fact] for run in self.runs(name) if run.get(fact) is not None]
        return Figure(values) if values else None


def write_page(results: Results, page: Path) -> None:
    """Writes ``page`` and, beside it, the plots that it shows."""
    table = Table(results)
    plots = page.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    shown = [draw(table, plots, page.parent) for draw in (_pareto, _budgets)]
    groups: dict[str, list[str]] = {}
    for name, cell in {**CELLS, **TEACHER_CELLS}.items():
        if table.runs(name):
            groups.setdefault(cell.group, []).append(name)
    lines = [*_introduction(), *_claims(table), *(f"![{alt}]({path})\n" for alt, path in shown)]
    for group, names in groups.items():
        own = ["k4"] if group not in (STEPS, TEACHER) and table.runs("k4") else []
        lines += [f"## {group}\n", *_markdown(table, [*own, *names]), ""]
    write_text(page, "\n".join(lines).rstrip() + "\n")


def _introduction() -> list[str]:
    told = [
        f"This page is written by `python -m sid_train study --page {PAGE} --results {FIGURES_FILE}`: every figure is "
        "from that file, none is typed. What the figures are, [demo.md](demo.md) says: 2,048 pictures a row, and two "
        "sets of prompts.",
        f"A row is a distillation of the demo's teacher that spends {BUDGET:,} network calls for each picture of the "
        "batch. A call is a forward pass of generator, fake score or teacher; guidance with text and without makes "
        f"two. What is changed is the demo's configuration with `{' '.join(BASE)}`. Cells are means over seeds "
        f"{', '.join(map(str, SEEDS))}, with the {CONFIDENCE:.0%} interval of the mean by Student's t. Two figures in "
        "a cell are for held-out / trained prompts. This command makes a row again, given its name:",
    ]
    paragraphs = [f"{_filled(text)}\n" for text in told]
    return ["# The study\n", *paragraphs, "```\npython -m sid_train study --only NAME --out DIR\n```\n"]


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _claims(table: Table) -> list[str]:
    """The claims, and what the differences of their rows say."""
    lines = [
        "## What is claimed, and what is found\n",
        f"{_filled(CLAIMED)}\n",
        "| claim | of | rows | figure | held-out | | trained | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for claim in CLAIMS:
        title, _, form = FIGURES[claim.figure]
        cells = []
        for prompts in SETS:
            found = table.difference(claim, prompts)
            if found is not None and len(found.values) > 1:
                cells += [found.text("+" + form), claim.verdict(found.mean, found.half_width)]
        if cells:
            rows = " against ".join(f"`{name}`, K = {steps}" for name, steps in (claim.better, claim.worse))
            lines.append(f"| {claim.told} | {claim.source} | {rows} | {title} | {' | '.join(cells)} |")
    return [*lines, ""]


def _markdown(table: Table, names: Iterable[str]) -> list[str]:
    heads = [title for title, _, _ in FIGURES.values()]
    lines = [
        f"| name | | K | {' | '.join(heads)} | iterations | seconds |",
        "|---|---|---|" + "---|" * (len(heads) + 2),
    ]
    for name in names:
        cell = CELLS.get(name) or TEACHER_CELLS[name]
        for steps in table.steps(name):
            figures = [
                " / ".join(table.figure(name, steps, prompts, key).text(form) for prompts in SETS)
                for key, (_, _, form) in FIGURES.items()
            ]
            iterations = table.fact(name, "iterations") if isinstance(cell, Cell) else None
            seconds = table.fact(name, "seconds") if isinstance(cell, Cell) else None
            spent = [f"{fact.mean:.0f}" if fact else "" for fact in (iterations, seconds)]
            lines.append(f"| `{name}` | {cell.told} | {steps} | {' | '.join(figures)} | {' | '.join(spent)} |")
    return lines


def _pareto(table: Table, folder: Path, base: Path) -> tuple[str, str]:
    """Alignment with the prompt against diversity, at every strategy of guidance."""
    figure, axes = _axes("recall (diversity)", "accuracy (alignment)", columns=len(SETS))
    names = ["k4", *(name for name, cell in CELLS.items() if cell.group == GUIDANCE and not name.startswith("k1-"))]
    for axis, (prompts, told) in zip(axes, SETS.items(), strict=True):
        axis.set_title(f"{told} prompts")
        for name in filter(table.runs, names):
            _point(axis, table, name, "4", prompts, ("recall", "prompt_accuracy"), "none" if name == "k4" else name)
        for name, cell in TEACHER_CELLS.items():
            if cell.sampler == "dpm++" and cell.steps == 30 and table.runs(name):
                label = f"teacher, 30 steps, CFG {cell.scale:g}"
                _point(axis, table, name, "30", prompts, ("recall", "prompt_accuracy"), label, marker="s")
    return "Alignment against diversity, by guidance", _save(figure, folder / "guidance.svg", base)


def _budgets(table: Table, folder: Path, base: Path) -> tuple[str, str]:
    """Frechet distance against network calls and against the clock."""
    figure, axes = _axes("", "Frechet distance, held-out prompts", columns=2)
    lines = {"SiD, K = 4": ("k4", "budget-", "4"), "SiD, K = 1": ("k1", "k1-budget-", "1")}
    lines |= {"DMD2's loss, K = 4": ("dmd2", "dmd2-budget-", "4"), "LCM, K = 4": ("lcm", "lcm-budget-", "4")}
    for label, (own, prefix, steps) in lines.items():
        cells = [own, *(name for name in CELLS if name.startswith(prefix))]
        names = sorted(filter(table.runs, cells), key=lambda name: CELLS[name].budget)
        if not names:
            continue
        values = [table.figure(name, steps, "held_out", "frechet") for name in names]
        errors = [value.half_width for value in values]
        seconds = [table.fact(name, "seconds") for name in names]
        for axis, places in zip(
            axes,
            ([CELLS[name].budget * BUDGET for name in names], [fact.mean if fact else math.nan for fact in seconds]),
            strict=True,
        ):
            axis.errorbar(places, [value.mean for value in values], errors, marker="o", label=label, capsize=3)
    for axis, told in zip(axes, ("network calls for each picture of the batch", "seconds of one core"), strict=True):
        axis.set(xlabel=told, xscale="log")
        axis.legend()
    return "Frechet distance by network calls and by time", _save(figure, folder / "budget.svg", base)


def _axes(x: str, y: str, columns: int) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "sid"  # the same figures give the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(6 * columns, 5), layout="constrained", sharey=True)
    for axis in axes:
        axis.set(xlabel=x)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=y)
    return figure, axes


def _point(
    axis: Any,
    table: Table,
    name: str,
    steps: str,
    prompts: str,
    figures: tuple[str, str],
    label: str,
    marker: str = "o",
) -> None:
    x, y = (table.figure(name, steps, prompts, figure) for figure in figures)
    axis.errorbar(x.mean, y.mean, y.half_width, x.half_width, marker=marker, capsize=2)
    axis.annotate(label, (x.mean, y.mean), xytext=(4, 4), textcoords="offset points", fontsize=8)


def _save(figure: Any, path: Path, base: Path) -> str:
    """Where the plot is, seen from ``base``."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
    return path.relative_to(base).as_posix()
