"""The losses of few-step SiD (arXiv 2505.12674). Tensors in, one fp32 value a sample out: [B].

Latent losses are summed over a sample's elements, as in the authors' code.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.noise_schedule import expand, x0_to_epsilon

SiDWeighting = Literal[
    "l1",
    "one_minus_sigma",
    "one_minus_sigma_squared",
    "one_over_sigma",
    "one_over_sigma_squared",
    "snr",
    "snr_sqrt",
    "uniform",
]
SID_WEIGHTINGS: tuple[str, ...] = get_args(SiDWeighting)


def denoising_loss(fake_x0: Tensor, x_t: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """Denoising loss ``|eps_psi - eps|^2`` of the fake score on what the generator made."""
    return (x0_to_epsilon(fake_x0, x_t, sigma) - eps).square().flatten(1).sum(1)


def sid_weight(x_g: Tensor, teacher_x0: Tensor, sigma: Tensor, weighting: SiDWeighting) -> Tensor:
    """The per-sample weight w of the generator's losses, without gradient: [B].

    ``l1`` is ``1 / mean|x_g - f_phi|`` (SiD, arXiv 2404.04057). The others that are not ``uniform`` are those of the
    code of SiD-DiT (arXiv 2509.25127), whose sigma in [0, 1] is the flow time ``s = sigma / (1 + sigma)`` of our sigma;
    ``snr`` is ``(1 - s)^2 / s^2``.
    """
    if weighting == "l1":
        return 1 / (x_g - teacher_x0).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    sigma = sigma.float()
    flow_time = sigma / (1 + sigma)
    return {
        "one_minus_sigma": 1 / (1 + sigma),
        "one_minus_sigma_squared": (1 + sigma) ** -2,
        "one_over_sigma": 1 / flow_time,
        "one_over_sigma_squared": flow_time**-2,
        "snr": sigma**-2,
        "snr_sqrt": 1 / sigma,
        "uniform": torch.ones_like(sigma),
    }[weighting]


def sid_loss(teacher_x0: Tensor, fake_x0: Tensor, x_g: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """SiD's generator loss: ``w * sum[(f_phi - f_psi) * ((f_phi - x_g) - alpha * (f_phi - f_psi))]``.

    Gradients flow through ``x_g`` and through both networks' estimates.
    """
    difference = teacher_x0 - fake_x0
    return weight * (difference * ((teacher_x0 - x_g) - alpha * difference)).flatten(1).sum(1)


def distribution_matching_loss(teacher_x0: Tensor, fake_x0: Tensor, x_g: Tensor, weight: Tensor) -> Tensor:
    """DMD's generator loss (arXiv 2311.18828, 2405.14867): ``|d|^2 / 2`` whose gradient is d for ``x_g`` and nothing
    else, with ``d = w * (f_psi - f_phi)``.

    That is the part of SiD's gradient that does not pass through the two networks.
    """
    direction = (expand(weight, x_g) * (fake_x0 - teacher_x0)).detach()
    return 0.5 * (x_g - (x_g - direction).detach()).square().flatten(1).sum(1)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Half the binary cross-entropies of real (1) and generated (0) latents, averaged over the logit map [B, h, w]."""
    real = F.softplus(-real_logits).flatten(1).mean(1)
    fake = F.softplus(fake_logits).flatten(1).mean(1)
    return 0.5 * (real + fake)


def generator_gan_loss(fake_logits: Tensor, weight: Tensor, elements: int) -> Tensor:
    """``w * C*H*W * BCE(fake, 1)`` with logits clamped to +-10 (SiDA, arXiv 2410.14919)."""
    return weight * elements * F.softplus(-fake_logits.clamp(-10, 10)).flatten(1).mean(1)


def pseudo_huber_loss(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """``sum(sqrt((a - b)^2 + c^2) - c)``: LCM's, with its c (arXiv 2310.04378)."""
    return ((a - b).square() + c**2).sqrt().sub(c).flatten(1).sum(1)


def add_noise(x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """``x_t = x0 + sigma_t * eps``: fp32, [B, ...]."""
    return x0.float() + expand(sigma, x0) * eps
