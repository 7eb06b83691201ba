"""Latent consistency distillation (LCM, arXiv 2310.04378), to compare SiD with.

The generator's estimate of a real picture from a noisy one is to be that from a less noisy one, which the teacher makes
of it in one DDIM step under guidance. It needs real pictures, no fake score, and one of 50 timesteps at a time; any
number of steps may be sampled then.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.noise_schedule import expand, x0_to_epsilon
from ..core.rng import BatchRNG
from ..models.guided import guided_denoise
from .base import Batch, Losses, Method, MethodSettings, Setting, Update, require_default
from .losses import add_noise, pseudo_huber_loss

TIMESTEPS = 50
SKIP = 1000 // TIMESTEPS


class ConsistencyDistiller(Method):
    """One network is trained, on real pairs. Its target is itself without gradient, as in LCM-LoRA (arXiv 2311.05556).

    At timestep 0 a consistency function's own condition holds: a picture without noise is its own estimate. Above it,
    LCM's two factors leave the network's estimate alone, but for a few parts in a million.
    """

    title = "LCM"
    trained = ("generator",)

    @classmethod
    def check(cls, config: MethodSettings) -> None:
        if not config.data.pairs:
            raise ValueError("method.kind: lcm distils on real pairs: set data.pairs")
        if config.gan.enabled:
            raise ValueError("gan.generator_weight: lcm has no GAN branch: set it to 0")
        if config.training.fake_score_updates != 1:
            raise ValueError("training.fake_score_updates: lcm has no fake score: set it to 1")
        if (config.method.strategy.fake_train, config.method.strategy.fake_eval) != (1, 1):
            raise ValueError("method.guidance: lcm has no fake score: expected custom=1,1,TEACHER, or none")
        if config.training.generator_start_images:
            raise ValueError("training.generator_start_images: lcm trains the generator alone: set it to 0")
        levels = ("noise_levels", "t_min", "t_max")
        for key in ("alpha", "matching", "weighting", *levels, "prompt_dropout", "prompt_dropout_in"):
            require_default(config.method, key, cls.title)

    @classmethod
    def summary(cls, config: MethodSettings) -> dict[str, str]:
        return {"data": "real pairs"}

    @classmethod
    def build(cls, setting: Setting) -> ConsistencyDistiller:
        return cls(setting)

    def __init__(self, setting: Setting):
        self.generator, self.teacher = setting.networks["generator"], setting.networks["teacher"]
        self.schedule, self.unconditional = setting.schedule, setting.unconditional
        self.scale = setting.config.method.strategy.teacher
        # 19, 39 ... 999, and what each is stepped down to: 0, 19 ... 979.
        above = torch.arange(SKIP - 1, 1000, SKIP)
        self.above = self.schedule.sigma(above)
        self.below = self.schedule.sigma((above - SKIP).clamp(min=0))

    def draw_step(self, rng: torch.Generator) -> int:
        return 1

    def updates(self, step: int, images_seen: int) -> list[Update]:
        return [Update("generator", self.consistency_loss, wants_real=True)]

    def consistency_loss(self, batch: Batch, rng: BatchRNG) -> Losses:
        """The distance of two estimates of one picture, from two neighbouring points of the teacher's path."""
        real = batch.real
        if real is None:
            raise ValueError("data.pairs: expected real pairs")
        index = rng.randint(0, TIMESTEPS, len(real.cond))
        sigma, lower = (levels.to(index.device)[index] for levels in (self.above, self.below))
        x = add_noise(real.latents, sigma, rng.randn(*real.latents.shape))
        with torch.no_grad():
            teacher_x0 = guided_denoise(self.teacher, x, sigma, real.cond, self.unconditional, self.scale)
            on_path = add_noise(teacher_x0, lower, x0_to_epsilon(teacher_x0, x, sigma))
        # With gradient first: before PyTorch 2.11 autocast goes on using the weights that it cast without.
        made: Tensor = self.generator(x, sigma, real.cond)
        with torch.no_grad():
            estimate = self.generator(on_path, lower, real.cond)
            target = torch.where(expand(index == 0, on_path) > 0, on_path, estimate)
        return {"consistency": pseudo_huber_loss(made, target).mean()}
