"""What a run tells: progress, log lines, trackers, image grids. None of it touches the run's randomness."""

from __future__ import annotations

import sys
import time
from statistics import fmean
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..config import Config
from ..data.rows import PromptTable
from ..evaluation.metric import PictureMetric
from ..files.atomic import replacing
from ..files.images import image_grid, to_pil
from ..files.logs import append_log, rewind_log
from ..models.bundle import ModelBundle
from ..models.conditioning import Conditioning
from .run import RunFolder


class Run(Protocol):
    """What a callback may ask of a run.

    iteration: finished ones
    gradient_norms: of the last update of each network, before clipping
    images_seen: generated for training so far, over all ranks
    """

    config: Config
    folder: RunFolder
    bundle: ModelBundle
    prompts: PromptTable
    iteration: int
    gradient_norms: dict[str, float]

    @property
    def images_seen(self) -> int: ...

    @property
    def is_main_process(self) -> bool: ...

    def sample(self, cond: Conditioning, seed: int) -> torch.Tensor:
        """Latents of the averaged generator; every rank must call it."""
        ...

    def track(self, values: dict[str, float]) -> None:
        """Gives figures of this iteration to the tracker."""
        ...

    def track_image(self, name: str, image: torch.Tensor) -> None:
        """Gives an image [3, H, W] in [-1, 1] to the tracker."""
        ...


class Callback:
    """Called on the main process only, or on ``every_rank`` where it uses a network, which may be sharded."""

    every_rank = False

    def on_start(self, run: Run) -> None: ...

    def on_iteration(self, run: Run, losses: dict[str, float]) -> None: ...

    def on_end(self, run: Run) -> None: ...


class Progress(Callback):
    """A progress bar on a terminal, a log line a period elsewhere; ``log.jsonl`` in the run folder either way."""

    def __init__(self, log_every: int):
        self.log_every = log_every
        self.bar: tqdm | None = None
        self.values: dict[str, list[float]] = {}

    def on_start(self, run: Run) -> None:
        self.log = run.folder.log
        if dropped := rewind_log(self.log, run.iteration):
            print(f"{self.log}: {dropped} line(s) that are no entries are dropped", file=sys.stderr, flush=True)
        self.started, self.first = time.monotonic(), run.iteration
        if sys.stderr.isatty():
            total = run.config.training.iterations
            self.bar = tqdm(total=total, initial=run.iteration, unit="it", dynamic_ncols=True)

    def on_iteration(self, run: Run, losses: dict[str, float]) -> None:
        for name, value in losses.items():
            self.values.setdefault(name, []).append(value)
        if self.bar is not None:
            self.bar.update()
        if run.iteration % self.log_every and run.iteration != run.config.training.iterations:
            return
        means = {name: fmean(values) for name, values in self.values.items()}
        self.values = {}
        elapsed = time.monotonic() - self.started
        rate = (run.iteration - self.first) / elapsed
        images_per_second = rate * run.config.training.batch_size
        entry = {"iteration": run.iteration, "images": run.images_seen, "losses": means}
        entry |= {"gradient_norms": dict(run.gradient_norms), "images_per_second": images_per_second}
        append_log(self.log, entry)
        run.track(means | {"images_per_second": images_per_second})
        text = " ".join(f"{name} {value:.3f}" for name, value in means.items())
        if self.bar is not None:
            self.bar.set_postfix_str(f"{text} {images_per_second:.1f} img/s")
        else:
            left = (run.config.training.iterations - run.iteration) / rate
            print(
                f"iteration {run.iteration}/{run.config.training.iterations}  {text}  "
                f"{images_per_second:.1f} img/s  {_duration(left)} left",
                flush=True,
            )

    def on_end(self, run: Run) -> None:
        if self.bar is not None:
            self.bar.close()


class Pictures(Callback):
    """Pictures of the averaged generator for prompts spread evenly over the run's own, always with the same noise."""

    PICTURES = 32
    NOISES = 1
    """Pictures of each prompt."""
    SEED = 0
    every_rank = True

    def __init__(self, every: int):
        self.every = every

    def on_start(self, run: Run) -> None:
        spread = torch.linspace(0, len(run.prompts.prompts) - 1, self.PICTURES // self.NOISES).long()
        rows = spread.repeat_interleave(self.NOISES).tolist()
        self.prompts = [run.prompts.prompts[row] for row in rows]
        self.cond = run.prompts.read(rows)

    def on_iteration(self, run: Run, losses: dict[str, float]) -> None:
        if run.iteration % self.every:
            return
        latents = run.sample(self.cond, self.SEED)
        if run.is_main_process:
            self.show(run, run.bundle.codec.decode(latents.cpu()))

    def show(self, run: Run, images: torch.Tensor) -> None:
        """On the main process: images [PICTURES, 3, H, W] in [-1, 1], not clamped."""
        raise NotImplementedError


class Grids(Pictures):
    """A picture of them every ``every`` iterations."""

    COLUMNS = 8

    def show(self, run: Run, images: torch.Tensor) -> None:
        grid = image_grid(images, columns=self.COLUMNS)
        with replacing(run.folder.grid(run.iteration)) as temporary:
            to_pil(grid).save(temporary, format="PNG")
        run.track_image("samples", grid)


class SnapshotScores(Pictures):
    """A score of every snapshot's pictures, in a log of the run's folder."""

    def __init__(self, every: int, metric: PictureMetric):
        super().__init__(every)
        self.metric = metric

    def on_start(self, run: Run) -> None:
        super().on_start(run)
        if run.is_main_process:
            rewind_log(run.folder.scores(self.metric.name), run.iteration)

    def show(self, run: Run, images: torch.Tensor) -> None:
        values = {self.metric.name: self.metric.score(images, self.prompts)}
        append_log(run.folder.scores(self.metric.name), {"iteration": run.iteration} | values)
        run.track(values)


def log_image(accelerator: Accelerator, name: str, image: torch.Tensor, step: int) -> None:
    """Gives an image [3, H, W] in [-1, 1], which is clamped, to each tracker, in 8 bits with channels last: wandb takes
    no other layout.
    """
    pixels = np.asarray(to_pil(image))[None]
    for tracker in accelerator.trackers:
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({name: pixels}, step=step, **layout)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
