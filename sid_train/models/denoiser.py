"""The one contract of every network here: ``denoise(x, sigma, cond) -> x0``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..core.noise_schedule import NoiseSchedule
from .conditioning import Conditioning

Network = Callable[..., Any]
"""A ``Denoiser``, or a data-parallel wrapper around one: called with (x, sigma, cond) it gives x0."""


class Denoiser(nn.Module, ABC):
    """A network behind ``denoise(x, sigma, cond) -> x0``; a model family has one subclass.

    Calling it is ``denoise``. Data-parallel wrappers see calls alone, so ``forward`` takes the name of the method that
    is meant; ``logits`` and ``denoise_with_logits`` below are how to ask for the other two.
    """

    schedule: NoiseSchedule

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The network that is wrapped: what adapters go into."""

    @abstractmethod
    def denoise(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """x [B, C, H, W] at noise level sigma [B] -> x0 [B, C, H, W], fp32."""

    @abstractmethod
    def logits(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        """The discriminator's map [B, h, w] (Diffusion GAN, arXiv 2410.14919), at the cost of the encoder alone."""

    @abstractmethod
    def denoise_with_logits(self, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
        """``denoise`` and ``logits`` from one pass."""

    def forward(self, x: Tensor, sigma: Tensor, cond: Conditioning, call: str = "denoise") -> Any:
        return getattr(self, call)(x, sigma, cond)

    def blocks(self) -> list[nn.Module]:
        """The modules that hold nearly all weights: sharding gathers and frees them one by one."""
        return []

    def lora_targets(self, attention_only: bool) -> list[str]:
        """The ends of the names of the modules in ``network`` that a LoRA adapts."""
        raise ValueError(f"adapter.rank: expected 0, since {type(self).__name__} knows no modules for a LoRA")

    def use_checkpointing(self, run: Callable[..., Any] | None = None) -> None:
        """Computes blocks again in the backward pass instead of keeping their activations.

        run: ``run(module, *inputs)`` runs a block so; the network's own way if None
        """
        raise ValueError(
            f"training.gradient_checkpointing: expected false, since {type(self).__name__} cannot compute blocks again"
        )


def logits(network: Network, x: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
    """``Denoiser.logits`` of a network that may be wrapped."""
    return network(x, sigma, cond, call="logits")


def denoise_with_logits(network: Network, x: Tensor, sigma: Tensor, cond: Conditioning) -> tuple[Tensor, Tensor]:
    """``Denoiser.denoise_with_logits`` of a network that may be wrapped."""
    return network(x, sigma, cond, call="denoise_with_logits")
