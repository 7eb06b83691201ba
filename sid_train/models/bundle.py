"""A text-to-image model as distillation and sampling need it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from ..core.recipe import Unconditional
from ..files.hashing import file_sha256
from .conditioning import Conditioner, Conditioning, LatentCodec
from .denoiser import Denoiser


@dataclass
class ModelBundle:
    """Networks and facts of one model.

    latent_shape: channels, height, width
    image_size: height and width in pixels
    weights: the file that the network's weights came from
    """

    name: str
    architecture: str
    denoiser: Denoiser
    conditioner: Conditioner
    codec: LatentCodec
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    weights: Path
    licence: str
    zero_terminal_snr: bool = False

    @cached_property
    def file_hash(self) -> str:
        """SHA-256 of ``weights``, hex. Whoever knows it already sets it: the file may be large."""
        return file_sha256(self.weights)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> ModelBundle:
        """Where everything is computed from now on; ``dtype`` is the network's (text encoders and VAE stay fp32)."""
        self.denoiser.to(device, dtype)
        self.conditioner.to(device)
        self.codec.to(device)
        return self

    def unconditional(self, kind: Unconditional) -> Conditioning:
        """The embedding without text, a single row: ``empty`` encodes "", ``zeros`` is diffusers' default for SDXL."""
        empty = self.conditioner.encode([""])
        if kind == "empty":
            return empty
        said = {name: tensor for name, tensor in empty.tensors.items() if name != "time_ids"}
        return empty.replace(**{name: torch.zeros_like(tensor) for name, tensor in said.items()})


@dataclass
class ModelShapes:
    """A model without its weights, for plans.

    denoiser: on the meta device
    latent_shape: channels, height, width
    conditioning: the shape of each named tensor that a prompt becomes
    text_parameters: of the text encoders
    vae: None where there is none; on the meta device
    """

    name: str
    denoiser: Denoiser
    latent_shape: tuple[int, int, int]
    conditioning: dict[str, tuple[int, ...]]
    text_parameters: int
    vae: AutoencoderKL | None


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
