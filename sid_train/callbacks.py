"""What a run tells: progress, log lines, trackers, image grids. None of it touches the run's randomness."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from .files import replacing, write_text
from .images import image_grid, to_pil
from .sample import sample_latents

if TYPE_CHECKING:
    from .trainer import Trainer

LOG_FILE = "log.jsonl"


class Callback:
    """Called on the main process only, or on ``every_rank`` where it uses a network, which may be sharded."""

    every_rank = False

    def on_start(self, trainer: Trainer) -> None: ...

    def on_iteration(self, trainer: Trainer, losses: dict[str, float]) -> None: ...

    def on_end(self, trainer: Trainer) -> None: ...


class Progress(Callback):
    """A progress bar on a terminal, a log line a period elsewhere; ``log.jsonl`` in the run folder either way."""

    def __init__(self, log_every: int):
        self.log_every = log_every
        self.bar: tqdm | None = None
        self.values: dict[str, list[float]] = {}

    def on_start(self, trainer: Trainer) -> None:
        self.log = trainer.run_dir / LOG_FILE
        rewind_log(self.log, trainer.iteration)
        self.started, self.first = time.monotonic(), trainer.iteration
        if sys.stderr.isatty():
            total = trainer.config.training.iterations
            self.bar = tqdm(total=total, initial=trainer.iteration, unit="it", dynamic_ncols=True)

    def on_iteration(self, trainer: Trainer, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            self.values.setdefault(name, []).append(value)
        if self.bar is not None:
            self.bar.update()
        if trainer.iteration % self.log_every and trainer.iteration != trainer.config.training.iterations:
            return
        means = {name: fmean(values) for name, values in self.values.items()}
        self.values = {}
        elapsed = time.monotonic() - self.started
        rate = (trainer.iteration - self.first) / elapsed
        images_per_second = rate * trainer.config.training.batch_size
        entry = {"iteration": trainer.iteration, "images": trainer.images_seen, "losses": means}
        append_log(self.log, entry | {"images_per_second": images_per_second})
        trainer.accelerator.log(means | {"images_per_second": images_per_second}, step=trainer.iteration)
        text = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        if self.bar is not None:
            self.bar.set_postfix_str(f"{text} {images_per_second:.1f} img/s")
        else:
            left = (trainer.config.training.iterations - trainer.iteration) / rate
            print(
                f"iteration {trainer.iteration}/{trainer.config.training.iterations}  {text}  "
                f"{images_per_second:.1f} img/s  {_duration(left)} left",
                flush=True,
            )

    def on_end(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.close()


class Pictures(Callback):
    """Pictures of the averaged generator for prompts spread evenly over the run's own, always with the same noise."""

    PICTURES = 32
    SEED = 0
    every_rank = True

    def __init__(self, every: int):
        self.every = every

    def on_start(self, trainer: Trainer) -> None:
        rows = torch.linspace(0, len(trainer.prompts.prompts) - 1, self.PICTURES).long().tolist()
        self.prompts = [trainer.prompts.prompts[row] for row in rows]
        self.cond = trainer.prompts.read(rows)

    def on_iteration(self, trainer: Trainer, losses: dict[str, float]) -> None:
        if trainer.iteration % self.every:
            return
        latents = sample_latents(
            trainer.ema.average, self.cond, trainer.bundle.latent_shape, trainer.recipe(), self.SEED
        )
        if trainer.accelerator.is_main_process:
            self.show(trainer, trainer.bundle.codec.decode(latents.cpu()))

    def show(self, trainer: Trainer, images: torch.Tensor) -> None:
        """On the main process: images [PICTURES, 3, H, W] in [-1, 1], not clamped."""
        raise NotImplementedError


class Grids(Pictures):
    """A picture of them every ``every`` iterations."""

    COLUMNS = 8

    def show(self, trainer: Trainer, images: torch.Tensor) -> None:
        grid = image_grid(images, columns=self.COLUMNS)
        with replacing(trainer.run_dir / "grids" / f"{trainer.iteration:06d}.png") as temporary:
            to_pil(grid).save(temporary, format="PNG")
        log_image(trainer.accelerator, "samples", grid, trainer.iteration)


class SnapshotScores(Pictures):
    """The CLIP score of every snapshot, in ``clip.jsonl``."""

    FILE = "clip.jsonl"

    def __init__(self, every: int, clip_model: str):
        from .clip_score import CLIPScorer  # transformers' models are slow to import, and only this needs them

        super().__init__(every)
        self.scorer = CLIPScorer(clip_model)

    def on_start(self, trainer: Trainer) -> None:
        super().on_start(trainer)
        if trainer.accelerator.is_main_process:
            rewind_log(trainer.run_dir / self.FILE, trainer.iteration)

    def show(self, trainer: Trainer, images: torch.Tensor) -> None:
        score = self.scorer.score(images, self.prompts)
        append_log(trainer.run_dir / self.FILE, {"iteration": trainer.iteration, "clip_score": score})
        trainer.accelerator.log({"clip_score": score}, step=trainer.iteration)


def best_snapshot(run_dir: Path) -> int:
    """The iteration of the snapshot with the highest CLIP score; 0 where a run has none, so that its last checkpoint is
    the best that is known.
    """
    scores = read_log(run_dir / SnapshotScores.FILE)
    return max(scores, key=lambda entry: entry["clip_score"])["iteration"] if scores else 0


def log_image(accelerator: Accelerator, name: str, image: torch.Tensor, step: int) -> None:
    """Gives an image [3, H, W] in [-1, 1], which is clamped, to each tracker, in 8 bits with channels last: wandb takes
    no other layout.
    """
    pixels = np.asarray(to_pil(image))[None]
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels}, step=step, **layout)


def read_log(path: Path) -> list[dict]:
    """The entries of a log with one JSON object a line, oldest first; none if there is no file."""
    entries = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # torn by a crash; what follows is repeated anyway
    return entries


def append_log(path: Path, entry: dict) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


def rewind_log(path: Path, iteration: int) -> None:
    """Drops the entries after ``iteration``: a run that is continued repeats what came after its last checkpoint."""
    kept = [entry for entry in read_log(path) if entry["iteration"] <= iteration]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
