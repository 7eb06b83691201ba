"""The loop that composes everything: an iteration is the updates of the method, one after another."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

from filelock import FileLock
from torch import Tensor

from ..config import Config
from ..core.recipe import SiDRecipe
from ..core.rng import batch_generator, step_generator
from ..errors import Interrupted, NonFiniteError
from ..files.console import unbreakable_output
from ..files.reading import shown
from ..models.conditioning import Conditioning
from ..models.networks import AVERAGE
from ..sample import sample_latents
from .callbacks import Callback, Progress, log_image
from .checkpoint import (
    Facts,
    Generators,
    Networks,
    Optimizers,
    load_checkpoint,
    read_facts,
    save_checkpoint,
    save_sharded_checkpoint,
    state_of,
)
from .distributed import (
    any_rank,
    check_processes,
    make_accelerator,
    micro_batch_size,
    non_finite,
    on_every_rank,
    on_first_rank,
    seed_everything,
)
from .guard import NormGuard
from .identity import config_of, identity_of, require_identity
from .passes import RankPasses
from .run import RunFolder, make_recipe
from .setup import learning_rate, set_up
from .update import run_update


class Trainer:
    """One run in one folder. Creating it in a folder that holds a checkpoint continues that run."""

    def __init__(self, config: Config, run_dir: Path, callbacks: list[Callback] | None = None):
        training = config.training
        self.config, self.folder = config, RunFolder(run_dir)
        changed = self.folder.require_config(config)
        seed_everything(training.seed)
        self.accelerator = make_accelerator(training, run_dir)
        check_processes(self.accelerator)
        micro_batch_size(self.accelerator, training)  # refuses one that cannot be, before anything large is read
        parts = set_up(config, self.accelerator, self.folder)
        self.bundle, self.method, self.ema = parts.bundle, parts.method, parts.ema
        self.networks, self.optimizers, self.teacher = parts.networks, parts.optimizers, parts.teacher
        self.prompts = parts.prompts
        self.identity = identity_of(config, self.bundle, self.prompts.prompts, parts.pairs)
        self.step_rng = step_generator(training.seed)
        self.rng = batch_generator(self.accelerator.device, training.seed)
        self.guard = NormGuard(self.networks, config.optimizer.skip_norm)
        self.passes = RankPasses(self.accelerator, training, parts.prompts, parts.pairs, self.rng, self.guard)
        self.iteration = 0  # finished ones
        self.gradient_norms: dict[str, float] = {}
        self._steps = 0  # taken since the last checkpoint
        self._damaged: list[Path] = []
        self._continue_or_claim(changed)
        every = [Progress(training.log_every), *(callbacks or [])]
        self.callbacks = [c for c in every if c.every_rank or self.is_main_process]
        self._failed: set[str] = set()  # what reports, and did not work

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to the end. Ctrl-C, SIGTERM and SIGHUP save first and raise Interrupted."""
        self._lock: FileLock | None = None
        try:
            with unbreakable_output():
                on_first_rank(self.accelerator, self._begin)
                self._run()
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}. {self._after_non_finite()}") from None
        finally:
            if self._lock is not None:
                self._lock.release()

    def _begin(self) -> None:
        """Nobody else trains in the folder from now on, and nobody did since this run was made."""
        self._lock = self.folder.lock()
        self.folder.remove_leftovers()
        for path in self._damaged:
            self._tell(f"{path} is set aside: {self.folder.set_aside(path)}")
        self._drop_old_checkpoints()  # as a killed process could not
        checkpoint = self.folder.last_checkpoint()
        there = 0 if checkpoint is None else int(read_facts(checkpoint)["iteration"])
        if there != self.iteration:
            raise ValueError(
                f"{self.folder.path}: another process has trained here up to iteration {there} since this one read "
                f"iteration {self.iteration}: the same command continues from there"
            )
        self.folder.remember_teacher(self.bundle.weights, self.bundle.file_hash)

    def _run(self) -> None:
        training = self.config.training
        self._reporting("training.tracker", self._start_tracker)
        last_save = self.iteration
        for callback in list(self.callbacks):
            works = self._reporting(type(callback).__name__, callback.on_start, self)
            if callback.every_rank:  # all samples are made together
                works = not any_rank(self.accelerator, not works)
            if not works:
                self.callbacks.remove(callback)
        with _StopOnSignal() as stop:
            while self.iteration < training.iterations:
                losses = self.train_iteration()
                self.iteration += 1
                # On disk before anything counts on it: its score, and a checkpoint that a run continues from.
                if training.snapshot_every and self.iteration % training.snapshot_every == 0:
                    self._save_snapshot()
                for callback in self.callbacks:
                    self._reporting(type(callback).__name__, callback.on_iteration, self, losses)
                stopping = any_rank(self.accelerator, stop.requested)
                done = self.iteration == training.iterations
                if stopping or done or self.iteration - last_save >= training.checkpoint_every:
                    self.save()
                    last_save = self.iteration
                if stopping:
                    self._tell_end()
                    raise Interrupted(f"stopped and saved after iteration {self.iteration} of {training.iterations}")
        self._tell_end()
        if training.tracker != "none":
            self._reporting("training.tracker", self.accelerator.end_training)

    def train_iteration(self, step: int | None = None) -> dict[str, float]:
        """One iteration of the method; the means of its losses, for the log. ``step``: instead of a drawn one."""
        training, clip_norm = self.config.training, self.config.optimizer.clip_norm
        self._set_learning_rates()
        drawn = self.method.draw_step(self.step_rng)
        updates = self.method.updates(step or drawn, self.images_seen)
        seen_after = self.images_seen + training.batch_size
        logged: dict[str, list[float]] = {}
        for update in updates:
            if update.network == "generator" and seen_after <= training.generator_start_images:
                continue
            network, optimizer = self.networks[update.network], self.optimizers[update.network]
            try:
                figures = run_update(update, network, optimizer, self.passes, clip_norm)
            except NonFiniteError as error:
                raise NonFiniteError(f"iteration {self.iteration + 1}: {error}") from None
            self.gradient_norms[update.network] = figures.norm
            self._steps += not figures.refused
            if figures.refused:
                self._tell(f"iteration {self.iteration + 1}: a step of the {update.name} is skipped: {figures.refused}")
            for name, value in figures.losses.items():
                logged.setdefault(name, []).append(value)
            if update.network == "generator":
                self.ema.update(self.accelerator.unwrap_model(network), seen_after, training.batch_size)
        return {name: sum(values) / len(values) for name, values in logged.items()}

    def _after_non_finite(self) -> str:
        """Where the run goes on after it stopped at a value that is not finite, and with what."""

        def state() -> str:
            last = self.folder.last_checkpoint()
            if last is None:
                return "There is no checkpoint yet: the run starts again"
            told = ""
            while last is not None and self._lock is not None and self._is_ruined(read_facts(last), last):
                place = self.folder.set_aside(last)
                told = f"The checkpoint of iteration {self.iteration}, from which it came, is set aside ({place}). "
                last = self.folder.last_checkpoint()
            if last is None:
                return f"{told}None is left: the run starts again"
            return f"{told}The run continues from iteration {read_facts(last)['iteration']}, {last}"

        return (
            f"No step was taken with it. {on_first_rank(self.accelerator, state)} with the same command: lower "
            "optimizer.generator_lr and optimizer.fake_score_lr in it, or set optimizer.clip_norm, which it may change."
        )

    def _is_ruined(self, facts: Facts, path: Path) -> bool:
        """Whether the checkpoint would only lead to the same end again: it came from its very state, or in the first
        iteration after it, with learning rates that are no higher than those that it was made with.
        """
        if int(facts["iteration"]) != self.iteration:
            return False
        made, now = config_of(facts, path), self.config.optimizer
        lower = made is not None and all(
            getattr(now, name) <= getattr(made.optimizer, name) for name in ("generator_lr", "fake_score_lr")
        )
        return not self._steps or lower

    def _set_learning_rates(self) -> None:
        optimizer = self.config.optimizer
        factor = optimizer.rate_factor(self.iteration, self.config.training.iterations)
        for role, adam in self.optimizers.items():
            for group in adam.param_groups:
                group["lr"] = learning_rate(optimizer, role) * factor

    # -- reporting, which never costs a run ------------------------------------------------------------------------

    def _reporting(self, what: str, act: Callable[..., None], *args: object) -> bool:
        """Whether ``act`` worked. What fails is said once, and training goes on."""
        try:
            act(*args)
        except Exception as error:
            if what not in self._failed:
                self._failed.add(what)
                reason = shown(str(error) or type(error).__name__)
                print(f"warning: {what} does not work, and training goes on without: {reason}", file=sys.stderr)
            return False
        return True

    def _start_tracker(self) -> None:
        if self.config.training.tracker != "none":
            options = {"wandb": {"dir": str(self.folder.path)}}  # which else writes into the current folder
            self.accelerator.init_trackers(self.config.training.tracker, init_kwargs=options)

    def _tell(self, text: str) -> None:
        if self.is_main_process:
            print(text, file=sys.stderr, flush=True)

    def _tell_end(self) -> None:
        for callback in self.callbacks:
            self._reporting(type(callback).__name__, callback.on_end, self)

    # -- what callbacks ask (``callbacks.Run``) ------------------------------------------------------------------

    @property
    def images_seen(self) -> int:
        """A batch an iteration, over all ranks, however many updates are made of it."""
        return self.iteration * self.config.training.batch_size

    @property
    def is_main_process(self) -> bool:
        return self.accelerator.is_main_process

    def sample(self, cond: Conditioning, seed: int) -> Tensor:
        cond = cond.to(self.accelerator.device)
        return sample_latents(self.ema.average, cond, self.bundle.latent_shape, self.recipe(), seed)

    def track(self, values: dict[str, float]) -> None:
        self._reporting("training.tracker", lambda: self.accelerator.log(values, step=self.iteration))

    def track_image(self, name: str, image: Tensor) -> None:
        self._reporting("training.tracker", lambda: log_image(self.accelerator, name, image, self.iteration))

    # -- state ---------------------------------------------------------------------------------------------------

    def recipe(self) -> SiDRecipe:
        """The recipe of the generator as it is now."""
        return make_recipe(self.config, self.bundle, self.iteration, self.images_seen)

    def save(self) -> None:
        """Writes what the run continues from. NonFiniteError, and nothing written, where that is not finite; ValueError
        where there is no room: the checkpoint before stays.
        """
        path = self.folder.new_checkpoint(self.iteration, self._in_parts)
        try:
            if not self._in_parts:
                on_first_rank(self.accelerator, self.folder.keep_last_checkpoint)
            self._write(path, *self._state())
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path}: the checkpoint of iteration {self.iteration} could not be written: {shown(error)}. The one "
                "before is whole: make room, and the same command continues from it"
            ) from error
        self._steps = 0
        if self.is_main_process:  # not before: there is a whole checkpoint at any time
            self._drop_old_checkpoints()

    def _drop_old_checkpoints(self) -> None:
        keep = self.config.training.keep_checkpoints
        self._reporting("removing older checkpoints", self.folder.drop_old_checkpoints, keep)

    def _save_snapshot(self) -> None:
        """The averaged generator alone, to go back to: a run does not always end at its best."""
        path = self.folder.snapshot(self.iteration, self._in_parts)
        try:
            self._write(path, {AVERAGE: self.ema.average}, {}, {})
        except (OSError, ValueError) as error:
            self._tell(f"warning: the snapshot {path} could not be written, and training goes on: {shown(error)}")

    @property
    def _in_parts(self) -> bool:
        """Whether every process writes its own part of a checkpoint."""
        return self.config.training.sharding == "full"

    def _write(self, path: Path, networks: Networks, optimizers: Optimizers, generators: Generators) -> None:
        facts: Facts = {"iteration": self.iteration, "images_seen": self.images_seen, **self.identity}
        if bad := non_finite(self.accelerator, state_of(networks, optimizers, {})):
            raise NonFiniteError(
                f"iteration {self.iteration}: {bad} is not finite after its last step, and {path} is not written"
            )
        if self._in_parts:
            save_sharded_checkpoint(self.accelerator, path, networks, optimizers, generators, facts)
        else:
            on_first_rank(self.accelerator, lambda: save_checkpoint(path, networks, optimizers, generators, facts))

    def _continue_or_claim(self, changed: list[str]) -> None:
        """Loads the last good checkpoint, and makes the folder this run's. Not before everything else accepted the
        configuration: a folder is claimed by a run that can start. ``changed``: what is other than before.
        """

        def find() -> tuple[str, list[str]]:
            found, damaged = self.folder.good_checkpoint()
            self._damaged = [path for path, _ in damaged]
            return str(found.relative_to(self.folder.path)) if found else "", [problem for _, problem in damaged]

        name, problems = on_first_rank(self.accelerator, find)
        checkpoint = self.folder.path / name if name else None
        there = -1 if checkpoint is None or not checkpoint.exists() else int(read_facts(checkpoint)["iteration"])
        if len(set(iterations := on_every_rank(self.accelerator, there))) > 1:
            raise ValueError(
                f"{self.folder.path}: expected every process to continue from the same checkpoint, found those of "
                f"iterations {iterations} (-1: none): the run's folder must be on a file system that all nodes share"
            )
        if checkpoint is not None:
            require_identity(read_facts(checkpoint), self.identity, self.config, checkpoint)
            self.iteration = int(load_checkpoint(checkpoint, *self._state())["iteration"])
        on_first_rank(self.accelerator, self._claim)
        for problem in problems:
            self._tell(f"{problem}: continuing from the checkpoint before, of iteration {self.iteration}")
        for line in changed:
            self._tell(f"{self.folder.path}: {line}")

    def _claim(self) -> None:
        lock = self.folder.lock()
        try:
            self.folder.require_config(self.config)  # again: another run may have claimed the folder meanwhile
            self.folder.claim(self.config)
        finally:
            lock.release()

    def _state(self) -> tuple[Networks, Optimizers, Generators]:
        """Everything that a run continues from, by the names in its checkpoints."""
        networks = {role: self.accelerator.unwrap_model(network) for role, network in self.networks.items()}
        optimizers = {f"{role}_optimizer": adam for role, adam in self.optimizers.items()}
        sources: Generators = {"rng": self.rng, "step_rng": self.step_rng, "norms": self.guard}
        return networks | {AVERAGE: self.ema.average}, optimizers, sources


class _StopOnSignal:
    """Turns SIGINT, SIGTERM and SIGHUP (a lost connection) into a request; Ctrl-C after that stops at once. SIGTERM may
    come more than once: from a cluster's scheduler, and from torchrun, which passes on what it got.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

    def __enter__(self) -> _StopOnSignal:
        self.requested = False
        # nohup asks that a lost connection is nothing.
        heard = [s for s in self.SIGNALS if s == signal.SIGINT or signal.getsignal(s) is not signal.SIG_IGN]
        self.previous = {s: signal.signal(s, self._request) for s in heard}
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        with suppress(Exception):  # it may have come in the middle of a print
            print(f"\n{signal.Signals(number).name}: saving after this iteration ...", flush=True)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
