"""Noise schedules, seen through sigmas.

Everything outside the network works in the variance-exploding convention ``x = x0 + sigma * eps`` with
``sigma_t = sqrt((1 - abar_t) / abar_t)``; only the network's input is scaled back. All arithmetic here is fp32 whatever
the network's dtype (tables are computed in fp64).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from copy import copy
from typing import Literal, get_args

import torch
from torch import Tensor

from .rng import BatchRNG
from .timesteps import timestep_ladder

PredictionType = Literal["epsilon", "v_prediction"]
PREDICTION_TYPES: tuple[str, ...] = get_args(PredictionType)
"""Those of teachers."""
X0 = "x0"
"""The prediction type of a few generators (SDXL-Lightning's for one step), which predict the picture itself."""

NoiseLevels = Literal["uniform", "logit_normal"]
NOISE_LEVELS: tuple[str, ...] = get_args(NoiseLevels)
LOGIT_MEAN, LOGIT_SPREAD = math.log(2), 1.6
"""Of the flow time, whose logit is the logarithm of sigma: SiD-DiT's (arXiv 2509.25127)."""

# What ComfyUI puts at the last step of a zero-terminal-SNR schedule, where the true value, 0, has no finite sigma.
ZERO_SNR_ALPHA_CUMPROD = 4.8973451890853435e-08


def scaled_linear_alphas_cumprod(
    beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000, zero_terminal_snr: bool = False
) -> Tensor:
    """Cumulative products ``abar_t`` of the scaled-linear schedule (SDXL's values by default): fp64, [steps].

    ``zero_terminal_snr`` rescales them by algorithm 1 of arXiv 2305.08891, with a last value that is tiny, not 0.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1 - betas, dim=0)
    if zero_terminal_snr:
        root = alphas_cumprod.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas_cumprod = root**2
        alphas_cumprod[-1] = ZERO_SNR_ALPHA_CUMPROD
    return alphas_cumprod


class NoiseSchedule(ABC):
    """How a model family sees noise, behind the one convention ``x = x0 + sigma * eps``.

    A family's schedule is one subclass: which sigma an integer timestep has, which timestep the network is told, how
    its input is scaled, and what its output means. Networks, losses and the chain know no more of a schedule than this.

    prediction_type: what the network predicts, as recipes name it
    """

    prediction_type: str

    @abstractmethod
    def sigma(self, timestep: Tensor) -> Tensor:
        """Sigmas (fp32, same shape and device) of integer timesteps in [0, 1000)."""

    @abstractmethod
    def timestep(self, sigma: Tensor) -> Tensor:
        """What the network is told about sigmas: fp32, same shape. A sigma of an integer gives that integer exactly."""

    @abstractmethod
    def scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        """``x`` [B, ...] at sigma [B] as the network sees it: fp32."""

    @abstractmethod
    def to_x0(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """What the network said about ``x`` [B, ...] at sigma [B], as x0 in fp32."""

    def ladder(self, steps: int, t_init: int) -> list[int]:
        """The ``steps`` timesteps of a generator, ``t_init * (K - k) // K``: descending."""
        return timestep_ladder(steps, t_init)

    def draw_sigma(self, count: int, t_min: int, t_max: int, rng: BatchRNG, levels: NoiseLevels = "uniform") -> Tensor:
        """Noise levels [count] at which scores are compared, between those of ``t_min`` and ``t_max - 1``.

        ``uniform``: those of uniform timesteps; ``logit_normal``: the flow time ``s = sigma / (1 + sigma)`` is
        ``sigmoid(N(ln 2, 1.6))``, so that ``log sigma`` is the normal variable, cut off at the two ends.
        """
        if levels == "uniform":
            return self.sigma(rng.randint(t_min, t_max, count))
        ends = self.sigma(torch.tensor([t_min, t_max - 1], device=rng.device)).log()
        low, high = torch.special.ndtr((ends - LOGIT_MEAN) / LOGIT_SPREAD)
        share = low + (high - low) * rng.rand(count)
        log_sigma: Tensor = LOGIT_MEAN + LOGIT_SPREAD * torch.special.ndtri(share)
        return log_sigma.clamp(*ends).exp()


class VPSchedule(NoiseSchedule):
    """A discrete variance-preserving schedule, SDXL's and its relatives'. ``sigmas`` is fp32, ascending, [steps].

    timestep_scale: the network is told ``floor(timestep_scale * t)`` at timestep t, and its output means what it means
        at that timestep (NitroFusion, arXiv 2412.02030, whose scheduler is in the README of ChenDarYen/NitroFusion)
    """

    def __init__(self, alphas_cumprod: Tensor, prediction_type: str = "epsilon", timestep_scale: float = 1.0):
        alphas_cumprod = alphas_cumprod.double()
        self.sigmas = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().float()
        self.log_sigmas = self.sigmas.log()
        self.prediction_type = prediction_type
        self.timestep_scale = timestep_scale

    def sampled_as(self, prediction_type: str, timestep_scale: float) -> VPSchedule:
        """The same noise levels for a generator that was made of such a network."""
        schedule = copy(self)
        schedule.prediction_type, schedule.timestep_scale = prediction_type, timestep_scale
        return schedule

    @classmethod
    def sdxl(cls, zero_terminal_snr: bool = False, prediction_type: str = "epsilon") -> VPSchedule:
        return cls(scaled_linear_alphas_cumprod(zero_terminal_snr=zero_terminal_snr), prediction_type)

    def __len__(self) -> int:
        return len(self.sigmas)

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.sigmas.to(timestep.device)[timestep.long()]

    def timestep(self, sigma: Tensor) -> Tensor:
        """Linear in log sigma between two entries of the table."""
        table = self.log_sigmas.to(sigma.device)
        log_sigma = sigma.float().log().clamp(table[0], table[-1])
        high = torch.searchsorted(table, log_sigma.contiguous()).clamp(1, len(table) - 1)
        low = high - 1
        timestep = low + (log_sigma - table[low]) / (table[high] - table[low])
        nearest = timestep.round()
        timestep = torch.where((timestep - nearest).abs() < 1e-3, nearest, timestep)
        return timestep if self.timestep_scale == 1 else (timestep * self.timestep_scale).floor()

    def scale_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return x * input_scale(sigma, x)

    def to_x0(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        if self.timestep_scale != 1:
            told = self.sigma(self.timestep(sigma))
            x, sigma = self.scale_input(x, sigma) / input_scale(told, x), told
        return prediction_to_x0(prediction, x, sigma, self.prediction_type)


def expand(sigma: Tensor, x: Tensor) -> Tensor:
    """Per-sample values [B] (or a scalar) as fp32, shaped to multiply ``x`` [B, ...]."""
    return sigma.float().reshape(-1, *[1] * (x.ndim - 1))


def input_scale(sigma: Tensor, x: Tensor) -> Tensor:
    """``c_in = 1 / sqrt(1 + sigma^2)``: brings ``x`` [B, ...] at sigma [B] to the network's unit variance."""
    return (1 + expand(sigma, x) ** 2).rsqrt()


def prediction_to_x0(prediction: Tensor, x: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """What the network said (eps, v or x0) about ``x`` [B, ...] at sigma [B], as x0 in fp32."""
    s = expand(sigma, x)
    x, prediction = x.float(), prediction.float()
    if prediction_type == "epsilon":
        return x - s * prediction
    if prediction_type == "v_prediction":
        return x / (1 + s**2) - prediction * s * (1 + s**2).rsqrt()
    if prediction_type == X0:
        return prediction
    raise ValueError(f"prediction type: expected one of {', '.join((*PREDICTION_TYPES, X0))}, got {prediction_type!r}")


def x0_to_epsilon(x0: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The noise that ``x = x0 + sigma * eps`` implies: fp32, [B, ...]."""
    return (x.float() - x0.float()) / expand(sigma, x)
