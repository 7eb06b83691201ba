"""``distill``: trains a generator and exports it."""

from __future__ import annotations

from pathlib import Path

from ..config import load_config
from ..files.console import unbreakable_output
from ..models.families import default_format, export_generator
from ..models.family import ExportOptions
from ..training.alarms import LossAlarms, PictureAlarms
from ..training.callbacks import Callback, Grids, SnapshotScores
from ..training.distributed import is_first_process
from ..training.run import RunFolder
from ..training.trainer import Trainer
from .dry_run import describe_run
from .plan import hardware_of_run, refuse_what_cannot_fit


@unbreakable_output()
def distill(config: str, overrides: list[str], out: Path, dry_run: bool, force: bool) -> None:
    settings = load_config(config, overrides)
    if is_first_process():
        print(settings.to_toml(), flush=True)
    hardware = hardware_of_run()
    if hardware is not None and is_first_process() and not force:
        refuse_what_cannot_fit(settings, hardware)
    if dry_run:
        if is_first_process():
            print(describe_run(settings, out))
        return
    training = settings.training
    callbacks: list[Callback] = [LossAlarms()]
    if training.grid_every:
        callbacks += [Grids(training.grid_every), PictureAlarms(training.grid_every)]
    if training.clip_model:
        from ..evaluation.clip_score import CLIPScorer  # slow to import, and few runs need it

        callbacks.append(SnapshotScores(training.snapshot_every, CLIPScorer(training.clip_model)))
    trainer = Trainer(settings, out, callbacks)
    trainer.run()
    if trainer.is_main_process:
        _export(trainer.folder)


def _export(folder: RunFolder) -> None:
    """The best generator of a run that has ended, beside it."""
    file, best = folder.path / "generator.safetensors", folder.best_snapshot()
    generator = folder.open_generator(best)
    export_generator(generator, file, ExportOptions())
    if best:
        print(f"The snapshot of iteration {best} has the highest CLIP score (clip.jsonl).")
    base = f" --base {folder.read_config().model.teacher}" if default_format(generator) == "lora" else ""
    print(f"Exported {file}. Sample it: python -m sid_train sample {file}{base} --prompt ...")
