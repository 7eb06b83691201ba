"""``python -m sid_train demo``: distil the embedded teacher, sample it, measure it, and show it."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from ..config import Config, load_config
from ..core.recipe import SiDRecipe
from ..core.timesteps import timestep_ladder
from ..files.atomic import replacing, write_text
from ..files.console import unbreakable_output
from ..files.logs import append_log, rewind_log
from ..files.reading import read_json, reading
from ..models.bundle import ModelBundle
from ..models.digits.data import HELD_OUT_SUBJECTS, TRAINING_SUBJECTS, Subject
from ..models.digits.layout import ARCHITECTURE
from ..models.families import export_generator, load_generator, load_model, open_generator
from ..models.family import ExportOptions
from ..sample import sample_images
from ..training.callbacks import Callback, Run
from ..training.trainer import Trainer
from .baselines import SAMPLING_SEED, SUBJECT_SETS, TEACHER_STEPS, evaluation_subjects, load_baselines, teacher_images
from .metrics import DigitEvaluator, Row
from .report import Comparison, count_steps, format_table, make_grid, make_report

CURVE_FILE = "curve.jsonl"
CURVE_IMAGES = 512
CURVE_POINTS = 6
CALIBRATION_ITERATIONS = 8
# Loading, export, evaluation, pictures and report on two CPU cores, in seconds, for --minutes.
OTHER_SECONDS = 60
PICTURES_PER_PROMPT = 4


class FrechetCurve(Callback):
    """The averaged generator's Frechet distance on held-out prompts, a few times a run."""

    def __init__(self) -> None:
        self.subjects = evaluation_subjects("held_out")[:CURVE_IMAGES]

    def on_start(self, run: Run) -> None:
        self.evaluator = DigitEvaluator(self.subjects)
        self.cond = run.bundle.conditioner.encode([s.prompt for s in self.subjects])
        rewind_log(run.folder.path / CURVE_FILE, run.iteration or -1)
        if run.iteration == 0:
            self._measure(run)

    def on_iteration(self, run: Run, losses: dict[str, float]) -> None:
        every = max(1, run.config.training.iterations // CURVE_POINTS)
        if run.iteration % every == 0:
            self._measure(run)

    def _measure(self, run: Run) -> None:
        latents = run.sample(self.cond, SAMPLING_SEED)
        frechet = self.evaluator.frechet(run.bundle.codec.decode(latents.cpu()).clamp(-1, 1))
        append_log(run.folder.path / CURVE_FILE, {"iteration": run.iteration, "frechet": frechet})


def demo_folder(steps: int, guidance: str | None, seed: int, minutes: float | None) -> Path:
    """The default folder, one for each set of options, so that the same command continues the same run."""
    parts = [f"{steps}step", guidance or "default", f"seed{seed}", *([f"{minutes:g}min"] if minutes else [])]
    return Path("sid-demo") / re.sub(r"[^\w.,=+-]", "_", "-".join(parts))  # what every file system takes


def demo_config(steps: int, guidance: str | None, seed: int, overrides: Sequence[str] = ()) -> Config:
    """The demo's configuration, for one or for several steps, with what the command line asks for."""
    timestep_ladder(steps)  # an error here names the argument
    asked = [f"method.steps={steps}", f"training.seed={seed}"]
    if guidance is not None:
        asked.append(f"method.guidance={guidance}")
    return load_config("demo-1step" if steps == 1 else "demo", [*asked, *overrides])


@unbreakable_output()
def run_demo(
    out: Path,
    steps: int = 4,
    guidance: str | None = None,
    seed: int = 0,
    minutes: float | None = None,
    full: bool = False,
    overrides: Sequence[str] = (),
) -> dict:
    """Runs or continues the demo in folder ``out``; returns the content of ``metrics.json``."""
    started = time.monotonic()
    config = demo_config(steps, guidance, seed, overrides)
    run_dir = out / "run"
    config.training.iterations = _decide_iterations(config, out, minutes)
    trainer = Trainer(config, run_dir, [FrechetCurve()])
    print(config.to_toml(), flush=True)
    if trainer.iteration < config.training.iterations:
        print(
            f"Distilling the embedded teacher into a {steps}-step generator: {config.training.iterations} iterations, "
            f"guidance {config.method.guidance}" + (f", from {trainer.iteration}" if trainer.iteration else ""),
            flush=True,
        )
    trainer.run()

    file = out / "generator.safetensors"
    export_generator(trainer.folder.open_generator(), file, ExportOptions())
    print(f"Exported {file}; measuring ...", flush=True)
    (generator, recipe), teacher = load_generator(str(file)), load_model("demo")
    baselines = load_baselines(teacher, recompute=full)
    rows = _all_rows(teacher, generator, recipe, baselines)

    metrics = {
        "seed": seed,
        "steps": steps,
        "guidance": config.method.guidance,
        "iterations": config.training.iterations,
        "seconds": round(time.monotonic() - started, 1),
        "peak_memory_mib": round(peak_memory_mib()),
        **_as_dicts(rows),
    }
    grid = make_grid(_comparison(teacher, generator, recipe, rows["held_out"][1].guidance_scale))
    with replacing(out / "grid.png") as temporary:
        grid.save(temporary, format="PNG")
    write_text(out / "report.html", make_report(metrics, recipe, grid, run_dir / CURVE_FILE))
    metrics |= {"seconds": round(time.monotonic() - started, 1), "peak_memory_mib": round(peak_memory_mib())}
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    print(format_table(metrics))
    print(f"\nPictures: {out / 'grid.png'}   Report: {out / 'report.html'}   Figures: {out / 'metrics.json'}")
    print(f"{metrics['seconds']:.0f} s, at most {metrics['peak_memory_mib']} MiB of memory")
    return metrics


def _decide_iterations(config: Config, out: Path, minutes: float | None) -> int:
    """What the configuration says, or what fits into ``minutes`` on this machine, which is measured once and kept."""
    if minutes is None:
        return config.training.iterations
    if not minutes > 0:
        raise ValueError(f"--minutes: expected more than 0, got {minutes:g}")
    path = out / "iterations.json"
    if path.is_file():
        with reading(path, "what 'demo --minutes' wrote"):
            kept = read_json(path)
            its_minutes, iterations = float(kept["minutes"]), int(kept["iterations"])
        if its_minutes != minutes:
            raise ValueError(f"--minutes: {out} holds a run of {its_minutes:g} minutes, not {minutes:g}")
        return iterations
    if (out / "run").exists():
        raise ValueError(f"--minutes: {out} holds a run that was started without it: choose another --out")
    iterations = int((minutes * 60 - OTHER_SECONDS) / _seconds_per_iteration(config))
    if iterations < 1:
        raise ValueError(f"--minutes: expected at least {OTHER_SECONDS // 60 + 1}, got {minutes:g}")
    write_text(path, json.dumps({"minutes": minutes, "iterations": iterations}) + "\n")
    return iterations


def _seconds_per_iteration(config: Config) -> float:
    """Measured on a run that is thrown away, every step k the same number of times."""
    with TemporaryDirectory() as folder:
        trial = Trainer(replace(config, training=replace(config.training, tracker="none")), Path(folder))
        steps = itertools.cycle(range(1, config.method.steps + 1))
        trial.train_iteration(next(steps))  # the first is slower
        count = config.method.steps * max(1, CALIBRATION_ITERATIONS // config.method.steps)
        begin = time.monotonic()
        for _ in range(count):
            trial.train_iteration(next(steps))
        return (time.monotonic() - begin) / count


def evaluate_generator(source: str) -> dict:
    """``rows`` (held-out prompts) and ``rows_trained_prompts`` for an exported generator, as in ``metrics.json``."""
    opened, teacher = open_generator(source), load_model("demo")
    if opened.model.architecture != ARCHITECTURE:
        raise ValueError(f"{source}: expected a generator of the demo's digits, got one of {opened.model.architecture}")
    generator, recipe = opened.load(), opened.recipe
    rows = _all_rows(teacher, generator, recipe, load_baselines(teacher))
    return _as_dicts(rows)


def _all_rows(
    teacher: ModelBundle, generator: ModelBundle, recipe: SiDRecipe, baselines: dict[str, list[Row]]
) -> dict[str, list[Row]]:
    return {name: baselines[name] + _measure(name, teacher, generator, recipe) for name in SUBJECT_SETS}


def _as_dicts(rows: dict[str, list[Row]]) -> dict[str, list[dict]]:
    return {
        "rows": [row.to_dict() for row in rows["held_out"]],
        "rows_trained_prompts": [row.to_dict() for row in rows["trained"]],
    }


def _measure(name: str, teacher: ModelBundle, generator: ModelBundle, recipe: SiDRecipe) -> list[Row]:
    """``undistilled`` and ``sid``: the teacher's weights and ours on the same ladder, with the same noise."""
    subjects = evaluation_subjects(name)
    evaluator = DigitEvaluator(subjects)
    prompts = [s.prompt for s in subjects]
    return [
        evaluator.row(row, sample_images(bundle, recipe, prompts, SAMPLING_SEED), recipe.steps)
        for row, bundle in (("undistilled", teacher), ("sid", generator))
    ]


def _comparison(teacher: ModelBundle, generator: ModelBundle, recipe: SiDRecipe, scale: float) -> Comparison:
    shown = _shown_subjects(HELD_OUT_SUBJECTS) + _shown_subjects(TRAINING_SUBJECTS)
    prompts = [s.prompt for s in shown for _ in range(PICTURES_PER_PROMPT)]
    pictures: list[tuple[str, Tensor]] = [
        (
            f"teacher, {count_steps(TEACHER_STEPS)}, CFG {scale:g}",
            teacher_images(teacher, prompts, scale, SAMPLING_SEED),
        ),
        (f"teacher, {count_steps(recipe.steps)}", sample_images(teacher, recipe, prompts, SAMPLING_SEED)),
        (f"SiD, {count_steps(recipe.steps)}", sample_images(generator, recipe, prompts, SAMPLING_SEED)),
    ]
    return Comparison(shown, pictures)


def _shown_subjects(subjects: tuple[Subject, ...]) -> list[Subject]:
    """One subject a digit, in changing colours."""
    of_digit = [[s for s in subjects if s.digit == d] for d in range(10)]
    return [choices[(5 * d) % len(choices)] for d, choices in enumerate(of_digit)]


def peak_memory_mib() -> float:
    """The largest resident set of this process so far."""
    if sys.platform.startswith("linux"):
        # Not getrusage: it counts what the process that started this one had at that time.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**10
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
