"""Runs the study's cells, one after another, and keeps their figures in one file."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ..config import Config, load_config
from ..core.recipe import SiDRecipe
from ..demo.baselines import SAMPLING_SEED, SUBJECT_SETS, cache_key, evaluation_subjects, teacher_images
from ..demo.calls import calls_an_iteration
from ..demo.metrics import DigitEvaluator
from ..demo.report import FIGURES
from ..files.atomic import write_text
from ..files.reading import read_json, reading
from ..models.bundle import ModelBundle
from ..models.families import export_generator, load_generator, load_model
from ..models.family import ExportOptions
from ..sample import sample_images
from ..training.trainer import Trainer
from .cells import BUDGET, Cell, TeacherCell

GENERATOR = "generator.safetensors"


@dataclass(frozen=True)
class Job:
    """One cell with one seed; of the teacher's cells there is one alone."""

    cell: Cell | TeacherCell
    seed: int = 0

    @property
    def key(self) -> str:
        return self.cell.name if isinstance(self.cell, TeacherCell) else f"{self.cell.name}/{self.seed}"


class Results:
    """The study's figures by job, in one JSON file. They hold for one teacher, one classifier and one budget."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            with reading(path, "what 'study' wrote"):
                content = read_json(path)
                made_with, self.rows = content["made_with"], dict(content["rows"])
            if made_with != _made_with():
                raise ValueError(
                    f"{path}: its figures are of another teacher, classifier or budget: choose another --results, "
                    "or remove the file"
                )

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        rows = dict(sorted(self.rows.items()))
        write_text(self.path, json.dumps({"made_with": _made_with(), "rows": rows}, indent=1) + "\n")


def _made_with() -> dict[str, Any]:
    return cache_key() | {"network_calls": BUDGET}


def run_study(jobs: Sequence[Job], out: Path, results: Results, workers: int) -> None:
    """Runs the jobs that ``results`` has no figures of: in ``workers`` processes of one thread each, or in this one."""
    missing = [job for job in jobs if job.key not in results.rows]
    print(f"{len(missing)} of {len(jobs)} to run, in {out}; figures go to {results.path}", flush=True)
    for job, row in _all_done(missing, out, workers):
        results.add(job.key, row)
        for steps, sets in row["figures"].items():
            figures = sets["held_out"]
            print(
                f"{job.key:<28} K = {steps:<3} Frechet {figures['frechet']:.3f}  "
                f"accuracy {figures['prompt_accuracy']:.3f}  recall {figures['recall']:.3f}",
                flush=True,
            )


def _all_done(jobs: Sequence[Job], out: Path, workers: int) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Jobs with their figures, as they end."""
    if workers == 1:
        yield from ((job, run_job(job, out)) for wave in _waves(jobs) for job in wave)
        return
    context = multiprocessing.get_context("spawn")
    for wave in _waves(jobs):
        with ProcessPoolExecutor(min(workers, len(wave)), mp_context=context, initializer=_one_thread) as pool:
            running = {pool.submit(run_job, job, out): job for job in wave}
            yield from ((running[done], done.result()) for done in as_completed(running))


def _waves(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Those first that others start from."""
    later = [job for job in jobs if isinstance(job.cell, Cell) and job.cell.starts_from]
    yield from filter(None, ([job for job in jobs if job not in later], later))


def _one_thread() -> None:
    torch.set_num_threads(1)


def run_job(job: Job, out: Path) -> dict[str, Any]:
    """The figures of a job: by number of steps, and of each by set of prompts."""
    if isinstance(job.cell, TeacherCell):
        return _measure_teacher(job.cell)
    return _distil(job.cell, job.seed, out)


def cell_config(cell: Cell, seed: int, out: Path, iterations: int = 1) -> Config:
    asked = [*cell.overrides, f"training.seed={seed}", f"training.iterations={iterations}", "training.tracker=none"]
    if cell.starts_from:
        asked.append(f"model.init_generator={out / cell.starts_from / str(seed) / GENERATOR}")
    return load_config("demo", asked)


def _distil(cell: Cell, seed: int, out: Path) -> dict[str, Any]:
    folder = out / cell.name / str(seed)
    with TemporaryDirectory() as trial:
        calls = calls_an_iteration(Trainer(cell_config(cell, seed, out), Path(trial)))
    iterations = max(1, round(cell.budget * BUDGET / calls))
    began = time.monotonic()
    trainer = Trainer(cell_config(cell, seed, out, iterations), folder / "run")
    continued = trainer.iteration > 0
    trainer.run()
    seconds = time.monotonic() - began
    file = folder / GENERATOR
    export_generator(trainer.folder.open_generator(), file, ExportOptions())
    generator, recipe = load_generator(str(file))
    return {
        "settings": cell.overrides,
        "iterations": iterations,
        "calls_an_iteration": calls,
        # Of a run that was interrupted the time is not known.
        "seconds": None if continued else round(seconds, 1),
        "figures": {str(steps): _measure(generator, recipe, steps) for steps in cell.sampled or (recipe.steps,)},
    }


def _measure(generator: ModelBundle, recipe: SiDRecipe, steps: int) -> dict[str, dict[str, float]]:
    def pictures(prompts: list[str]) -> torch.Tensor:
        return sample_images(generator, recipe, prompts, SAMPLING_SEED, steps)

    return _figures(pictures, steps)


def _measure_teacher(cell: TeacherCell) -> dict[str, Any]:
    began, bundle = time.monotonic(), load_model("demo")

    def pictures(prompts: list[str]) -> torch.Tensor:
        if cell.sampler == "ladder":
            return sample_images(
                bundle, SiDRecipe(architecture=bundle.architecture), prompts, SAMPLING_SEED, cell.steps
            )
        return teacher_images(bundle, prompts, cell.scale, SAMPLING_SEED, steps=cell.steps)

    figures = {str(cell.steps): _figures(pictures, cell.steps, cell.scale)}
    return {"seconds": round(time.monotonic() - began, 1), "figures": figures}


def _figures(pictures: Callable[[list[str]], torch.Tensor], steps: int, scale: float = 1.0) -> dict[str, Any]:
    """The demo's figures of what ``pictures`` makes of prompts, for each set of them."""
    figures = {}
    for name in SUBJECT_SETS:
        subjects = evaluation_subjects(name)
        row = DigitEvaluator(subjects).row("", pictures([s.prompt for s in subjects]), steps, scale).to_dict()
        figures[name] = {key: round(value, 4) for key, value in row.items() if key in FIGURES}
    return figures
