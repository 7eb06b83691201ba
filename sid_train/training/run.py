"""A run's folder: what is in it, and what it says of the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from ..config import FREE_KEYS, Config, config_from_dict, read_toml
from ..core.recipe import SiDRecipe, TrainingGuidance
from ..core.timesteps import timestep_ladder
from ..evaluation.metric import CLIP_SCORE
from ..files.atomic import write_text
from ..files.hashing import file_sha256
from ..files.logs import read_log
from ..method.methods import METHODS
from ..models.adapters import adapter_from_state
from ..models.bundle import ModelBundle
from ..models.family import Generator
from ..models.networks import AVERAGE
from .checkpoint import Facts, open_network, read_facts, read_network
from .teacher import open_teacher


class RunFolder:
    """The folder of one run: names, configuration, checkpoints, snapshots, logs and the generator that it trained."""

    def __init__(self, path: Path):
        self.path = path
        self.config_file = path / "config.toml"
        self.log = path / "log.jsonl"
        self._teacher = path / "teacher.json"
        self._checkpoint = path / "checkpoint.safetensors"
        self._checkpoint_folders = path / "checkpoints"  # with training.sharding: a folder a checkpoint
        self._snapshots = path / "snapshots"

    # -- configuration -------------------------------------------------------------------------------------------

    def read_config(self) -> Config:
        """The configuration of the run that is here."""
        if not self.config_file.is_file():
            raise ValueError(f"{self.path}: expected a run folder, but it has no {self.config_file.name}")
        return config_from_dict(read_toml(self.config_file), str(self.config_file))

    def require_config(self, config: Config) -> None:
        """ValueError where the folder holds a run whose configuration has other values of what must not change."""
        if not self.config_file.is_file():
            return
        stored = self.read_config().flat()
        differ = [
            f"{key} (was {stored[key]!r}, now {value!r})"
            for key, value in config.flat().items()
            if value != stored[key] and key not in FREE_KEYS
        ]
        if differ:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {', '.join(differ)}. "
                f"Choose another --out, or the same values to continue it."
            )

    def claim(self, config: Config) -> None:
        """Makes the folder that of a run with this configuration."""
        write_text(self.config_file, config.to_toml())

    def lock(self) -> FileLock:
        """A lock on the folder, held until it is released. ValueError while another process trains here."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(
                f"{self.path}: another process is training in this folder: wait until it ends, or choose another --out"
            ) from None
        except NotImplementedError:  # a file system without locks: nobody can hold one there
            pass
        return lock

    # -- the teacher ---------------------------------------------------------------------------------------------

    def sha256(self, path: Path) -> str:
        """SHA-256 of the teacher's file, hex: what ``remember_teacher`` kept of the very same file, or computed."""
        try:
            kept = json.loads(self._teacher.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # there is none, or it is torn
            return file_sha256(path)
        return str(kept["sha256"]) if kept.get("file") == _identity(path) else file_sha256(path)

    def remember_teacher(self, path: Path, sha256: str) -> None:
        """Keeps the hash of a file of several gigabytes beside the run, so that it is read once."""
        write_text(self._teacher, json.dumps({"file": _identity(path), "sha256": sha256}) + "\n")

    # -- checkpoints and snapshots -------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Those that are whole, oldest first: files, or folders of a sharded run."""
        files = [self._checkpoint] if self._checkpoint.is_file() else []
        return files + sorted(self._checkpoint_folders.glob("[0-9]*"))

    def last_checkpoint(self) -> Path | None:
        """What the run continues from; None if it has no checkpoint yet."""
        found = self.checkpoints()
        return found[-1] if found else None

    def new_checkpoint(self, iteration: int, sharded: bool) -> Path:
        """Where the next checkpoint goes: in the place of the last one, or beside it until ``drop_old_checkpoints``."""
        return self._checkpoint_folders / f"{iteration:07d}" if sharded else self._checkpoint

    def drop_old_checkpoints(self) -> None:
        for old in self.checkpoints()[:-1]:
            if old.is_dir():
                shutil.rmtree(old)

    def snapshot(self, iteration: int, sharded: bool) -> Path:
        """Where the averaged generator of an iteration is kept: a file, or a folder of a sharded run."""
        folder = self._snapshots / f"{iteration:07d}"
        return folder if sharded else folder.with_suffix(".safetensors")

    def best_snapshot(self) -> int:
        """The iteration of the snapshot with the highest CLIP score; 0 where none was scored, so that the last
        checkpoint is the best that is known.
        """
        scores = read_log(self.scores(CLIP_SCORE))
        return int(max(scores, key=lambda entry: entry[CLIP_SCORE])["iteration"]) if scores else 0

    def scores(self, metric: str) -> Path:
        """The log of a metric of the snapshots' pictures."""
        return self.path / ("clip.jsonl" if metric == CLIP_SCORE else f"scores-{metric}.jsonl")

    def grid(self, iteration: int) -> Path:
        return self.path / "grids" / f"{iteration:06d}.png"

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

    def open_generator(self, iteration: int = 0) -> Generator:
        """The averaged generator (see ``generator_file``) with its recipe, none of it read."""
        config, path = self.read_config(), self.generator_file(iteration)
        model = open_teacher(config.model)
        bundle = model.load(None, config.model.resolution)
        bundle.file_hash = self.sha256(bundle.weights)
        facts = read_facts(path)
        require_same_teacher(facts, bundle, path)
        recipe = make_recipe(config, bundle, int(facts["iteration"]), int(facts["images_seen"]))
        if config.adapter.rank:
            return Generator(model, recipe, model.tensors, adapter_from_state(read_network(path, AVERAGE)), path)
        network = {name.removeprefix(model.prefix): tensor for name, tensor in open_network(path, AVERAGE).items()}
        return Generator(model, recipe, network, source=path)


def _identity(path: Path) -> list[str | int]:
    """A file's place, size and time of change: while they stay, so does what is in it."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


def require_same_teacher(facts: Facts, bundle: ModelBundle, path: Path) -> None:
    """ValueError where a checkpoint with ``facts`` was trained from another teacher than ``bundle``."""
    if facts["teacher"] != bundle.file_hash:
        raise ValueError(
            f"{path}: the run was distilled from a teacher with SHA-256 {facts['teacher']}, but the file now has "
            f"{bundle.file_hash}: put the old one back, or start another run"
        )


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
        ladder="sid" if timesteps == timestep_ladder(method.steps, method.t_init) else "explicit",
        noise_mode=method.noise_mode,
        training_resolution=teacher.image_size,
        base_model_hash=teacher.file_hash,
        licence=teacher.licence,
        title=f"{teacher.name}, {kind.title} {method.steps}-step",
        guidance=TrainingGuidance(strategy.name, strategy.fake_train, strategy.fake_eval, strategy.teacher),
        training_summary={
            "iterations": str(iterations),
            "images seen": str(images_seen),
            "batch size": str(config.training.batch_size),
            "generator learning rate": f"{config.optimizer.generator_lr:g}",
            "fake score learning rate": f"{config.optimizer.fake_score_lr:g}",
            "started from": "a SiD generator" if config.model.init_generator else "the teacher",
            **kind.summary(config),
        },
    )
