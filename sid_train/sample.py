"""Pictures from prompts with a distilled generator."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .core.recipe import SiDRecipe
from .core.sampling import few_step_sample, implied_shares, initial_noise, ladder_sigmas, noise_sampler, seeded_noise
from .models.bundle import ModelBundle
from .models.conditioning import Conditioning
from .models.denoiser import Denoiser

BATCH_ELEMENTS = 256 * 12 * 8 * 8


def pictures_at_once(latent_shape: tuple[int, ...]) -> int:
    """Pictures in one network call: 256 of the demo's, three of SDXL's at 1024x1024."""
    return max(1, BATCH_ELEMENTS // math.prod(latent_shape))


@torch.no_grad()
def sample_latents(
    denoiser: Denoiser,
    cond: Conditioning,
    latent_shape: tuple[int, ...],
    recipe: SiDRecipe,
    seed: int,
    steps: int | None = None,
) -> Tensor:
    """Latents [len(cond), *latent_shape] on the recipe's timesteps, one network call a step."""
    sigmas = ladder_sigmas(denoiser.schedule, recipe.timesteps_for(steps))
    shares = implied_shares(recipe.noise_mode, sigmas, denoiser.schedule, recipe.noise_gamma)
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
