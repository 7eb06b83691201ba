"""The shapes of the model that a run distils: read from a file's header, or SDXL base's where the file is not here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from ..core.noise_schedule import NoiseSchedule
from ..models.sdxl import RESOLUTION, build_unet, check_resolution, open_sdxl
from ..models.sdxl_base import sdxl_text_encoders, sdxl_unet, sdxl_vae
from ..models.sdxl_keys import CLIP_G, CLIP_L, VAE, vae_config
from ..models.sdxl_text import MAX_TOKENS
from ..models.unet import UNetDenoiser
from ..tensors import LazyTensor, open_tensors


@dataclass
class Architecture:
    """A model without its weights.

    latent_shape: channels, height, width
    text_shape, pooled_width: what its text encoders give for a prompt
    text_parameters: of the text encoders
    vae: None where there is none
    """

    name: str
    denoiser: UNetDenoiser
    latent_shape: tuple[int, int, int]
    text_shape: tuple[int, int]
    pooled_width: int
    text_parameters: int
    vae: AutoencoderKL | None


def read_architecture(source: str, resolution: int) -> Architecture:
    """The model that ``model.teacher`` names, on the meta device. ValueError for a file that is no such model."""
    if source == "demo":
        return _demo()
    check_resolution(resolution)
    if not Path(source).exists():
        unet, vae = sdxl_unet(), sdxl_vae()
        text = sum(map(count_parameters, sdxl_text_encoders()))
        return _sdxl(f"SDXL base (there is no {source} here to read the shapes of)", unet, resolution, text, vae)
    parts = open_sdxl(source)
    unet = build_unet(parts.unet_config, parts.unet, None)
    text, vae = (_rest_of_folder if Path(source).is_dir() else _rest_of_file)(Path(source))
    return _sdxl(f"{parts.name}, read from {source}", unet, resolution, text, vae)


def count_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _sdxl(
    name: str, unet: UNet2DConditionModel, resolution: int, text_parameters: int, vae: AutoencoderKL | None
) -> Architecture:
    size = (resolution or RESOLUTION) // 8
    config = unet.config
    return Architecture(
        name=name,
        denoiser=UNetDenoiser(unet, NoiseSchedule.sdxl(), "epsilon"),
        latent_shape=(config.in_channels, size, size),
        text_shape=(MAX_TOKENS, config.cross_attention_dim),
        pooled_width=config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim,
        text_parameters=text_parameters,
        vae=vae,
    )


def _rest_of_file(path: Path) -> tuple[int, AutoencoderKL | None]:
    """The parameters of the text encoders, and the VAE."""
    tensors = open_tensors(path)
    vae = {name.removeprefix(VAE): tensor.shape for name, tensor in tensors.items() if name.startswith(VAE)}
    text = _elements({name: tensor for name, tensor in tensors.items() if name.startswith((CLIP_L, CLIP_G))})
    with torch.device("meta"):
        return text, AutoencoderKL(**vae_config(vae)) if vae else None


def _rest_of_folder(folder: Path) -> tuple[int, AutoencoderKL | None]:
    text = sum(_elements(open_tensors(f)) for f in sorted(folder.glob("text_encoder*/model.safetensors")))
    config = folder / "vae" / "config.json"
    with torch.device("meta"):
        return text, AutoencoderKL.from_config(json.loads(config.read_text())) if config.is_file() else None


def _elements(tensors: Mapping[str, LazyTensor]) -> int:
    return sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())


def _demo() -> Architecture:
    from ..demo.model import MAX_TOKENS, TEXT_WIDTH
    from ..models.bundle import load_model

    bundle = load_model("demo")
    return Architecture(
        name=bundle.name,
        denoiser=bundle.denoiser.to("meta"),
        latent_shape=bundle.latent_shape,
        text_shape=(MAX_TOKENS, TEXT_WIDTH),
        pooled_width=TEXT_WIDTH,
        text_parameters=count_parameters(bundle.conditioner),
        vae=None,
    )
