"""A run's folder: what is in it, and what it says of the run."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from ..config import Config, config_from_dict, config_sections, read_toml
from ..core.recipe import SiDRecipe, TrainingGuidance
from ..core.timesteps import timestep_ladder
from ..files.atomic import remove_leftovers, sync_folder, write_text
from ..files.hashing import file_sha256
from ..files.locks import lock_folder
from ..files.reading import read_json
from ..files.tensors import DamagedFile
from ..method.methods import METHODS
from ..models.adapters import adapter_from_state
from ..models.bundle import ModelBundle
from ..models.family import Generator
from ..models.networks import AVERAGE
from .checkpoint import open_network, read_facts, read_network, verify_checkpoint
from .identity import changes, config_of, forbidden_changes, require_same_teacher
from .layout import RunLayout
from .teacher import open_teacher


class RunFolder(RunLayout):
    """The folder of one run: names, configuration, checkpoints, snapshots, logs and the generator that it trained."""

    def __init__(self, path: Path):
        super().__init__(path)
        self._teacher = path / "teacher.json"
        self._checkpoint = path / "checkpoint.safetensors"  # the last one; those before it are in the folder
        self._checkpoint_folder = path / "checkpoints"  # with training.sharding all of them, a folder each
        self._set_aside = path / "set-aside"

    # -- configuration -------------------------------------------------------------------------------------------

    def read_config(self) -> Config:
        """The configuration of the run that is here; the last checkpoint's where config.toml is missing or damaged."""
        stored, problem = self._stored_config()
        if stored is None:
            stored = self._checkpoint_config()
        if stored is None:
            raise ValueError(problem)
        return stored

    def require_config(self, config: Config) -> list[str]:
        """What ``config`` changes in the run that is here, and may change, a line each. ValueError where it would be
        another run. Paths may change: what is there is compared when it is read.
        """
        stored, problem = self._stored_config()
        if stored is not None:
            if differ := forbidden_changes(stored, config):
                raise ValueError(
                    f"{self.path} holds a run with another configuration: {', '.join(differ)}. "
                    f"Choose another --out, or the same values to continue it."
                )
            return [f"continues with another value of {change}" for change in changes(stored, config)]
        if self.last_checkpoint() is None:
            is_new = not self.config_file.exists()
            return [] if is_new else [f"{problem}; nothing was trained yet, and it is written anew"]
        # Nothing says which values were changed on purpose: only the very same configuration is sure to continue it.
        saved = self._checkpoint_config()
        if saved is None:
            raise ValueError(
                f"{problem}, and its checkpoint does not say how it was configured: put the file back, or choose "
                "another --out"
            )
        if differ := changes(saved, config):
            raise ValueError(
                f"{problem}, and its checkpoint was made with another configuration: {', '.join(differ)}. Put the file "
                "back, give the same values, or choose another --out."
            )
        return [f"{problem}; it is written anew from the last checkpoint"]

    def claim(self, config: Config) -> None:
        """Makes the folder that of a run with this configuration."""
        write_text(self.config_file, config.to_toml())

    def _stored_config(self) -> tuple[Config | None, str]:
        """What config.toml says; without it None, and what is wrong with it."""
        if not self.config_file.is_file():
            return None, f"{self.path}: expected a run folder, but it has no {self.config_file.name}"
        try:
            tables = read_toml(self.config_file)
            if tables.keys() != set(config_sections()):  # all are written, be it with defaults
                raise ValueError(f"{self.config_file}: it is not whole")
            return config_from_dict(tables, str(self.config_file)), ""
        except ValueError as error:
            return None, str(error)

    def _checkpoint_config(self) -> Config | None:
        for path in reversed(self.checkpoints()):
            with suppress(ValueError, OSError):  # a damaged one, of which a run that continues tells
                verify_checkpoint(path)
                return config_of(read_facts(path), path)
        return None

    # -- one process at a time -------------------------------------------------------------------------------------

    def lock(self) -> FileLock:
        """A lock on the folder, held until it is released. ValueError while another process trains here."""
        self.path.mkdir(parents=True, exist_ok=True)
        return lock_folder(self.path, "another process is training in this folder")

    def remove_leftovers(self) -> None:
        """Removes what killed processes left half written; for whoever holds the lock."""
        for folder in (self.path, self._checkpoint_folder, self.snapshot_folder, self.path / "grids"):
            remove_leftovers(folder)

    # -- the teacher ---------------------------------------------------------------------------------------------

    def sha256(self, path: Path) -> str:
        """SHA-256 of the teacher's file, hex: what ``remember_teacher`` kept of the very same file, or computed."""
        try:
            kept = read_json(self._teacher)
        except (OSError, ValueError):  # there is none, or it is torn
            kept = None
        if isinstance(kept, dict) and kept.get("file") == _identity(path) and isinstance(kept.get("sha256"), str):
            return kept["sha256"]
        return file_sha256(path)

    def remember_teacher(self, path: Path, sha256: str) -> None:
        """Keeps the hash of a file of several gigabytes beside the run, so that it is read once."""
        write_text(self._teacher, json.dumps({"file": _identity(path), "sha256": sha256}) + "\n")

    # -- checkpoints and snapshots -------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Those that are there, oldest first: files, or folders of a sharded run."""
        last = [self._checkpoint] if self._checkpoint.is_file() else []
        found = self._checkpoint_folder.glob("[0-9]*")
        ours = [path for path in found if re.fullmatch(r"\d{7,}(\.safetensors|\.replaced)?", path.name)]
        return sorted(ours, key=lambda path: (int(path.name.partition(".")[0]), path.name)) + last

    def kept(self) -> list[Path]:
        """All checkpoints and snapshots, files or folders."""
        return self.checkpoints() + sorted(self.snapshot_folder.glob("[0-9]*"))

    def last_checkpoint(self) -> Path | None:
        """The newest; None if there is none yet."""
        found = self.checkpoints()
        return found[-1] if found else None

    def good_checkpoint(self) -> tuple[Path | None, list[tuple[Path, str]]]:
        """The newest that is not damaged, which is what a run continues from, and the damaged ones after it, each with
        what is wrong. Reads them whole (see ``verify_checkpoint``). ValueError where all are damaged.
        """
        damaged: list[tuple[Path, str]] = []
        for path in reversed(self.checkpoints()):
            try:
                verify_checkpoint(path)
                return path, damaged
            except DamagedFile as error:
                damaged.append((path, str(error)))
        if damaged:
            raise ValueError(
                f"{self.path}: no checkpoint is whole: {'; '.join(problem for _, problem in damaged)}. Put a copy "
                "back, or remove them to start again"
            )
        return None, []

    def new_checkpoint(self, iteration: int, sharded: bool) -> Path:
        """Where the next checkpoint goes: in the place of the last one (see ``keep_last_checkpoint``), or beside it."""
        return self._checkpoint_folder / f"{iteration:07d}" if sharded else self._checkpoint

    def keep_last_checkpoint(self) -> None:
        """Gives the last one a name that the next one does not take; a folder has its own."""
        if not self._checkpoint.is_file():
            return
        try:
            iteration = int(read_facts(self._checkpoint)["iteration"])
        except ValueError:  # damaged since it was written: there is nothing to keep
            self.set_aside(self._checkpoint)
            return
        self._checkpoint_folder.mkdir(exist_ok=True)
        name = self._checkpoint_folder / f"{iteration:07d}.safetensors"
        name.unlink(missing_ok=True)
        try:
            os.link(self._checkpoint, name)
        except OSError:  # a file system without links
            self._checkpoint.rename(name)
        sync_folder(self._checkpoint_folder)

    def drop_old_checkpoints(self, keep: int) -> None:
        """Leaves the last ``keep``, of which the newest was just written."""
        for old in self.checkpoints()[:-keep]:
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()

    def set_aside(self, path: Path) -> Path:
        """Takes a checkpoint from which nothing can go on out of the way, and returns where it is now."""
        self._set_aside.mkdir(exist_ok=True)
        target = self._set_aside / path.name
        if target.is_dir():
            shutil.rmtree(target)
        return path.replace(target)

    def snapshot(self, iteration: int, sharded: bool) -> Path:
        """Where the averaged generator of an iteration is kept: a file, or a folder of a sharded run."""
        folder = self.snapshot_folder / f"{iteration:07d}"
        return folder if sharded else folder.with_suffix(".safetensors")

    # -- the generator -------------------------------------------------------------------------------------------

    def generator_file(self, iteration: int = 0) -> Path:
        """What holds the averaged generator, a file or a folder: as it was after ``iteration``, or in the last
        checkpoint (0). ValueError if the run does not keep it.
        """
        if not iteration:
            if (path := self.last_checkpoint()) is None:
                raise ValueError(f"{self.path}: the run has no checkpoint (yet)")
            return path
        file, folder = (self.snapshot(iteration, sharded) for sharded in (False, True))
        if not file.is_file() and not folder.is_dir():
            raise ValueError(f"{file}: the run has no such snapshot (yet); training.snapshot_every says which it keeps")
        return file if file.is_file() else folder

    def open_generator(self, iteration: int = 0, teacher: str | None = None) -> Generator:
        """The averaged generator (see ``generator_file``) with its recipe, its tensors not in memory. DamagedFile where
        its file is not what was written.

        teacher: where the run's teacher is now, if it was moved
        """
        config, path = self.read_config(), self.generator_file(iteration)
        try:
            verify_checkpoint(path)
        except DamagedFile as error:
            raise DamagedFile(
                f"{error}: export another --iteration, or let distill continue and write it anew"
            ) from None
        try:
            model = open_teacher(replace(config.model, teacher=teacher or config.model.teacher))
        except ValueError as error:
            raise ValueError(f"{error} (the run's teacher: if it was moved, give it as --base)") from None
        bundle = model.load(None, config.model.resolution)
        bundle.file_hash = self.sha256(bundle.weights)
        facts = read_facts(path)
        require_same_teacher(facts, bundle.file_hash, path)
        recipe = make_recipe(config, bundle, int(facts["iteration"]), int(facts["images_seen"]))
        if config.adapter.rank:
            return Generator(model, recipe, model.tensors, adapter_from_state(read_network(path, AVERAGE)), path)
        network = {name.removeprefix(model.prefix): tensor for name, tensor in open_network(path, AVERAGE).items()}
        return Generator(model, recipe, network, source=path)


