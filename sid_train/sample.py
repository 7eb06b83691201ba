"""Pictures from prompts with a distilled generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from .core.noise_schedule import VPSchedule
from .core.recipe import SiDRecipe
from .core.sampling import few_step_sample, implied_shares, initial_noise, ladder_sigmas, noise_sampler, seeded_noise
from .models.bundle import ModelBundle
from .models.conditioning import Conditioning
from .models.denoiser import Denoiser
from .models.guided import guided_denoise

BATCH_ELEMENTS = 256 * 12 * 8 * 8
TEACHER_STEPS = 30


def pictures_at_once(latent_shape: tuple[int, ...]) -> int:
    """Pictures in one network call: 256 of the demo's, three of SDXL's at 1024x1024."""
    return max(1, BATCH_ELEMENTS // math.prod(latent_shape))


@torch.no_grad()
def sample_teacher_latents(
    bundle: ModelBundle,
    cond: Conditioning,
    unconditional: Conditioning,
    noise: Tensor,
    steps: int = TEACHER_STEPS,
    scale: float = 1.0,
) -> Tensor:
    """Latents of a diffusion model that is not distilled, from DPM-Solver++ (2M, arXiv 2211.01095) at guidance
    ``scale``: like ``noise`` [B, ...], which is standard normal.
    """
    if not isinstance(bundle.denoiser.schedule, VPSchedule):
        raise ValueError(f"{bundle.name}: expected the noise schedule of Stable Diffusion, which DPM-Solver++ runs on")
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type="sample",
        rescale_betas_zero_snr=bundle.zero_terminal_snr,
    )
    scheduler.set_timesteps(steps, device=noise.device)
    x = noise
    for t in scheduler.timesteps:
        sigma = bundle.denoiser.schedule.sigma(t.expand(len(x)))[:, None, None, None]
        # diffusers' x is sqrt(abar) times ours.
        ours = x * (1 + sigma**2).sqrt()
        x0 = guided_denoise(bundle.denoiser, ours, sigma.flatten(), cond, unconditional, scale)
        x = scheduler.step(x0, t, x).prev_sample
    return x


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    cond: Conditioning,
    latent_shape: tuple[int, ...],
    recipe: SiDRecipe,
    seed: int,
    steps: int | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Latents [len(cond), *latent_shape] on the recipe's timesteps, one network call a step.

    noise: the first one, instead of what ``seed`` gives
    """
    sigmas = ladder_sigmas(denoiser.schedule, recipe.timesteps_for(steps))
    shares = implied_shares(recipe.noise_mode, sigmas, denoiser.schedule, recipe.noise_gamma)
    if noise is None:
        noise = initial_noise((len(cond), *latent_shape), seed).to(cond.device)
    batch_size = pictures_at_once(latent_shape)
    parts = []
    for start in range(0, len(cond), batch_size):
        rows = slice(start, start + batch_size)
        first = noise[rows]
        told = cond[rows]
        parts.append(
            few_step_sample(
                lambda x, sigma, told=told: denoiser(x, sigma, told),
                sigmas,
                first,
                noise_sampler(recipe.noise_mode, first, seeded_noise(first, seed), shares),
                unit_variance_start=recipe.unit_variance_start,
            )
        )
    return torch.cat(parts)


def sample_images(
    bundle: ModelBundle, recipe: SiDRecipe, prompts: Sequence[str], seed: int, steps: int | None = None
) -> Tensor:
    """Images [len(prompts), 3, H, W] in [-1, 1]."""
    cond = bundle.conditioner.encode(prompts)
    bundle.conditioner.unload()
    latents = sample_latents(bundle.denoiser, cond, bundle.latent_shape, recipe, seed, steps)
    return bundle.codec.decode(latents).clamp(-1, 1).cpu()
