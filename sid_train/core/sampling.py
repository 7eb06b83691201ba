"""The few-step generation chain: the one implementation that training, ``sid_train sample`` and ComfyUI share.

"Few-Step Diffusion via Score identity Distillation" (arXiv 2505.12674): step k noises the last estimate of
x0 to the k-th timestep of a fixed ladder and lets the generator estimate x0 again, with text but without
classifier-free guidance.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from .noise_schedule import NoiseSchedule, x0_to_epsilon
from .timesteps import check_timesteps

NoiseMode = Literal["fresh", "fixed", "ddim", "ancestral", "tcd"]
NOISE_MODES: tuple[str, ...] = get_args(NoiseMode)
SiDNoiseMode = Literal["fresh", "fixed", "ddim"]
"""Those that SiD trains with."""
SID_NOISE_MODES: tuple[str, ...] = get_args(SiDNoiseMode)
DEFAULT_GAMMA = 0.3
"""Of ``tcd``: what its publishers recommend."""

Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x [B, ...], sigma [B]) -> x0 [B, ...]"""
NextNoise = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(step k >= 1, the last x, its sigma, its x0) -> the noise of step k, shaped like x"""
Callback = Callable[[int, Tensor, Tensor, Tensor], None]
"""(step, x, sigma, x0), after every network call; must not change them"""


def ladder_sigmas(schedule: NoiseSchedule, timesteps: Sequence[int]) -> Tensor:
    """Sigmas of descending timesteps, then 0: fp32, [K + 1], what ComfyUI calls SIGMAS."""
    check_timesteps(timesteps)
    return torch.cat([schedule.sigma(torch.tensor(timesteps)), torch.zeros(1)])


def initial_noise(shape: Sequence[int], seed: int, batch_index: Sequence[int] | None = None) -> Tensor:
    """Standard normal noise of ``shape`` [B, ...] from one CPU generator: fp32, the same on every device.

    These are the numbers of ComfyUI's ``prepare_noise``. With ``batch_index`` image i gets the noise of that place in
    a larger batch, so that it can be made again alone.
    """
    generator = torch.Generator().manual_seed(seed)
    if batch_index is None:
        return torch.randn(*shape, generator=generator)
    if len(batch_index) != shape[0]:
        raise ValueError(f"batch_index: expected {shape[0]} places, one an image, got {len(batch_index)}")
    places = [torch.randn(1, *shape[1:], generator=generator) for _ in range(max(batch_index) + 1)]
    return torch.cat([places[i] for i in batch_index])


def seeded_noise(first_noise: Tensor, seed: int) -> Callable[[int], Tensor]:
    """Fresh noise for step k from a CPU generator for each image, seeded with SHA-256 of the seed, the step and the
    image's first noise: image i of a batch equals image i alone, on every device.

    Where the first noise is zero (ComfyUI's DisableNoise: the latent arrives noised) the image's place in the batch
    tells it from the others.
    """
    digests = [
        hashlib.sha256(image.contiguous().numpy().tobytes() + (b"" if image.any() else b"%d" % place)).digest()
        for place, image in enumerate(first_noise.detach().cpu().float())
    ]

    def draw(k: int) -> Tensor:
        images = []
        for digest in digests:
            key = hashlib.sha256(f"{seed}:{k}:".encode() + digest).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
            images.append(torch.randn(first_noise.shape[1:], generator=generator))
        return torch.stack(images).to(first_noise.device)

    return draw


def noise_sampler(
    mode: NoiseMode,
    first_noise: Tensor,
    draw: Callable[[int], Tensor],
    shares: Sequence[float] = (),
) -> NextNoise:
    """The noise of the steps after the first.

    ``fresh`` takes ``draw(k)`` (``seeded_noise`` for reproducible pictures), ``fixed`` repeats the first noise, or
    ``draw(0)`` where that is all zero, and ``ddim`` takes the noise that the last step implies. ``ancestral`` and
    ``tcd`` blend the implied noise with a fresh one, ``a * implied + sqrt(1 - a^2) * fresh`` with ``a = shares[k]``.
    """
    if mode == "fresh":
        return lambda k, x, sigma, x0: draw(k)
    if mode == "fixed":
        repeated = first_noise if first_noise.any() else draw(0)
        return lambda k, x, sigma, x0: repeated
    if mode == "ddim":
        return lambda k, x, sigma, x0: x0_to_epsilon(x0, x, sigma)
    if mode in ("ancestral", "tcd"):
        return lambda k, x, sigma, x0: shares[k] * x0_to_epsilon(x0, x, sigma) + (1 - shares[k] ** 2) ** 0.5 * draw(k)
    raise ValueError(f"noise mode: expected one of {', '.join(NOISE_MODES)}, got {mode!r}")


class Timesteps(Protocol):
    """What knows the timesteps of noise levels: a ``NoiseSchedule``, or ComfyUI's model sampling."""

    def timestep(self, sigma: Tensor) -> Tensor: ...

    def sigma(self, timestep: Tensor) -> Tensor: ...


def implied_shares(mode: NoiseMode, sigmas: Tensor, timesteps: Timesteps, gamma: float = DEFAULT_GAMMA) -> list[float]:
    """How much of the noise of each step is what the step before implied: [K], the first not used; [] for modes that
    do not blend.

    ``ancestral`` (k-diffusion's ancestral Euler step, with which Turbo is sampled): ``sigma_k / sigma_(k-1)``.
    ``tcd`` ("Trajectory Consistency Distillation", arXiv 2402.19159, algorithm 4): the estimate goes down to the
    timestep ``s = floor((1 - gamma) * t_k)`` with the implied noise, and up to t_k with a fresh one: ``sigma_s /
    sigma_k``.

    sigmas: the noise levels of the chain, then 0, [K + 1]
    """
    levels = sigmas[:-1]
    if mode == "ancestral":
        return [1.0, *(b / a for a, b in pairwise(levels.tolist()))]
    if mode == "tcd":
        below = [math.floor((1 - gamma) * round(t)) for t in timesteps.timestep(levels[1:]).tolist()]
        lower = timesteps.sigma(torch.tensor(below, device=levels.device))
        return [1.0, *(lower.to(levels) / levels[1:]).tolist()]
    return []


def few_step_sample(
    denoise: Denoise,
    sigmas: Tensor,
    first_noise: Tensor,
    next_noise: NextNoise,
    x0: Tensor | None = None,
    callback: Callback | None = None,
    unit_variance_start: bool = False,
) -> Tensor:
    """Runs the chain: ``len(sigmas) - 1`` calls of ``denoise``, each on fp32 input.

    sigmas: descending noise levels, then 0 (``ladder_sigmas``), [K + 1]
    first_noise: standard normal, [B, ...]
    next_noise: ``noise_sampler(...)``, or any function with its signature
    x0: where to start for image to image, [B, ...]; zeros, the start that the generator was trained for, if None
    unit_variance_start: without ``x0`` the network's first input is the noise itself, ``x = sqrt(1 + sigma^2) * noise``
        (DMD2, LCM), not noised zeros
    Returns the last estimate of x0, fp32, [B, ...].
    """
    noise = first_noise.float()
    if x0 is None and unit_variance_start:
        noise = noise * (1 + sigmas[0] ** -2.0).sqrt().to(noise)
    x0 = torch.zeros_like(noise) if x0 is None else x0.float()
    x = sigma = None
    for k, level in enumerate(sigmas[:-1].to(noise.device)):
        if x is not None and sigma is not None:
            noise = next_noise(k, x, sigma, x0)
        sigma = level.expand(len(noise))
        x = x0 + level * noise
        x0 = denoise(x, sigma).float()
        if callback is not None:
            callback(k, x, sigma, x0)
    return x0
