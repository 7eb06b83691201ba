"""Few-step Score identity Distillation, as in arXiv 2505.12674: no I/O, no ranks, no optimizers.

One iteration draws a step k, then minimises ``fake_score_loss`` over the fake score and ``generator_loss`` over the
generator, each on fresh samples of the generator's k-th step.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from ..core.noise_schedule import NoiseSchedule
from ..core.rng import BatchRNG
from ..core.sampling import few_step_sample, ladder_sigmas, noise_sampler
from ..models.conditioning import Conditioning, RealBatch
from ..models.denoiser import Network, logits
from ..models.guided import guided_denoise, guided_denoise_with_logits
from .base import Batch, Losses, Method, MethodSettings, Setting, Update
from .config import GANConfig, MethodConfig
from .losses import (
    add_noise,
    denoising_loss,
    discriminator_loss,
    generator_gan_loss,
    sid_loss,
    sid_weight,
)


class Distiller(Method):
    """The method over three networks that share the contract ``denoise(x, sigma, cond) -> x0``.

    frozen_fake_score: the fake score as the generator's loss calls it, which passes gradients through it and gives it
        none: without a data-parallel wrapper, which would wait for them. A network that is not wrapped is both.
    """

    title = "SiD"
    trained = ("generator", "fake_score")
    through_scores: ClassVar[bool] = True
    """Whether the generator's gradient passes through the two networks that judge its output, too."""

    @classmethod
    def check(cls, config: MethodSettings) -> None:
        if config.gan.enabled and not config.data.pairs:
            raise ValueError(
                "gan.generator_weight: the GAN branch needs real pairs: set data.pairs, or the weight to 0"
            )
        if config.data.pairs and not config.gan.enabled:
            raise ValueError("data.pairs: unused while gan.generator_weight is 0: set that weight, or drop the pairs")

    @classmethod
    def summary(cls, config: MethodSettings) -> dict[str, str]:
        return {
            "matching": config.method.matching,
            "alpha": f"{config.method.alpha:g}",
            "data": "real pairs with the Diffusion-GAN loss" if config.gan.enabled else "prompts only (data-free)",
        }

    def __init__(
        self,
        generator: Network,
        fake_score: Network,
        teacher: Network,
        schedule: NoiseSchedule,
        unconditional: Conditioning,
        latent_shape: tuple[int, ...],
        method: MethodConfig,
        gan: GANConfig | None = None,
        fake_score_updates: int = 1,
        frozen_fake_score: Network | None = None,
    ):
        self.generator, self.fake_score, self.teacher = generator, fake_score, teacher
        self.frozen_fake_score = frozen_fake_score or fake_score
        self.schedule, self.unconditional, self.latent_shape = schedule, unconditional, latent_shape
        self.method, self.gan, self.fake_score_updates = method, gan or GANConfig(), fake_score_updates
        self.guidance = method.strategy
        parameters = fake_score.parameters() if isinstance(fake_score, nn.Module) else []
        self._fake_score_parameters = [p for p in parameters if p.requires_grad]
        # What runs up to each step of each chain, in order: its noise levels, then 0.
        self.chains: list[Tensor] = []
        for steps in method.step_counts:
            sigmas = ladder_sigmas(schedule, schedule.ladder(steps, method.t_init))
            self.chains += [torch.cat([sigmas[:k], sigmas[-1:]]) for k in range(1, steps + 1)]

    @classmethod
    def build(cls, setting: Setting) -> Distiller:
        networks, config = setting.networks, setting.config
        return cls(
            networks["generator"],
            networks["fake_score"],
            networks["teacher"],
            setting.schedule,
            setting.unconditional,
            setting.latent_shape,
            config.method,
            config.gan,
            config.training.fake_score_updates,
            setting.unwrapped["fake_score"],
        )

    def _let_fake_score_learn(self, learn: bool) -> None:
        for parameter in self._fake_score_parameters:
            parameter.requires_grad_(learn)

    # -- draws ---------------------------------------------------------------------------------------------------

    def draw_step(self, rng: torch.Generator) -> int:
        """The step k in 1..K whose output this iteration matches; ``rng`` must agree on all ranks.

        Of an any-step generator K is drawn first, and the steps of all chains are counted through.
        """

        def draw(high: int) -> int:
            return int(torch.randint(high, (1,), generator=rng).item())

        counts = self.method.step_counts
        chain = draw(len(counts)) if len(counts) > 1 else 0
        step = counts[chain] if self.method.matching == "final" else 1 + draw(counts[chain])
        return sum(counts[:chain]) + step

    def planned_step(self) -> tuple[int, float]:
        """Every step before the last runs without gradient and leaves nothing behind: one of them is enough."""
        counts = self.method.step_counts
        longest = max(range(len(counts)), key=lambda chain: counts[chain])
        before, steps = sum(counts[:longest]), counts[longest]
        if self.method.matching == "final":
            return before + steps, 0.0
        average = sum((count + 1) / 2 for count in counts) / len(counts)
        return before + min(steps, 2), average - min(steps, 2)

    def _noise(self, batch: int, rng: BatchRNG) -> Tensor:
        return rng.randn(batch, *self.latent_shape)

    def _draw_sigma(self, batch: int, rng: BatchRNG) -> Tensor:
        method = self.method
        return self.schedule.draw_sigma(batch, method.t_min, method.t_max, rng, method.noise_levels)

    # -- the method ----------------------------------------------------------------------------------------------

    def updates(self, step: int, images_seen: int) -> list[Update]:
        """Some updates of the fake score, then one of the generator, all on step k.

        The discriminator learns from the first image; the generator follows it from ``gan.start_images`` on.
        """
        adversarial = self.gan.enabled and images_seen >= self.gan.start_images
        learn = Update("fake_score", partial(self._fake_score_update, step), wants_real=self.gan.enabled)
        follow = Update("generator", partial(self._generator_update, step, adversarial))
        return [learn] * self.fake_score_updates + [follow]

    def _fake_score_update(self, step: int, batch: Batch, rng: BatchRNG) -> Losses:
        return self.fake_score_loss(batch.cond, step, rng, batch.real)

    def _generator_update(self, step: int, adversarial: bool, batch: Batch, rng: BatchRNG) -> Losses:
        return self.generator_loss(batch.cond, step, rng, adversarial)

    def rollout(self, cond: Conditioning, step: int, rng: BatchRNG) -> Tensor:
        """The output x_g of the generator's step k: fp32, [B, ...].

        Gradients, where the caller wants any, cover step k alone (uniform-step matching, justified by the paper's
        theorem on the uniform mixture of all steps) or the whole chain (final-step matching).
        """
        wants_gradient = torch.is_grad_enabled()
        sigmas = self.chains[step - 1]
        first_with_gradient = 1 if self.method.matching == "final" else len(sigmas) - 1
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
            return {"fake_score": denoising_loss(guided_denoise(*ask), x_t, sigma, eps).mean()}

        fake_x0, fake_logits = guided_denoise_with_logits(*ask)
        # Real latents are noised with the same t, so that the discriminator cannot tell them by their noise level.
        # They may have another height and width (aspect buckets): losses see the logits' means only.
        real_noise = rng.randn(*real.latents.shape)
        real_t = add_noise(real.latents, sigma, real_noise)
        # Real pictures lose their prompts as often as generated ones: else a missing text would give those away.
        real_cond = real.cond.where(dropped, self.unconditional)
        real_logits = logits(self.fake_score, real_t, sigma, real_cond)
        weight = self.gan.discriminator_weight * x_g[0].numel()
        return {
            "fake_score": denoising_loss(fake_x0, x_t, sigma, eps).mean(),
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
        through_scores = torch.is_grad_enabled() and self.through_scores
        with torch.set_grad_enabled(through_scores):
            teacher_x0 = guided_denoise(self.teacher, x_t, sigma, cond, self.unconditional, self.guidance.teacher)
        ask = (self.frozen_fake_score, x_t, sigma, cond, self.unconditional, self.guidance.fake_eval)
        fake_logits = None
        if adversarial:
            fake_x0, fake_logits = guided_denoise_with_logits(*ask)
        else:
            with torch.set_grad_enabled(through_scores):
                fake_x0 = guided_denoise(*ask)
        weight = sid_weight(x_g, teacher_x0, sigma, self.method.weighting)
        name, loss = self.title.lower(), self.matching_loss(teacher_x0, fake_x0, x_g, weight).mean()
        if fake_logits is None:
            return {name: self.gan.sid_weight * loss}
        # Equal halves from here on, as in SiDA and SiD-DiT; the two weights set the balance.
        gan = generator_gan_loss(fake_logits, self.adversarial_weight(weight), x_g[0].numel()).mean()
        return {name: 0.5 * self.gan.sid_weight * loss, "gan": 0.5 * self.gan.generator_weight * gan}

    def adversarial_weight(self, weight: Tensor) -> Tensor:
        """The per-sample weight of the GAN term, of that of the scores' difference: [B]."""
        return weight

    def matching_loss(self, teacher_x0: Tensor, fake_x0: Tensor, x_g: Tensor, weight: Tensor) -> Tensor:
        """What the scores' difference means for the generator: [B]."""
        return sid_loss(teacher_x0, fake_x0, x_g, weight, self.method.alpha)
