"""The losses of few-step SiD (arXiv 2505.12674). Tensors in, one fp32 value a sample out: [B].

Latent losses are summed over a sample's elements, as in the authors' code.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.noise_schedule import expand, x0_to_epsilon

SiDWeighting = Literal["l1", "one_minus_sigma", "uniform"]
SID_WEIGHTINGS: tuple[str, ...] = get_args(SiDWeighting)


def denoising_loss(fake_x0: Tensor, x_t: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """Denoising loss ``|eps_psi - eps|^2`` of the fake score on what the generator made."""
    return (x0_to_epsilon(fake_x0, x_t, sigma) - eps).square().flatten(1).sum(1)


def sid_weight(x_g: Tensor, teacher_x0: Tensor, sigma: Tensor, weighting: SiDWeighting) -> Tensor:
    """The per-sample weight w of the generator's losses, without gradient: [B].

    ``l1`` is ``1 / mean|x_g - f_phi|`` (SiD, arXiv 2404.04057); ``one_minus_sigma`` is SiD-DiT's (arXiv 2509.25127),
    whose sigma in [0, 1] is ``sigma / (1 + sigma)`` here.
    """
    if weighting == "l1":
        return 1 / (x_g - teacher_x0).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    if weighting == "one_minus_sigma":
        return 1 / (1 + sigma.float())
    return torch.ones_like(sigma, dtype=torch.float32)


def sid_loss(teacher_x0: Tensor, fake_x0: Tensor, x_g: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SiD's generator loss: ``w * sum[(f_phi - f_psi) * ((f_phi - x_g) - alpha * (f_phi - f_psi))]``.

    Gradients flow through ``x_g`` and through both networks' estimates.
    """
    difference = teacher_x0 - fake_x0
    return weight * (difference * ((teacher_x0 - x_g) - alpha * difference)).flatten(1).sum(1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the binary cross-entropies of real (1) and generated (0) latents, averaged over the logit map [B, h, w]."""
    real = F.softplus(-real_logits).flatten(1).mean(1)
    fake = F.softplus(fake_logits).flatten(1).mean(1)
    return 0.5 * (real + fake)


def generator_gan_loss(fake_logits: Tensor, weight: Tensor, elements: int) -> Tensor:
    """``w * C*H*W * BCE(fake, 1)`` with logits clamped to +-10 (SiDA, arXiv 2410.14919)."""
    return weight * elements * F.softplus(-fake_logits.clamp(-10, 10)).flatten(1).mean(1)


def add_noise(x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """``x_t = x0 + sigma_t * eps``: fp32, [B, ...]."""
    return x0.float() + expand(sigma, x0) * eps