def _identity(path: Path) -> list[str | int]:
    """A file's place, size and time of change: while they stay, so does what is in it."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def make_recipe(config: Config, teacher: ModelBundle, iterations: int, images_seen: int) -> SiDRecipe:
    """The recipe of a generator that ``config`` distilled from ``teacher``."""
    method, strategy, kind = config.method, config.method.strategy, METHODS[config.method.kind]
    timesteps = teacher.denoiser.schedule.ladder(method.steps, method.t_init)
    return SiDRecipe(
        base_model=teacher.name,
        architecture=teacher.architecture,
        prediction_type=teacher.denoiser.schedule.prediction_type,
        zero_terminal_snr=teacher.zero_terminal_snr,
        unconditional=config.model.unconditional,
        timesteps=tuple(timesteps),
        t_init=timesteps[0],
        trained_steps=method.step_counts if method.any_steps else (),
        ladder="sid" if timesteps == timestep_ladder(method.steps, method.t_init) else "explicit",
        noise_mode=method.noise_mode,
        training_resolution=teacher.image_size,
        base_model_hash=teacher.file_hash,
        licence=teacher.licence,
        title=f"{teacher.name}, {kind.title} {', '.join(map(str, method.step_counts))}-step",
        guidance=TrainingGuidance(strategy.name, strategy.fake_train, strategy.fake_eval, strategy.teacher),
        training_summary={
            "iterations": str(iterations),
            "images seen": str(images_seen),
            "batch size": str(config.training.batch_size),
            "generator learning rate": f"{config.optimizer.generator_lr:g}",
            **({"fake score learning rate": f"{config.optimizer.fake_score_lr:g}"} if len(kind.trained) > 1 else {}),
            "started from": "a SiD generator" if config.model.init_generator else "the teacher",
            **kind.summary(config),
        },
    )
