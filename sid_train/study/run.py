"""Runs the study's cells, one after another, and keeps their figures in one file."""

from __future__ import annotations

import hashlib
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
from ..demo.baselines import SAMPLING_SEED, cache_key, measure_sets, teacher_images
from ..demo.calls import calls_an_iteration
from ..demo.report import FIGURES
from ..errors import NonFiniteError
from ..files.atomic import write_text
from ..files.reading import read_json, reading, shown
from ..models.bundle import ModelBundle
from ..models.digits.data import RealDigits
from ..models.families import export_generator, load_generator, load_model
from ..models.family import ExportOptions
from ..sample import sample_images
from ..training.trainer import Trainer
from .cells import BUDGET, CELLS, Cell, TeacherCell

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

    def figures_of(self, job: Job) -> dict[str, Any] | None:
        """A job's row; None where there is none, or where its cell was another then."""
        row = self.rows.get(job.key)
        return row if row is not None and row["cell"] == identity_of(job.cell) else None

    def add(self, key: str, row: dict[str, Any]) -> None:
        self.rows[key] = row
        rows = dict(sorted(self.rows.items()))
        write_text(self.path, json.dumps({"made_with": _made_with(), "rows": rows}, indent=1) + "\n")


def _made_with() -> dict[str, Any]:
    return cache_key() | {"network_calls": BUDGET}


def run_study(jobs: Sequence[Job], out: Path, results: Results, workers: int) -> None:
    """Runs the jobs that ``results`` has no figures of: in ``workers`` processes of one thread each, or in this one.
    ValueError in the end where some failed; the others' figures are kept.
    """
    missing = [job for job in jobs if results.figures_of(job) is None]
    for job in list(missing):
        first = _start_of(job)
        known = {other.key for other in missing}
        if first is not None and first.key not in known and not generator_file(first, out).is_file():
            missing.insert(0, first)
    print(f"{len(missing)} of {len(jobs)} to run, in {out}; figures go to {results.path}", flush=True)
    failed: list[str] = []
    for job, row in _all_done(missing, out, workers):
        if isinstance(row, Exception):
            failed.append(f"{job.key} ({shown(row, 200)})")
            print(f"{job.key}: failed: {shown(row, 200)}", flush=True)
            continue
        results.add(job.key, row)
        for steps, sets in row["figures"].items():
            figures = sets["held_out"]
            print(
                f"{job.key:<28} K = {steps:<3} Frechet {figures['frechet']:.3f}  "
                f"accuracy {figures['prompt_accuracy']:.3f}  recall {figures['recall']:.3f}",
                flush=True,
            )
    if failed:
        raise ValueError(f"{len(failed)} of the study's jobs failed: {'; '.join(failed)}. The same command tries again")


def _all_done(jobs: Sequence[Job], out: Path, workers: int) -> Iterator[tuple[Job, dict[str, Any] | Exception]]:
    """Jobs with their figures, or with why there are none, as they end."""
    if workers == 1:
        yield from ((job, _tried(job, out)) for wave in _waves(jobs) for job in wave)
        return
    context = multiprocessing.get_context("spawn")
    for wave in _waves(jobs):
        with ProcessPoolExecutor(min(workers, len(wave)), mp_context=context, initializer=_one_thread) as pool:
            running = {pool.submit(_tried, job, out): job for job in wave}
            yield from ((running[done], done.result()) for done in as_completed(running))


def _waves(jobs: Iterable[Job]) -> Iterator[list[Job]]:
    """Those first that others start from."""
    later = [job for job in jobs if isinstance(job.cell, Cell) and job.cell.starts_from]
    yield from filter(None, ([job for job in jobs if job not in later], later))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _tried(job: Job, out: Path) -> dict[str, Any] | Exception:
    try:
        return run_job(job, out)
    except (ValueError, NonFiniteError) as error:
        return error


def _start_of(job: Job) -> Job | None:
    """What makes the generator that a job starts from."""
    if isinstance(job.cell, TeacherCell) or not job.cell.starts_from:
        return None
    return Job(CELLS[job.cell.starts_from], job.seed)


def generator_file(job: Job, out: Path) -> Path:
    return out / job.cell.name / str(job.seed) / GENERATOR


def run_job(job: Job, out: Path) -> dict[str, Any]:
    """The figures of a job: by number of steps, and of each by set of prompts."""
    if isinstance(job.cell, TeacherCell):
        return _measure_teacher(job.cell)
    return _distil(job.cell, job.seed, out)


def cell_config(cell: Cell, seed: int, out: Path, iterations: int = 1) -> Config:
    asked = [*cell.overrides, f"training.seed={seed}", f"training.iterations={iterations}", "training.tracker=none"]
    if cell.starts_from:
        asked.append(f"model.init_generator={generator_file(Job(CELLS[cell.starts_from], seed), out)}")
    return load_config("demo", asked)


def identity_of(cell: Cell | TeacherCell) -> str:
    """Of all that a cell's figures follow from, beside its seed and the code."""
    facts: dict[str, Any] = {name: value for name, value in vars(cell).items() if name not in ("group", "told")}
    if isinstance(cell, Cell):
        config = cell_config(cell, 0, Path())
        facts |= {key: value for key, value in config.flat().items() if key != "model.init_generator"}
        if cell.starts_from:
            facts["starts_from"] = identity_of(CELLS[cell.starts_from])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _distil(cell: Cell, seed: int, out: Path) -> dict[str, Any]:
    file = generator_file(Job(cell, seed), out)
    calls = _calls(cell, seed, out)
    iterations = max(1, round(cell.budget * BUDGET / calls))
    began = time.monotonic()
    trainer = Trainer(cell_config(cell, seed, out, iterations), file.parent / "run")
    if cell.pairs_of != "teacher":
        trainer.passes.pairs.real = RealDigits(cell.pairs_of)
    continued = trainer.iteration > 0
    trainer.run()
    seconds = time.monotonic() - began
    export_generator(trainer.folder.open_generator(), file, ExportOptions())
    generator, recipe = load_generator(str(file))
    return {
        "cell": identity_of(cell),
        "iterations": iterations,
        "calls_an_iteration": calls,
        # Of a run that was interrupted the time is not known.
        "seconds": None if continued else round(seconds, 1),
        "figures": {str(steps): _measure(generator, recipe, steps) for steps in cell.sampled or (recipe.steps,)},
    }


def _calls(cell: Cell, seed: int, out: Path) -> float:
    """Of an iteration, for each picture of the batch: of one that is late enough for all that waits."""
    config = cell_config(cell, seed, out)
    waited = max(config.gan.start_images, config.training.generator_start_images) // config.training.batch_size + 1
    with TemporaryDirectory() as folder:
        trainer = Trainer(cell_config(cell, seed, out, 2 * waited), Path(folder))
        trainer.iteration = waited
        return calls_an_iteration(trainer)


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
    return {"cell": identity_of(cell), "seconds": round(time.monotonic() - began, 1), "figures": figures}


def _figures(pictures: Callable[[list[str]], torch.Tensor], steps: int, scale: float = 1.0) -> dict[str, Any]:
    """The demo's figures of what ``pictures`` makes of prompts, for each set of them."""
    rows = measure_sets("", pictures, steps, scale)
    return {name: {key: round(getattr(row, key), 4) for key in FIGURES} for name, row in rows.items()}
