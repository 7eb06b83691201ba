"""Signs that a run collapses, said when they are seen. Nothing is stopped.

Each names the iteration, and the snapshot to go back to.
"""

from __future__ import annotations

import sys
from collections import deque
from statistics import fmean, median

import torch
from torch import Tensor

from ..files.logs import append_log, read_log, rewind_log
from ..method.base import role_name
from .callbacks import Callback, Pictures, Run


class Band:
    """The last values of a figure, and whether another one leaves their band.

    What a run grows into slowly is no alarm: where adapters are trained, all networks start alike, and the generator's
    loss starts at 0.

    above, below: how many times the median of the last values, and which part of the largest of them
    """

    WINDOW = 20

    def __init__(self, above: float = 0.0, below: float = 0.0, enough: int = 10):
        self.above, self.below, self.enough = above, below, enough
        self.values: deque[float] = deque(maxlen=self.WINDOW)
        self.is_out = False

    def leaves(self, value: float) -> str:
        """How ``value`` is out of the band, in words; "" where it is not, and where the one before was, too."""
        told = ""
        if len(self.values) >= self.enough:
            usual, most = median(self.values), max(self.values)
            if self.above and usual and value > self.above * usual:
                told = f"{value:.3g}, {value / usual:.1f} times the usual {usual:.3g}"
            elif self.below and value < self.below * most:
                told = f"{value:.3g}, {value / most:.2f} of the {most:.3g} that it was"
        was_out, self.is_out = self.is_out, bool(told)
        self.values.append(value)
        return "" if was_out else told


def tell(run: Run, what: str) -> None:
    """Prints an alarm, and keeps it in the run's folder."""
    kept = run.folder.snapshots()
    before = [iteration for iteration in kept if iteration < run.iteration]
    back = (
        f"the last snapshot before it is that of iteration {before[-1]}: export --iteration {before[-1]}"
        if before
        else "no snapshot from before it is kept (training.snapshot_every)"
    )
    print(f"warning: iteration {run.iteration}: {what}; {back}", file=sys.stderr, flush=True)
    append_log(run.folder.alarms, {"iteration": run.iteration, "alarm": what})


class LossAlarms(Callback):
    """The size of losses and gradients, means over ``training.log_every`` iterations."""

    ABOVE = 5.0

    def on_start(self, run: Run) -> None:
        rewind_log(run.folder.alarms, run.iteration)
        self.sizes: dict[str, list[float]] = {}
        self.bands: dict[str, Band] = {}

    def on_iteration(self, run: Run, losses: dict[str, float]) -> None:
        sizes = {f"the loss {name}": abs(value) for name, value in losses.items()}
        sizes |= {f"the gradient of the {role_name(role)}": norm for role, norm in run.gradient_norms.items()}
        for name, value in sizes.items():
            self.sizes.setdefault(name, []).append(value)
        if run.iteration % run.config.training.log_every:
            return
        for name, values in self.sizes.items():
            if told := self.bands.setdefault(name, Band(above=self.ABOVE)).leaves(fmean(values)):
                tell(run, f"{name} leaves its band: {told}")
        self.sizes = {}


class PictureAlarms(Pictures):
    """The averaged generator's pictures: whether they become more saturated, and those of one prompt more alike."""

    NOISES = 8
    SATURATED, ALIKE = 1.5, 0.5

    def on_start(self, run: Run) -> None:
        super().on_start(run)
        self.saturation, self.variety = Band(above=self.SATURATED, enough=3), Band(below=self.ALIKE, enough=3)
        if run.is_main_process:
            rewind_log(run.folder.looks, run.iteration)
            for entry in read_log(run.folder.looks):
                self.saturation.leaves(entry["saturation"])
                self.variety.leaves(entry["variety"])

    def show(self, run: Run, images: Tensor) -> None:
        looks = {"saturation": saturation(images), "variety": variety(images, self.NOISES)}
        append_log(run.folder.looks, {"iteration": run.iteration, **looks})
        run.track(looks)
        if told := self.saturation.leaves(looks["saturation"]):
            tell(run, f"the pictures are more saturated than they were: {told}")
        if told := self.variety.leaves(looks["variety"]):
            tell(run, f"the pictures of one prompt are more alike than they were: {told}")


def saturation(images: Tensor) -> float:
    """Mean difference of a pixel's largest and smallest channel, of images [N, 3, H, W] in [-1, 1]: 0 is grey, 1 is
    full colour.
    """
    pixels = (images.clamp(-1, 1) + 1) / 2
    return float((pixels.amax(1) - pixels.amin(1)).mean())


def variety(images: Tensor, n: int) -> float:
    """Mean distance of two of the ``n`` pictures of a prompt, of images [prompts * n, 3, H, W] in the order of their
    prompts: the root of the mean square over pixels.
    """
    grouped = images.clamp(-1, 1).reshape(len(images) // n, n, -1).float()
    distances = torch.cdist(grouped, grouped) / grouped.shape[-1] ** 0.5
    return float(distances.sum() / (len(grouped) * n * (n - 1)))
