"""SDXL and its fine-tunes as a model family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ...core.architectures import SDXL
from ...core.noise_schedule import VPSchedule
from ...core.recipe import SiDRecipe
from ...files.tensors import LazyTensor, open_tensors
from ..bundle import ModelShapes, count_parameters
from ..family import AUTO, ExportOptions, Generator, ModelFamily
from ..unet import UNetDenoiser
from .base import sdxl_text_encoders, sdxl_unet, sdxl_vae
from .export import FORMATS, export, open_sdxl_generator
from .folder import open_vae, weights_of
from .keys import CLIP_G, CLIP_L, VAE
from .networks import build_unet, build_vae
from .parts import RESOLUTION, SDXLParts, check_resolution, open_sdxl, vae_tensors
from .text import WINDOW


class SDXLFamily(ModelFamily):
    """Single files with ldm names, diffusers folders and hub ids."""

    architecture = SDXL.name
    export_formats = FORMATS

    def opens(self, source: str, metadata: Mapping[str, str]) -> bool:
        """Always: few files say what they are, and ``open`` refuses other models by name."""
        return True

    def check_resolution(self, resolution: int) -> None:
        check_resolution(resolution)

    def open(self, source: str, prediction_type: str = AUTO) -> SDXLParts:
        return open_sdxl(source, prediction_type)

    def shapes(self, source: str, resolution: int, prediction_type: str = AUTO) -> ModelShapes:
        """Read from headers; SDXL base's where there is no such file or folder here."""
        check_resolution(resolution)
        path = Path(source)
        if not path.exists():
            text = sum(map(count_parameters, sdxl_text_encoders()))
            name = f"SDXL base (there is no {source} here to read the shapes of)"
            return _shapes(name, sdxl_unet(), resolution, text, sdxl_vae())
        parts = open_sdxl(source, prediction_type)
        text, vae = (_rest_of_folder if path.is_dir() else _rest_of_file)(path)
        unet = build_unet(parts.unet_config, parts.tensors, None)
        return _shapes(f"{parts.name}, read from {source}", unet, resolution, text, vae)

    def open_generator(self, path: Path, recipe: SiDRecipe, base: str | None) -> Generator:
        return open_sdxl_generator(path, recipe, base)

    def export(self, generator: Generator, path: Path, options: ExportOptions) -> list[str]:
        return export(generator, path, options)


def _shapes(
    name: str, unet: UNet2DConditionModel, resolution: int, text_parameters: int, vae: AutoencoderKL | None
) -> ModelShapes:
    size = (resolution or RESOLUTION) // 8
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return ModelShapes(
        name=name,
        denoiser=UNetDenoiser(unet, VPSchedule.sdxl()),
        latent_shape=(config.in_channels, size, size),
        conditioning={"text": (WINDOW, config.cross_attention_dim), "pooled": (pooled,), "time_ids": (6,)},
        text_parameters=text_parameters,
        vae=vae,
    )


def _rest_of_file(path: Path) -> tuple[int, AutoencoderKL | None]:
    """The parameters of the text encoders, and the VAE."""
    tensors = open_tensors(path)
    text = _elements({name: tensor for name, tensor in tensors.items() if name.startswith((CLIP_L, CLIP_G))})
    if not any(name.startswith(VAE) for name in tensors):
        return text, None
    vae = {name.removeprefix(VAE): tensor for name, tensor in vae_tensors(path).items()}
    return text, build_vae(vae, None, str(path))


def _rest_of_folder(folder: Path) -> tuple[int, AutoencoderKL | None]:
    there = [name for name in ("text_encoder", "text_encoder_2") if (folder / name).is_dir()]
    text = sum(_elements(open_tensors(weights_of(folder, name))) for name in there)
    return text, build_vae(open_vae(folder), None, str(folder)) if (folder / "vae").is_dir() else None


def _elements(tensors: Mapping[str, LazyTensor]) -> int:
    return sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
