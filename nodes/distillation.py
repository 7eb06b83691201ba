"""A distillation of ComfyUI's model inside ComfyUI: the method, updates and losses of the trainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..sid_train.config import OptimizerConfig
from ..sid_train.core.noise_schedule import VPSchedule
from ..sid_train.core.rng import BatchRNG, batch_generator, batch_parts, step_generator
from ..sid_train.core.sampling import few_step_sample, initial_noise, ladder_sigmas, noise_sampler, seeded_noise
from ..sid_train.files.atomic import replacing
from ..sid_train.method.base import Batch, Losses, Update
from ..sid_train.method.config import MethodConfig
from ..sid_train.method.sid import Distiller
from ..sid_train.models.conditioning import Conditioning
from ..sid_train.training.ema import EMA
from ..sid_train.training.guard import NormGuard
from ..sid_train.training.update import Figures, require_finite, run_update
from .graph import TEACHER, Adapters, RoleDenoiser

GENERATOR, FAKE_SCORE, AVERAGE = "generator", "fake_score", "average"
TRAINED = (GENERATOR, FAKE_SCORE)


@dataclass(frozen=True)
class Settings:
    """What is asked for; ``micro_batch`` pictures are in memory at once."""

    steps: int
    guidance: str
    iterations: int
    rank: int
    generator_lr: float
    fake_score_lr: float
    batch_size: int
    micro_batch: int
    fake_score_updates: int
    seed: int
    checkpointing: bool

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batch:
            raise ValueError(
                f"micro_batch: expected a number that divides batch_size ({self.batch_size}), got {self.micro_batch}"
            )

    @property
    def method(self) -> MethodConfig:
        return MethodConfig(steps=self.steps, guidance=self.guidance)

    @property
    def optimizer(self) -> OptimizerConfig:
        """As the configurations that ship have it for adapters and for the demo."""
        return OptimizerConfig(
            generator_lr=self.generator_lr,
            fake_score_lr=self.fake_score_lr,
            skip_norm=20,
            cooldown=0.5,
            ema_halflife_images=1000,
            ema_rampup=0.1,
        )


class _Passes:
    """``training.update.Passes`` of one process on ComfyUI's model."""

    def __init__(self, prompts: Sequence[Conditioning], settings: Settings, rng: torch.Generator, guard: NormGuard):
        self.prompts, self.rng, self.guard = prompts, rng, guard
        self.micro_batch, self.micro_batches = settings.micro_batch, settings.batch_size // settings.micro_batch
        self._noted: list[Losses] = []

    def draws(self) -> Iterator[BatchRNG]:
        return batch_parts(self.rng, range(self.micro_batches), self.micro_batches)

    def batch(self, update: Update, rng: BatchRNG) -> Batch:
        rows = rng.indices(len(self.prompts), self.micro_batch)
        return Batch(Conditioning.cat([self.prompts[row] for row in rows]).to(self.rng.device))

    def phase(self, name: str) -> AbstractContextManager[object]:
        return nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """ComfyUI's layers cast themselves."""
        return nullcontext()

    def reducing(self, network: nn.Module, last: bool) -> AbstractContextManager[object]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def note(self, losses: Losses) -> None:
        self._noted.append({name: loss.detach() for name, loss in losses.items()})

    def finish(self, update: Update, norm: Tensor) -> Figures:
        noted, self._noted = self._noted, []
        means = {name: float(sum(losses[name] for losses in noted)) / len(noted) for name in noted[0]}
        require_finite(means, f"{update.name} loss")
        require_finite({"norm": float(norm)}, f"{update.name} gradient")
        return Figures(means, float(norm), self.guard.refuses(update.network, float(norm)))


