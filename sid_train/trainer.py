"""The loop that composes everything: one iteration is some fake-score updates and one generator update."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from accelerate import Accelerator
from torch import nn
from torch.profiler import record_function

from .callbacks import Callback, Progress
from .checkpoint import (
    Facts,
    Generators,
    Networks,
    Optimizers,
    load_checkpoint,
    read_facts,
    read_network,
    save_checkpoint,
    save_sharded_checkpoint,
)
from .config import FREE_KEYS, Config, config_from_dict, read_toml
from .core.recipe import SiDRecipe, has_recipe, read_safetensors_metadata
from .data import load_pairs, load_prompt_table
from .distiller import Distiller, Losses
from .distributed import (
    any_rank,
    autocast,
    batch_generator,
    batch_parts,
    check_processes,
    clip_gradients,
    is_sharded,
    mean_over_ranks,
    on_every_rank,
    placement,
    reducing_gradients,
    seed_everything,
    step_generator,
)
from .ema import EMA
from .errors import Interrupted, NonFiniteError
from .export import make_recipe
from .files import write_text
from .models.adapters import Adapter, adapter_from_state, merge_adapter
from .models.bundle import ModelBundle, load_model
from .models.networks import DTYPES, build_networks
from .models.unet import UNetDenoiser
from .rng import BatchRNG

CHECKPOINT_FILE = "checkpoint.safetensors"
CHECKPOINT_FOLDER = "checkpoints"  # with training.sharding: a folder a checkpoint, named by its iteration
SNAPSHOTS = "snapshots"
CONFIG_FILE = "config.toml"


class Trainer:
    """One run in one folder. Creating it in a folder that holds a checkpoint continues that run."""

    def __init__(self, config: Config, run_dir: Path, callbacks: list[Callback] | None = None):
        self.config, self.run_dir = config, run_dir
        check_run_dir(config, run_dir)
        training, optimizer = config.training, config.optimizer
        seed_everything(training.seed)
        self.accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            log_with=None if training.tracker == "none" else training.tracker,
            project_dir=str(run_dir),
        )
        device = self.accelerator.device
        check_processes(self.accelerator)
        if training.batch_size % (self.accelerator.num_processes * training.accumulate):
            raise ValueError(
                f"training.batch_size: expected a multiple of {self.accelerator.num_processes} process(es) times "
                f"{training.accumulate} micro-batch(es), got {training.batch_size}"
            )
        self.micro_batch = training.batch_size // (self.accelerator.num_processes * training.accumulate)

        # Only adapters leave the UNet as it is; whole networks start from fp32 copies.
        dtype = DTYPES[config.model.frozen_dtype] if config.adapter.rank else torch.float32
        self.bundle = load_model(config.model.teacher, dtype, config.model.resolution)
        check_teacher(self.bundle, config)
        networks = build_networks(
            self.bundle.denoiser,
            load_init_generator(config, self.bundle),
            config.adapter,
            config.model.frozen_dtype,
            training.gradient_checkpointing,
            placement(self.accelerator, training),
        )
        self.ema = EMA(networks.generator_ema, optimizer.ema_halflife_images, optimizer.ema_rampup)

        def adam(network: nn.Module, lr: float) -> torch.optim.Optimizer:
            betas = (float(optimizer.beta1), float(optimizer.beta2))
            return adam_class(optimizer.kind)(network.parameters(), lr=lr, betas=betas, eps=optimizer.eps)

        trained = (
            networks.generator,
            networks.fake_score,
            adam(networks.generator, optimizer.generator_lr),
            adam(networks.fake_score, optimizer.fake_score_lr),
        )
        if not is_sharded(self.accelerator, training):
            trained = self.accelerator.prepare(*trained)
        self.generator, self.fake_score, self.generator_optimizer, self.fake_score_optimizer = trained
        self.bundle.conditioner.to(device)
        self.bundle.codec.to(device)
        data, report = config.data, self.accelerator.is_main_process
        self.prompts = load_prompt_table(data, self.bundle, config.model.unconditional, device, report)
        self.pairs = load_pairs(data.pairs, self.bundle, data.buckets, data.cache) if data.pairs else None
        self.distiller = Distiller(
            self.generator,
            self.fake_score,
            networks.teacher,
            self.bundle.denoiser.schedule,
            self.prompts.unconditional,
            self.bundle.latent_shape,
            config.method,
            config.gan,
        )
        self.step_rng = step_generator(training.seed)
        self.rng = batch_generator(self.accelerator, training.seed)
        self.iteration = 0  # finished ones
        self.images_seen = 0  # drawn for the fake score, over all ranks
        checkpoint = last_checkpoint(run_dir)
        there = -1 if checkpoint is None else int(read_facts(checkpoint)["iteration"])
        if len(set(found := on_every_rank(self.accelerator, there))) > 1:
            raise ValueError(
                f"{run_dir}: expected every process to continue from the same checkpoint, found those of iterations "
                f"{found} (-1: none): the run's folder must be on a file system that all nodes share"
            )
        if checkpoint is not None:
            self._load(checkpoint)
        elif self.accelerator.is_main_process:
            # Not before everything above accepted it: a folder is claimed by a run that can start.
            write_text(run_dir / CONFIG_FILE, config.to_toml())
        every = [Progress(training.log_every), *(callbacks or [])]
        self.callbacks = [c for c in every if c.every_rank or self.accelerator.is_main_process]

    # -- the loop ------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Trains to the end. Ctrl-C and SIGTERM save first and raise Interrupted."""
        training = self.config.training
        if training.tracker != "none":
            self.accelerator.init_trackers(training.tracker)
        last_save = self.iteration
        self._tell(lambda c: c.on_start(self))
        with _StopOnSignal() as stop:
            while self.iteration < training.iterations:
                losses = self.train_iteration()
                self.iteration += 1
                self._tell(lambda c, losses=losses: c.on_iteration(self, losses))
                stopping = any_rank(self.accelerator, stop.requested)
                done = self.iteration == training.iterations
                if stopping or done or self.iteration - last_save >= training.checkpoint_every:
                    self.save()
                    last_save = self.iteration
                if training.snapshot_every and self.iteration % training.snapshot_every == 0:
                    self._save_snapshot()
                if stopping:
                    self._tell(lambda c: c.on_end(self))
                    raise Interrupted(f"stopped and saved after iteration {self.iteration} of {training.iterations}")
        self._tell(lambda c: c.on_end(self))
        if training.tracker != "none":
            self.accelerator.end_training()

    def train_iteration(self) -> dict[str, float]:
        """One iteration of the method; the means of its losses, for the log."""
        training = self.config.training
        self._set_learning_rates()
        step = self.distiller.draw_step(self.step_rng)
        adversarial = self.pairs is not None and self.images_seen >= self.config.gan.start_images
        logged: dict[str, float] = {}
        for _ in range(training.fake_score_updates):
            logged |= self._update(
                "fake score",
                self.fake_score,
                self.fake_score_optimizer,
                lambda rng: self._fake_score_loss(step, adversarial, rng),
            )
            self.images_seen += training.batch_size
        if self.images_seen > training.generator_start_images:
            logged |= self._update(
                "generator",
                self.generator,
                self.generator_optimizer,
                lambda rng: self._generator_loss(step, adversarial, rng),
            )
            self.ema.update(self.accelerator.unwrap_model(self.generator), self.images_seen, training.batch_size)
        return logged

    def _fake_score_loss(self, step: int, adversarial: bool, rng: BatchRNG) -> Losses:
        cond = self.prompts.draw(self.micro_batch, rng)
        real = self.pairs.draw(self.micro_batch, rng) if adversarial and self.pairs is not None else None
        # Not around the draws: what they encode is as exact as in a cache.
        with autocast(self.accelerator, self.config.training):
            return self.distiller.fake_score_loss(cond, step, rng, real)

    def _generator_loss(self, step: int, adversarial: bool, rng: BatchRNG) -> Losses:
        cond = self.prompts.draw(self.micro_batch, rng)
        with autocast(self.accelerator, self.config.training):
            return self.distiller.generator_loss(cond, step, rng, adversarial)

    def _update(
        self, name: str, network: nn.Module, optimizer: torch.optim.Optimizer, compute: Callable[[BatchRNG], Losses]
    ) -> dict[str, float]:
        """One optimizer step on the mean of ``accumulate`` micro-batches."""
        accumulate = self.config.training.accumulate
        logged: dict[str, float] = {}
        for micro, rng in enumerate(batch_parts(self.accelerator, self.rng, accumulate)):
            with reducing_gradients(self.accelerator, network, last=micro == accumulate - 1):
                with record_function(f"{name}: forward"):
                    losses = compute(rng)
                # The mean over all ranks is not finite on any if a loss is not on one: all stop, or none.
                values = mean_over_ranks(self.accelerator, {part: loss.item() for part, loss in losses.items()})
                for part, value in values.items():
                    logged[part] = logged.get(part, 0.0) + value / accumulate
                self._require_finite(logged, f"{name} loss")
                with record_function(f"{name}: backward"):
                    self.accelerator.backward(torch.stack(list(losses.values())).sum() / accumulate)
        norm = clip_gradients(self.accelerator, network, self.config.optimizer.clip_norm or float("inf"))
        self._require_finite({"norm": norm}, f"{name} gradient")
        with record_function(f"{name}: optimizer"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return logged

    def _require_finite(self, values: dict[str, float], what: str) -> None:
        bad = [name for name, value in values.items() if not abs(value) < float("inf")]
        if bad:
            detail = ", ".join(f"{name} = {values[name]}" for name in bad)
            raise NonFiniteError(
                f"iteration {self.iteration + 1}: the {what} is not finite ({detail}). No weight was changed by it; "
                f"the last checkpoint is in {self.run_dir}. Lower the learning rates or set optimizer.clip_norm."
            )

    def _set_learning_rates(self) -> None:
        optimizer, total = self.config.optimizer, self.config.training.iterations
        factor = min(1.0, (self.iteration + 1) / optimizer.warmup) if optimizer.warmup else 1.0
        if optimizer.cooldown:
            factor *= min(1.0, (total - self.iteration) / (optimizer.cooldown * total))
        for adam, lr in (
            (self.generator_optimizer, optimizer.generator_lr),
            (self.fake_score_optimizer, optimizer.fake_score_lr),
        ):
            for group in adam.param_groups:
                group["lr"] = lr * factor

    def _tell(self, call: Callable[[Callback], None]) -> None:
        for callback in self.callbacks:
            call(callback)

    # -- state ---------------------------------------------------------------------------------------------------

    def recipe(self) -> SiDRecipe:
        """The recipe of the generator as it is now."""
        return make_recipe(self.config, self.bundle, self.iteration, self.images_seen)

    def save(self) -> None:
        state = (self._networks(), self._optimizers(), self._generators())
        if self.config.training.sharding == "none":
            self._write(self.run_dir / CHECKPOINT_FILE, *state)
            return
        # A new folder, then the old ones go: there is a whole checkpoint at any time.
        self._write(self.run_dir / CHECKPOINT_FOLDER / f"{self.iteration:07d}", *state)
        if self.accelerator.is_main_process:
            for old in _checkpoint_folders(self.run_dir)[:-1]:
                shutil.rmtree(old)

    def _save_snapshot(self) -> None:
        """The averaged generator alone, to go back to: a run does not always end at its best."""
        path = self.run_dir / SNAPSHOTS / f"{self.iteration:07d}"
        if self.config.training.sharding == "none":
            path = path.with_suffix(".safetensors")
        self._write(path, {"generator_ema": self.ema.average}, {}, {})

    def _write(self, path: Path, networks: Networks, optimizers: Optimizers, generators: Generators) -> None:
        facts = {"iteration": self.iteration, "images_seen": self.images_seen, "teacher": self.bundle.file_hash}
        if self.config.training.sharding == "full":
            save_sharded_checkpoint(self.accelerator, path, networks, optimizers, generators, facts)
        elif self.accelerator.is_main_process:
            save_checkpoint(path, networks, optimizers, generators, facts)
        self.accelerator.wait_for_everyone()

    def _load(self, path: Path) -> None:
        facts = load_checkpoint(path, self._networks(), self._optimizers(), self._generators())
        _check_teacher(facts, self.bundle, path)
        self.iteration, self.images_seen = int(facts["iteration"]), int(facts["images_seen"])

    def _networks(self) -> dict[str, nn.Module]:
        return {
            "generator": self.accelerator.unwrap_model(self.generator),
            "fake_score": self.accelerator.unwrap_model(self.fake_score),
            "generator_ema": self.ema.average,
        }

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {
            "generator_optimizer": self.generator_optimizer,
            "fake_score_optimizer": self.fake_score_optimizer,
        }

    def _generators(self) -> dict[str, torch.Generator]:
        return {"rng": self.rng, "step_rng": self.step_rng}


def adam_class(kind: str) -> type[torch.optim.Optimizer]:
    if kind == "adam":
        return torch.optim.Adam
    try:
        import bitsandbytes
    except ImportError:
        raise ValueError("optimizer.kind: adam8bit needs: pip install bitsandbytes") from None
    return bitsandbytes.optim.Adam8bit


def check_run_dir(config: Config, run_dir: Path) -> None:
    """A folder that holds a run must hold one with the same configuration."""
    if not (run_dir / CONFIG_FILE).is_file():
        return
    stored = load_run_config(run_dir).flat()
    differ = [
        f"{key} (was {stored[key]!r}, now {value!r})"
        for key, value in config.flat().items()
        if value != stored[key] and key not in FREE_KEYS
    ]
    if differ:
        raise ValueError(
            f"{run_dir} holds a run with another configuration: {', '.join(differ)}. "
            f"Choose another --out, or the same values to continue it."
        )


def load_run_config(run_dir: Path) -> Config:
    """The configuration that a run folder stores."""
    path = run_dir / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{run_dir}: expected a run folder, but it has no {CONFIG_FILE}")
    return config_from_dict(read_toml(path), str(path))


def last_checkpoint(run_dir: Path) -> Path | None:
    """What a run continues from, a file or a folder; None if it has no checkpoint yet."""
    found = [path for path in (run_dir / CHECKPOINT_FILE,) if path.is_file()] + _checkpoint_folders(run_dir)
    return found[-1] if found else None


def _checkpoint_folders(run_dir: Path) -> list[Path]:
    """Those that are whole, oldest first."""
    return sorted((run_dir / CHECKPOINT_FOLDER).glob("[0-9]*"))


def generator_file(run_dir: Path, iteration: int = 0) -> Path:
    """Where a run keeps its averaged generator, a file or a folder: as it was after ``iteration``, or in its last
    checkpoint (0). ValueError if it does not.
    """
    if not iteration:
        if (path := last_checkpoint(run_dir)) is None:
            raise ValueError(f"{run_dir}: the run has no checkpoint (yet)")
        return path
    folder = run_dir / SNAPSHOTS / f"{iteration:07d}"
    file = folder.with_suffix(".safetensors")
    if not file.is_file() and not folder.is_dir():
        raise ValueError(f"{file}: the run has no such snapshot (yet); training.snapshot_every says which it keeps")
    return file if file.is_file() else folder


def load_run_generator(run_dir: Path, iteration: int = 0) -> tuple[ModelBundle, SiDRecipe]:
    """A run's averaged generator (see ``generator_file``) in its model's bundle, and its recipe."""
    config, path = load_run_config(run_dir), generator_file(run_dir, iteration)
    bundle = load_model(config.model.teacher, resolution=config.model.resolution)
    recipe = read_run_recipe(path, config, bundle)
    state = read_network(path, "generator_ema")
    if config.adapter.rank:
        merge_adapter(bundle.denoiser.unet, adapter_from_state(state))
    else:
        bundle.denoiser.load_state_dict(state)
    return bundle, recipe


def read_run_recipe(path: Path, config: Config, bundle: ModelBundle) -> SiDRecipe:
    """The recipe of the generator in one of a run's files; ``bundle`` is its teacher's."""
    facts = read_facts(path)
    _check_teacher(facts, bundle, path)
    return make_recipe(config, bundle, int(facts["iteration"]), int(facts["images_seen"]))


def _check_teacher(facts: Facts, bundle: ModelBundle, path: Path) -> None:
    if facts["teacher"] != bundle.file_hash:
        raise ValueError(
            f"{path}: the run was distilled from a teacher with SHA-256 {facts['teacher']}, but the file now has "
            f"{bundle.file_hash}: put the old one back, or start another run"
        )


def check_teacher(bundle: ModelBundle, config: Config) -> None:
    if bundle.recipe is not None:
        raise ValueError(f"model.teacher: {config.model.teacher} is a few-step generator: expected a diffusion model")


def load_init_generator(config: Config, teacher: ModelBundle) -> UNetDenoiser | Adapter | None:
    """What the generator starts from (SiD2a): an adapter where adapters are trained, else a whole UNet; None: nothing
    but the teacher.
    """
    source, where = config.model.init_generator, "model.init_generator"
    if not source:
        return None
    path = Path(source)
    metadata = read_safetensors_metadata(path) if path.is_file() else {}
    if not has_recipe(metadata):
        raise ValueError(f"{where}: {source} carries no SiD recipe: expected a SiD generator")
    architecture, _, kind = metadata.get("modelspec.architecture", "").partition("/")
    if architecture != teacher.architecture:
        raise ValueError(
            f"{where}: expected the teacher's architecture {teacher.architecture}, got {architecture} in {source}"
        )
    if bool(config.adapter.rank) != (kind == "lora"):
        wanted = (
            "a LoRA, since adapters are trained" if config.adapter.rank else "a whole generator (adapter.rank is 0)"
        )
        raise ValueError(f"{where}: expected {wanted}, got {source}")
    if kind == "lora":
        from .sdxl_export import read_lora

        unet = teacher.denoiser.unet
        return read_lora(path, unet.state_dict(), unet.config)
    return load_model(source).denoiser


class _StopOnSignal:
    """Turns SIGINT and SIGTERM into a request; Ctrl-C after that stops at once. SIGTERM may come more than once: from
    a cluster's scheduler, and from torchrun, which passes on what it got.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> _StopOnSignal:
        self.requested = False
        self.previous = [signal.signal(s, self._request) for s in self.SIGNALS]
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested = True
        print(f"\n{signal.Signals(number).name}: saving after this iteration ...", flush=True)

    def __exit__(self, *exc: object) -> None:
        for number, handler in zip(self.SIGNALS, self.previous, strict=True):
            signal.signal(number, handler)
