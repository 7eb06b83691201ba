"""The configuration of a distillation method: torch and the standard library only, since ComfyUI reads it too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..core.noise_schedule import NOISE_LEVELS, NoiseLevels
from ..core.sampling import SID_NOISE_MODES, SiDNoiseMode
from ..core.timesteps import timestep_ladder
from .guidance import GuidanceStrategy
from .losses import SID_WEIGHTINGS, SiDWeighting


@dataclass
class MethodConfig:
    """What is distilled, and how."""

    kind: str = "sid"
    """The distillation method: sid, Score identity Distillation; to compare with it, dmd2, distribution matching, and
    lcm, consistency distillation, which needs data.pairs."""
    steps: int = 4
    """Network calls of the generator, 1 to 8."""
    any_steps: str = ""
    """Numbers of network calls of which each iteration draws one, such as 1,2,4,8, steps among them: one generator
    for all of them. Empty: steps alone."""
    t_init: int = 625
    """Timestep of the first step; 625 in the paper, 999 in DMD2 and SiD-DiT."""
    noise_mode: SiDNoiseMode = "fresh"
    """Noise of the steps after the first: fresh, fixed or ddim."""
    matching: Literal["uniform", "final"] = "uniform"
    """uniform: the loss sits on a random step's output (the paper); final: on the last, through the whole chain."""
    guidance: str = "none"
    """none, lsg=SCALE, zero-cfg, anti-cfg=NEGATIVE_SCALE or custom=FAKE_TRAIN,FAKE_EVAL,TEACHER."""
    alpha: float = 1.0
    """Weight of the explicit score difference in the generator loss; 1 (SiD-LSG, SiD-DiT) or 1.2 (SiD, SiDA)."""
    weighting: SiDWeighting = "l1"
    """Per-sample weight of the generator loss. l1: 1 / mean |x_g - teacher's x0| (SiD); one_minus_sigma: 1 - s with the
    flow time s = sigma / (1 + sigma) (SiD-DiT's default); of its others one_minus_sigma_squared, one_over_sigma,
    one_over_sigma_squared, snr and snr_sqrt; uniform: 1."""
    noise_levels: NoiseLevels = "uniform"
    """How the timesteps are drawn at which the scores are compared. uniform: all alike (SiD-LSG); logit_normal: the
    flow time is sigmoid(N(ln 2, 1.6)) (SiD-DiT)."""
    t_min: int = 20
    """Lowest timestep at which the scores of teacher and fake score are compared."""
    t_max: int = 980
    """Timesteps at which the scores are compared stay below this one."""
    prompt_dropout: float = 0.1
    """Share of prompts dropped in the fake score's update, where its unconditional score is needed too."""
    prompt_dropout_in: Literal["generator", "fake_score"] = "generator"
    """generator: dropped before generating (the authors); fake_score: only where the fake score learns."""

    def __post_init__(self) -> None:
        timestep_ladder(self.steps, self.t_init)
        for steps in self.step_counts:
            timestep_ladder(steps, self.t_init)
        if self.steps not in self.step_counts or len(set(self.step_counts)) != len(self.step_counts):
            raise ValueError(
                f"method.any_steps: expected different numbers, method.steps ({self.steps}) among them, "
                f"got {self.any_steps!r}"
            )
        _ = self.strategy  # parses it
        for name, value, allowed in (
            ("noise_mode", self.noise_mode, SID_NOISE_MODES),
            ("matching", self.matching, ("uniform", "final")),
            ("weighting", self.weighting, SID_WEIGHTINGS),
            ("noise_levels", self.noise_levels, NOISE_LEVELS),
            ("prompt_dropout_in", self.prompt_dropout_in, ("generator", "fake_score")),
        ):
            if value not in allowed:
                raise ValueError(f"method.{name}: expected one of {', '.join(allowed)}, got {value!r}")
        if len(self.step_counts) > 1 and self.matching == "final":
            raise ValueError("method.any_steps: goes with method.matching uniform only, got final")
        if not 0 <= self.t_min < self.t_max <= 1000:
            raise ValueError(
                f"method.t_min, method.t_max: expected 0 <= t_min < t_max <= 1000, got {self.t_min}, {self.t_max}"
            )
        if not 0 <= self.prompt_dropout < 1:
            raise ValueError(f"method.prompt_dropout: expected 0 to below 1, got {self.prompt_dropout}")

    @property
    def step_counts(self) -> tuple[int, ...]:
        """``any_steps``, or ``steps`` alone."""
        try:
            return tuple(int(part) for part in self.any_steps.split(",")) if self.any_steps else (self.steps,)
        except ValueError:
            raise ValueError(f"method.any_steps: expected numbers such as 1,2,4,8, got {self.any_steps!r}") from None

    @property
    def strategy(self) -> GuidanceStrategy:
        """``guidance`` as scales."""
        return GuidanceStrategy.parse(self.guidance)


@dataclass
class GANConfig:
    """The Diffusion-GAN branch (SiDa), which needs real pairs. The losses that the weights multiply are sums over a
    latent's elements.
    """

    generator_weight: float = 0.0
    """Weight of the generator's GAN loss, beside sid_weight; 0 turns the branch off."""
    sid_weight: float = 1.0
    """Weight of the generator's SiD loss from the first image; once its GAN term starts, both get half their weights.
    generator_weight : sid_weight is 1 : 100 in SiD-DiT."""
    discriminator_weight: float = 1.0
    """Weight of the discriminator's loss, times C*H*W (SiD-DiT), beside the fake score's denoising loss."""
    start_images: int = 0
    """The generator's loss has no GAN term before this many images were generated. The discriminator learns from the
    first image."""

    def __post_init__(self) -> None:
        for name in ("generator_weight", "sid_weight", "discriminator_weight", "start_images"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"gan.{name}: expected 0 or more, got {getattr(self, name)}")

    @property
    def enabled(self) -> bool:
        return self.generator_weight > 0
