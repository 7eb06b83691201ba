"""A text-to-image model as distillation and sampling need it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ..core.recipe import SiDRecipe, Unconditional, has_recipe, read_safetensors_metadata
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

    def unconditional(self, kind: Unconditional) -> Conditioning:
        """The embedding without text, a single row: ``empty`` encodes "", ``zeros`` is diffusers' default for SDXL."""
        empty = self.conditioner.encode([""])
        if kind == "empty":
            return empty
        return Conditioning(torch.zeros_like(empty.text), torch.zeros_like(empty.pooled), empty.time_ids)


def load_model(source: str) -> ModelBundle:
    """``demo``, the embedded teacher, or a safetensors file that ``sid_train`` exported; ValueError for all else."""
    from ..demo import model as demo

    if source == "demo":
        return demo.load_file_bundle(demo.TEACHER_FILE)
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"model {source!r}: expected 'demo' or a .safetensors file; there is no such file")
    metadata = read_safetensors_metadata(path)
    architecture = metadata.get("modelspec.architecture", "")
    if architecture != demo.ARCHITECTURE:
        raise ValueError(
            f"model {source}: expected architecture {demo.ARCHITECTURE!r}, which is what this version reads, got "
            f"{architecture or 'a file that states none'!r}"
        )
    bundle = demo.load_file_bundle(path)
    if has_recipe(metadata):
        bundle.recipe = SiDRecipe.from_metadata(metadata, path)
    return bundle


def load_generator(source: str) -> tuple[ModelBundle, SiDRecipe]:
    """A distilled generator and the recipe it carries; ValueError if it carries none."""
    bundle = load_model(source)
    if bundle.recipe is None:
        raise ValueError(f"model {source}: expected a distilled generator, but it carries no SiD recipe")
    return bundle, bundle.recipe


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