class Distillation:
    """A run: networks, optimizers, and how far it is.

    To be made and used outside of inference mode.

    model: ComfyUI's BaseModel, on its device, with weights that can take part in a backward pass (``distil.trainable``)
    prompts: one conditioning a prompt, each a single row
    """

    def __init__(
        self,
        model: nn.Module,
        options: dict,
        schedule: VPSchedule,
        prompts: Sequence[Conditioning],
        unconditional: Conditioning,
        latent_shape: tuple[int, ...],
        settings: Settings,
        device: torch.device,
    ):
        self.settings, self.schedule, self.latent_shape, self.device = settings, schedule, latent_shape, device
        self.iteration = 0
        self.losses: list[dict[str, float]] = []
        self.notes: list[str] = []
        begin = torch.Generator().manual_seed(settings.seed)
        self.adapters = Adapters(model.diffusion_model, settings.rank, (*TRAINED, AVERAGE), begin, device)
        for name, pair in self.adapters.factors[GENERATOR].items():
            for theirs, ours in zip(pair, self.adapters.factors[AVERAGE][name], strict=True):
                ours.data.copy_(theirs.data)
        if settings.checkpointing:
            self.adapters.use_checkpointing(model.diffusion_model)
        self.networks = {
            role: RoleDenoiser(model, self.adapters, role, schedule, options) for role in (*TRAINED, AVERAGE, TEACHER)
        }
        self.networks[AVERAGE].requires_grad_(False)
        self.method = Distiller(
            self.networks[GENERATOR],
            self.networks[FAKE_SCORE],
            self.networks[TEACHER],
            schedule,
            unconditional,
            latent_shape,
            settings.method,
            fake_score_updates=settings.fake_score_updates,
        )
        optimizer = settings.optimizer
        self.rates = {GENERATOR: optimizer.generator_lr, FAKE_SCORE: optimizer.fake_score_lr}
        betas = (optimizer.beta1, optimizer.beta2)
        self.optimizers = {
            role: torch.optim.Adam(self.networks[role].parameters(), lr=rate, betas=betas, eps=optimizer.eps)
            for role, rate in self.rates.items()
        }
        self.ema = EMA(self.networks[AVERAGE], optimizer.ema_halflife_images, optimizer.ema_rampup)
        self.guard = NormGuard(TRAINED, optimizer.skip_norm)
        self.step_rng, self.rng = step_generator(settings.seed), batch_generator(device, settings.seed)
        self.passes = _Passes(prompts, settings, self.rng, self.guard)

    def train_iteration(self) -> dict[str, float]:
        """One iteration of the method, as ``Trainer.train_iteration``: the means of its losses."""
        settings, seen = self.settings, self.iteration * self.settings.batch_size
        factor = settings.optimizer.rate_factor(self.iteration, settings.iterations)
        for role, adam in self.optimizers.items():
            for group in adam.param_groups:
                group["lr"] = self.rates[role] * factor
        logged: dict[str, list[float]] = {}
        for update in self.method.updates(self.method.draw_step(self.step_rng), seen):
            network = self.networks[update.network]
            figures = run_update(update, network, self.optimizers[update.network], self.passes, 0.0)
            if figures.refused:
                self.notes.append(f"Iteration {self.iteration + 1}: a step is skipped: {figures.refused}.")
            for name, value in figures.losses.items():
                logged.setdefault(name, []).append(value)
            if update.network == GENERATOR:
                self.ema.update(network, seen + settings.batch_size, settings.batch_size)
        self.iteration += 1
        self.losses.append({name: sum(values) / len(values) for name, values in logged.items()})
        return self.losses[-1]

    @torch.no_grad()
    def sample(self, cond: Conditioning, seed: int) -> Tensor:
        """Latents of the averaged generator: [len(cond), ...]."""
        method = self.settings.method
        sigmas = ladder_sigmas(self.schedule, self.schedule.ladder(method.steps, method.t_init))
        noise = initial_noise((len(cond), *self.latent_shape), seed).to(self.device)
        draw = noise_sampler(method.noise_mode, noise, seeded_noise(noise, seed))
        return few_step_sample(lambda x, sigma: self.networks[AVERAGE](x, sigma, cond), sigmas, noise, draw)

    # -- its state -----------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        """All that changes, by name; the very tensors, but for the states of random numbers and of the guard."""
        found = {
            f"{role}.{place}.{name}": factor
            for role, factors in self.adapters.factors.items()
            for name, pair in factors.items()
            for place, factor in zip(("down", "up"), pair, strict=True)
        }
        for role, adam in self.optimizers.items():
            for number, parameter in enumerate(self.networks[role].parameters()):
                for key, value in adam.state[parameter].items():
                    found[f"adam.{role}.{number}.{key}"] = value
        return found

    def save(self, path: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        tensors |= {"step_rng": self.step_rng.get_state(), "rng": self.rng.get_state(), "guard": self.guard.get_state()}
        facts = {"iteration": str(self.iteration), "losses": json.dumps(self.losses)}
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            save_file(tensors, temporary, facts)

    def load(self, path: Path) -> None:
        """Goes on from what ``save`` wrote of a run with the same settings."""
        with safe_open(path, "pt") as file:
            facts = file.metadata()
            self.iteration, self.losses = int(facts["iteration"]), json.loads(facts["losses"])
            for role, adam in self.optimizers.items():
                for number, parameter in enumerate(self.networks[role].parameters()):
                    prefix = f"adam.{role}.{number}."
                    keys = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
                    state = {name.removeprefix(prefix): file.get_tensor(name) for name in keys}
                    adam.state[parameter] = {
                        key: value if key == "step" else value.to(self.device) for key, value in state.items()
                    }
            with torch.no_grad():
                for name, tensor in self._tensors().items():
                    if not name.startswith("adam."):
                        tensor.copy_(file.get_tensor(name))
            self.step_rng.set_state(file.get_tensor("step_rng"))
            self.rng.set_state(file.get_tensor("rng"))
            self.guard.set_state(file.get_tensor("guard"))

    def close(self) -> None:
        self.adapters.remove()


def conditioning_of(model: nn.Module, encoded: Sequence, latent_shape: tuple[int, ...]) -> Conditioning:
    """The first row of CONDITIONING as the network reads it: ``text``, and ``y`` where it has such an input.

    model: ComfyUI's BaseModel
    """
    text, extra = encoded[0]
    tensors = {"text": text[:1].float().clone()}
    size = {"width": 8 * latent_shape[2], "height": 8 * latent_shape[1]}
    asked = size | {name: value for name, value in extra.items() if name not in ("hooks", "control")}
    y = model.encode_adm(noise=torch.zeros(1, *latent_shape), device="cpu", **asked)
    if y is not None:
        tensors["y"] = y[:1].float().clone()
    return Conditioning(**tensors)


def identity_of(run: Distillation, prompts: Sequence[Conditioning]) -> str:
    """Of all that a run follows from: settings, noise schedule, size, the first row of every weight, and the prompts.
    Not of what only decides how much memory it takes.
    """
    facts = asdict(run.settings) | {"latent": run.latent_shape, "predicts": run.schedule.prediction_type}
    facts = {key: value for key, value in facts.items() if key not in ("micro_batch", "checkpointing")}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    weights = [layer.weight[0] for layer in run.adapters.layers.values()]
    for tensor in [run.schedule.sigmas, *weights, *(part for one in prompts for part in one.tensors.values())]:
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def run_distillation(run: Distillation, state: Path, every: int, report: Callable[[Distillation], Any]) -> None:
    """Trains to the end, or until ComfyUI is asked to stop: then its state is in ``state``, from where it goes on.

    report: called after each iteration
    """
    while run.iteration < run.settings.iterations:
        with uninterrupted():
            run.train_iteration()
        try:
            report(run)
            comfy.model_management.throw_exception_if_processing_interrupted()
        except comfy.model_management.InterruptProcessingException:
            run.save(state)
            raise
        if run.iteration % every == 0 or run.iteration == run.settings.iterations:
            run.save(state)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """ComfyUI may stop inside of any layer, between updates that belong together: it is to wait for the iteration's
    end.
    """
    memory = comfy.model_management
    stop = memory.throw_exception_if_processing_interrupted
    memory.throw_exception_if_processing_interrupted = lambda: None
    try:
        yield
    finally:
        memory.throw_exception_if_processing_interrupted = stop
