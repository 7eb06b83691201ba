"""Few-step Score identity Distillation, as in arXiv 2505.12674: no I/O, no ranks, no optimizers.

One iteration draws a step k, then minimises ``fake_score_loss`` over the fake score and ``generator_loss`` over the
generator, each on fresh samples of the generator's k-th step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from .core.noise_schedule import NoiseSchedule
from .core.sampling import NOISE_MODES, NoiseMode, few_step_sample, ladder_sigmas, noise_sampler, timestep_ladder
from .guidance import GuidanceStrategy, guided_denoise, guided_denoise_with_logits
from .losses import (
    SID_WEIGHTINGS,
    SiDWeighting,
    add_noise,
    discriminator_loss,
    fake_score_loss,
    generator_gan_loss,
    sid_loss,
    sid_weight,
)
from .models.conditioning import Conditioning
from .rng import BatchRNG

Denoiser = Callable[..., Tensor]
"""``denoiser(x, sigma, cond) -> x0``; with ``output="logits"`` the discriminator's map (see ``models.unet``)."""


@dataclass
class MethodConfig:
    """What is distilled, and how."""

    steps: int = 4
    """Network calls of the generator, 1 to 8."""
    t_init: int = 625
    """Timestep of the first step; 625 in the paper, 999 in DMD2 and SiD-DiT."""
    noise_mode: NoiseMode = "fresh"
    """Noise of the steps after the first: fresh, fixed or ddim."""
    matching: Literal["uniform", "final"] = "uniform"
    """uniform: the loss sits on a random step's output (the paper); final: on the last, through the whole chain."""
    guidance: str = "none"
    """none, lsg=SCALE, zero-cfg, anti-cfg=NEGATIVE_SCALE or custom=FAKE_TRAIN,FAKE_EVAL,TEACHER."""
    alpha: float = 1.0
    """Weight of the explicit score difference in the generator loss; 1 (SiD-LSG, SiD-DiT) or 1.2 (SiD, SiDA)."""
    weighting: SiDWeighting = "l1"
    """Per-sample weight of the generator loss: l1, one_minus_sigma or uniform."""
    t_min: int = 20
    """Lowest timestep at which the scores are compared."""
    t_max: int = 980
    """Timesteps stay below this one."""
    prompt_dropout: float = 0.1
    """Share of prompts dropped in the fake score's update, where its unconditional score is needed too."""
    prompt_dropout_in: Literal["generator", "fake_score"] = "generator"
    """generator: dropped before generating (the authors); fake_score: only where the fake score learns."""

    def __post_init__(self) -> None:
        timestep_ladder(self.steps, self.t_init)
        GuidanceStrategy.parse(self.guidance)
        for name, value, allowed in (
            ("noise_mode", self.noise_mode, NOISE_MODES),
            ("matching", self.matching, ("uniform", "final")),
            ("weighting", self.weighting, SID_WEIGHTINGS),
            ("prompt_dropout_in", self.prompt_dropout_in, ("generator", "fake_score")),
        ):
            if value not in allowed:
                raise ValueError(f"method.{name}: expected one of {', '.join(allowed)}, got {value!r}")
        if not 0 <= self.t_min < self.t_max <= 1000:
            raise ValueError(
                f"method.t_min, method.t_max: expected 0 <= t_min < t_max <= 1000, got {self.t_min}, {self.t_max}"
            )
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"method.prompt_dropout: expected 0 to below 1, got {self.prompt_dropout}")


@dataclass
class GANConfig:
    """The Diffusion-GAN branch (SiDa), which needs real pairs. Weights are relative to ``sum`` losses over a latent."""

    generator_weight: float = 0.0
    """Weight of the generator's GAN loss, beside sid_weight; 0 turns the branch off."""
    sid_weight: float = 1.0
    """Weight of the SiD loss while the branch is on; generator_weight : sid_weight is 1 : 100 in SiD-DiT."""
    discriminator_weight: float = 1.0
    """Weight of the discriminator's loss, times C*H*W (SiD-DiT), beside the fake score's denoising loss."""
    start_images: int = 0
    """No GAN term before this many images were generated."""

    def __post_init__(self) -> None:
        for name in ("generator_weight", "sid_weight", "discriminator_weight", "start_images"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"gan.{name}: expected 0 or more, got {getattr(self, name)}")

    @property
    def enabled(self) -> bool:
        return self.generator_weight > 0


