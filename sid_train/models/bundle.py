"""A text-to-image model as distillation and sampling need it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.recipe import SDXL_ARCHITECTURE, SiDRecipe, Unconditional, has_recipe, read_safetensors_metadata
from .conditioning import Conditioner, Conditioning, LatentCodec
from .unet import UNetDenoiser


@dataclass
class ModelBundle:
    """Networks and facts of one model.

    latent_shape: channels, height, width
    file_hash: SHA-256 of the file the weights came from, hex
    recipe: how to sample it, where it is a SiD generator
    """

    name: str
    architecture: str
    denoiser: UNetDenoiser
    conditioner: Conditioner
    codec: LatentCodec
    latent_shape: tuple[int, int, int]
    image_size: tuple[int, int]
    file_hash: str
    licence: str
    zero_terminal_snr: bool = False
    recipe: SiDRecipe | None = None

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> ModelBundle:
        """Where everything is computed from now on; ``dtype`` is the UNet's (text encoders and VAE stay fp32)."""
        self.denoiser.to(device, dtype)
        self.conditioner.to(device)
        self.codec.to(device)
        return self

    def unconditional(self, kind: Unconditional) -> Conditioning:
        """The embedding without text, a single row: ``empty`` encodes "", ``zeros`` is diffusers' default for SDXL."""
        empty = self.conditioner.encode([""])
        if kind == "empty":
            return empty
        return Conditioning(torch.zeros_like(empty.text), torch.zeros_like(empty.pooled), empty.time_ids)


def load_model(source: str, dtype: torch.dtype | None = torch.float32, resolution: int = 0) -> ModelBundle:
    """A model on the CPU, its UNet in ``dtype``; None leaves it out (on the meta device), for text, latents and facts.
    ValueError for what this version cannot read.

    source: ``demo`` (the embedded teacher), a safetensors file (SDXL's, or one that ``sid_train`` exported), a
        diffusers folder of SDXL, or its hub id
    resolution: of the square pictures, in pixels; 0 is the model's own
    """
    from ..demo import model as demo

    path = Path(source)
    metadata = read_safetensors_metadata(path) if path.is_file() else {}
    if source == "demo" or metadata.get("modelspec.architecture") == demo.ARCHITECTURE:
        if resolution:
            raise ValueError(f"model.resolution: {source} has its own; leave it at 0")
        bundle = demo.load_file_bundle(demo.TEACHER_FILE if source == "demo" else path)
        bundle.denoiser.to(dtype or torch.float32)
    else:
        from .sdxl import load_sdxl

        bundle = load_sdxl(source, dtype, resolution)
    if has_recipe(metadata):
        bundle.recipe = SiDRecipe.from_metadata(metadata, path)
    return bundle


def load_generator(source: str, base: str | None = None, resolution: int = 0) -> tuple[ModelBundle, SiDRecipe]:
    """A distilled generator, fp32 on the CPU, and the recipe it carries; ValueError if it carries none.

    ``base`` is the model that a LoRA belongs on, or that has the text encoders and the VAE which a file lacks.
    """
    path = Path(source)
    metadata = read_safetensors_metadata(path) if path.is_file() else {}
    if metadata.get("modelspec.architecture", "").startswith(SDXL_ARCHITECTURE) and has_recipe(metadata):
        from ..sdxl_export import load_sdxl_generator

        return load_sdxl_generator(path, base, resolution)
    if base is not None:
        raise ValueError(f"--base: only for SDXL files with a recipe, which {source} is not")
    bundle = load_model(source, resolution=resolution)
    if bundle.recipe is None:
        raise ValueError(f"model {source}: expected a distilled generator, but it carries no SiD recipe")
    return bundle, bundle.recipe


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
