"""The generations of Stable Diffusion as model families."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from ...core.noise_schedule import VPSchedule
from ...core.recipe import SiDRecipe
from ...files.tensors import LazyTensor, open_tensors
from ..bundle import ModelShapes, count_parameters
from ..family import AUTO, ExportOptions, Generator, ModelFamily
from ..unet import UNetDenoiser
from .base import base_text_encoders, base_unet, base_vae
from .export import FORMATS, export, open_exported
from .folder import open_vae, weights_of
from .keys import VAE
from .kinds import Kind, kind_of_name, predicts_by_name
from .networks import build_unet, build_vae
from .parts import StableDiffusionParts, check_resolution, open_parts, vae_tensors
from .text import WINDOW


class StableDiffusionFamily(ModelFamily):
    """One generation: single files with ldm names, diffusers folders and hub ids."""

    export_formats = FORMATS

    def __init__(self, kind: Kind):
        self.kind = kind

    @property
    def architecture(self) -> str:
        return self.kind.architecture.name

    def opens(self, source: str, metadata: Mapping[str, str]) -> bool:
        """Of names alone, such as hub ids. What is here says its generation by its UNet's tensors, which ``open_parts``
        looks at: whichever of these families is asked, and so none of them reads the header for it.
        """
        return not Path(source).exists() and kind_of_name(source) is self.kind

    def check_resolution(self, resolution: int) -> None:
        check_resolution(resolution)

    def open(self, source: str, prediction_type: str = AUTO) -> StableDiffusionParts:
        return open_parts(source, prediction_type)

    def shapes(self, source: str, resolution: int, prediction_type: str = AUTO) -> ModelShapes:
        """Read from headers; those of the base model where there is no such file or folder here."""
        check_resolution(resolution)
        path = Path(source)
        if not path.exists():
            text = sum(map(count_parameters, base_text_encoders(self.kind)))
            name = f"{self.kind.architecture.base_model} (there is no {source} here to read the shapes of)"
            predicts = predicts_by_name(source) if prediction_type == AUTO else prediction_type
            size = resolution or self.kind.architecture.variant(predicts).resolution
            return _shapes(name, base_unet(self.kind), size, text, base_vae())
        parts = open_parts(source, prediction_type)
        text, vae = (_rest_of_folder if path.is_dir() else _rest_of_file)(path, parts.kind)
        unet = build_unet(parts.unet_config, parts.tensors, None)
        size = resolution or parts.kind.architecture.variant(parts.prediction_type).resolution
        return _shapes(f"{parts.name}, read from {source}", unet, size, text, vae)

    def open_generator(self, path: Path, recipe: SiDRecipe, base: str | None) -> Generator:
        return open_exported(path, recipe, base)

    def export(self, generator: Generator, path: Path, options: ExportOptions) -> list[str]:
        return export(generator, path, options)


def _shapes(
    name: str, unet: UNet2DConditionModel, resolution: int, text_parameters: int, vae: AutoencoderKL | None
) -> ModelShapes:
    size = resolution // 8
    config = unet.config
    conditioning: dict[str, tuple[int, ...]] = {"text": (WINDOW, config.cross_attention_dim)}
    if config.addition_embed_type is not None:
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditioning |= {"pooled": (pooled,), "time_ids": (6,)}
    return ModelShapes(
        name=name,
        denoiser=UNetDenoiser(unet, VPSchedule.sdxl()),
        latent_shape=(config.in_channels, size, size),
        conditioning=conditioning,
        text_parameters=text_parameters,
        vae=vae,
    )


def _rest_of_file(path: Path, kind: Kind) -> tuple[int, AutoencoderKL | None]:
    """The parameters of the text encoders, and the VAE."""
    tensors = open_tensors(path)
    of_text = tuple(prefix for encoder in kind.encoders for prefix in encoder.prefixes)
    text = _elements({name: tensor for name, tensor in tensors.items() if name.startswith(of_text)})
    if not any(name.startswith(VAE) for name in tensors):
        return text, None
    vae = {name.removeprefix(VAE): tensor for name, tensor in vae_tensors(path).items()}
    return text, build_vae(vae, None, str(path), kind.scaling_factor)


def _rest_of_folder(folder: Path, kind: Kind) -> tuple[int, AutoencoderKL | None]:
    there = [encoder.folder for encoder in kind.encoders if (folder / encoder.folder).is_dir()]
    text = sum(_elements(open_tensors(weights_of(folder, name))) for name in there)
    if not (folder / "vae").is_dir():
        return text, None
    return text, build_vae(open_vae(folder, kind), None, str(folder), kind.scaling_factor)


def _elements(tensors: Mapping[str, LazyTensor]) -> int:
    return sum(torch.Size(tensor.shape).numel() for tensor in tensors.values())