@dataclass
class RealBatch:
    """Real latents [B, C, H, W] with the prompts' conditioning that belongs to them."""

    latents: Tensor
    cond: Conditioning


Losses = dict[str, Tensor]
"""Scalar parts of one loss by name; their sum is what is minimised."""


class Distiller:
    """The method over three networks that share the contract ``denoise(x, sigma, cond) -> x0``."""

    def __init__(
        self,
        generator: Denoiser,
        fake_score: Denoiser,
        teacher: Denoiser,
        schedule: NoiseSchedule,
        unconditional: Conditioning,
        latent_shape: tuple[int, ...],
        method: MethodConfig,
        gan: GANConfig | None = None,
    ):
        self.generator, self.fake_score, self.teacher = generator, fake_score, teacher
        self.schedule, self.unconditional, self.latent_shape = schedule, unconditional, latent_shape
        self.method, self.gan = method, gan or GANConfig()
        self.guidance = GuidanceStrategy.parse(method.guidance)
        parameters = fake_score.parameters() if isinstance(fake_score, nn.Module) else []
        self._fake_score_parameters = [p for p in parameters if p.requires_grad]
        self.sigmas = ladder_sigmas(schedule, timestep_ladder(method.steps, method.t_init))

    def _let_fake_score_learn(self, learn: bool) -> None:
        for parameter in self._fake_score_parameters:
            parameter.requires_grad_(learn)

    # -- draws ---------------------------------------------------------------------------------------------------

    def draw_step(self, rng: torch.Generator) -> int:
        """The step k in 1..K whose output this iteration matches; ``rng`` must agree on all ranks."""
        if self.method.matching == "final":
            return self.method.steps
        return int(torch.randint(1, self.method.steps + 1, (1,), generator=rng).item())

    def _noise(self, batch: int, rng: BatchRNG) -> Tensor:
        return rng.randn(batch, *self.latent_shape)

    def _draw_sigma(self, batch: int, rng: BatchRNG) -> Tensor:
        return self.schedule.sigma(rng.randint(self.method.t_min, self.method.t_max, batch))

    # -- the method ----------------------------------------------------------------------------------------------

    def rollout(self, cond: Conditioning, step: int, rng: BatchRNG) -> Tensor:
        """The output x_g of the generator's step k: fp32, [B, ...].

        Gradients, where the caller wants any, cover step k alone (uniform-step matching, justified by the paper's
        theorem on the uniform mixture of all steps) or the whole chain (final-step matching).
        """
        wants_gradient = torch.is_grad_enabled()
        first_with_gradient = 1 if self.method.matching == "final" else step
        calls = 0

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if wants_gradient and calls == first_with_gradient:
                # Before PyTorch 2.11 autocast goes on using the weights that it cast without gradient, which get none.
                torch.clear_autocast_cache()
            with torch.set_grad_enabled(wants_gradient and calls >= first_with_gradient):
                return self.generator(x, sigma, cond)

        first_noise = self._noise(len(cond), rng)
        next_noise = noise_sampler(self.method.noise_mode, first_noise, lambda k: self._noise(len(cond), rng))
        sigmas = torch.cat([self.sigmas[:step], self.sigmas[-1:]])
        with record_function("rollout"):
            return few_step_sample(denoise, sigmas, first_noise, next_noise)

    def perturb(self, x_g: Tensor, rng: BatchRNG) -> tuple[Tensor, Tensor, Tensor]:
        """``x_t = x_g + sigma_t * eps`` at random t: (x_t, sigma [B], eps)."""
        sigma = self._draw_sigma(len(x_g), rng)
        eps = self._noise(len(x_g), rng)
        return add_noise(x_g, sigma, eps), sigma, eps

    def draw_dropped(self, batch: int, rng: BatchRNG) -> Tensor:
        """Which prompts the fake score's update replaces by the unconditional embedding: a share of them, where the
        fake score is asked both ways, else none. Boolean, [B].
        """
        share = self.method.prompt_dropout if self.guidance.fake_needs_both else 0.0
        return rng.rand(batch) < share

    def fake_score_loss(self, cond: Conditioning, step: int, rng: BatchRNG, real: RealBatch | None = None) -> Losses:
        """The fake score learns to denoise what the generator makes now (and to tell it from ``real``)."""
        self._let_fake_score_learn(True)
        dropped = self.draw_dropped(len(cond), rng)
        told = cond.where(dropped, self.unconditional)
        with torch.no_grad():
            x_g = self.rollout(told if self.method.prompt_dropout_in == "generator" else cond, step, rng)
        x_t, sigma, eps = self.perturb(x_g, rng)
        ask = (self.fake_score, x_t, sigma, told, self.unconditional, self.guidance.fake_train)
        if real is None:
            return {"fake_score": fake_score_loss(guided_denoise(*ask), x_t, sigma, eps).mean()}

        fake_x0, fake_logits = guided_denoise_with_logits(*ask)
        # Real latents are noised with the same t, so that the discriminator cannot tell them by their noise level.
        # They may have another height and width (aspect buckets): losses see the logits' means only.
        real_noise = rng.randn(*real.latents.shape)
        real_t = add_noise(real.latents, sigma, real_noise)
        # As many of its prompts are dropped, so that no text does not mean generated.
        real_cond = real.cond.where(dropped, self.unconditional)
        real_logits = self.fake_score(real_t, sigma, real_cond, output="logits")
        weight = self.gan.discriminator_weight * x_g[0].numel()
        return {
            "fake_score": fake_score_loss(fake_x0, x_t, sigma, eps).mean(),
            "discriminator": weight * discriminator_loss(real_logits, fake_logits).mean(),
        }

    def generator_loss(self, cond: Conditioning, step: int, rng: BatchRNG, adversarial: bool = False) -> Losses:
        """The generator moves its k-th step's output towards the teacher's distribution.

        ``adversarial`` adds the GAN term. The fake score's parameters are frozen from here until its own next loss, so
        that they stay so while a backward pass with gradient checkpointing runs its blocks again.
        """
        self._let_fake_score_learn(False)
        x_g = self.rollout(cond, step, rng)
        x_t, sigma, _ = self.perturb(x_g, rng)
        teacher_x0 = guided_denoise(self.teacher, x_t, sigma, cond, self.unconditional, self.guidance.teacher)
        # A data-parallel wrapper is bypassed: it would wait for parameter gradients that never come. A sharded network
        # is not wrapped, and only averages the gradients that there are.
        fake_score = self.fake_score
        fake_score = fake_score.module if isinstance(fake_score, DistributedDataParallel) else fake_score
        ask = (fake_score, x_t, sigma, cond, self.unconditional, self.guidance.fake_eval)
        logits = None
        if adversarial:
            fake_x0, logits = guided_denoise_with_logits(*ask)
        else:
            fake_x0 = guided_denoise(*ask)
        weight = sid_weight(x_g, teacher_x0, sigma, self.method.weighting)
        loss = sid_loss(teacher_x0, fake_x0, x_g, weight, self.method.alpha).mean()
        if logits is None:
            return {"sid": loss}
        # Equal halves, as in SiDA and SiD-DiT; the two weights set the balance.
        gan = generator_gan_loss(logits, weight, x_g[0].numel()).mean()
        return {"sid": 0.5 * self.gan.sid_weight * loss, "gan": 0.5 * self.gan.generator_weight * gan}
