"""The one list of model families, and how a model is opened by what names it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..core.recipe import SiDRecipe, has_recipe, split_architecture
from ..files.header import read_safetensors_metadata
from .bundle import ModelBundle, ModelShapes
from .digits.family import DigitsFamily
from .family import AUTO, ExportOptions, Generator, ModelFamily, OpenedModel, refuse_to_overwrite
from .stable_diffusion.family import StableDiffusionFamily
from .stable_diffusion.kinds import KINDS

FAMILIES: list[ModelFamily] = [DigitsFamily(), *map(StableDiffusionFamily, KINDS)]
"""Asked in this order; the last opens whatever no other does, and says what it expected."""


def family_of(source: str) -> ModelFamily:
    """The family of a model: a file, a folder, a hub id, or a family's word."""
    metadata = _metadata(source)
    return next((family for family in FAMILIES if family.opens(source, metadata)), FAMILIES[-1])


def shipped_by(word: str) -> ModelFamily | None:
    """The family that ships a model, prompts and pairs under ``word``; None where none does."""
    return next((family for family in FAMILIES if word and word == family.word), None)


def open_model(source: str, resolution: int = 0, prediction_type: str = AUTO) -> OpenedModel:
    """A model of which nothing but headers is read yet. ValueError for what this version cannot read.

    source: ``demo`` (the embedded teacher), a safetensors file (of SD 1.x, 2.x or SDXL, or one that ``sid_train``
        exported), a diffusers folder, or its hub id
    resolution: what it will be loaded at, checked before a large file is downloaded
    prediction_type: see ``ModelFamily.open``
    """
    family = family_of(source)
    family.check_resolution(resolution)
    return family.open(source, prediction_type)


def load_model(
    source: str, dtype: torch.dtype | None = torch.float32, resolution: int = 0, prediction_type: str = AUTO
) -> ModelBundle:
    """A model on the CPU (see ``open_model`` and ``OpenedModel.load``)."""
    return open_model(source, resolution, prediction_type).load(dtype, resolution)


def model_shapes(source: str, resolution: int, prediction_type: str = AUTO) -> ModelShapes:
    """The shapes of a model. ValueError for a file that is no model."""
    return family_of(source).shapes(source, resolution, prediction_type)


def open_generator(source: str, base: str | None = None) -> Generator:
    """A distilled generator in a file that says how it is sampled; ValueError if it does not.

    ``base`` is the model that a LoRA belongs on, or that has the text encoders and the VAE which a file lacks.
    """
    path, metadata = Path(source), _metadata(source)
    if not has_recipe(metadata):
        open_model(source)  # says what is wrong where it is no model at all
        raise ValueError(
            f"model {source}: expected a distilled generator, but it carries no SiD recipe. Give a file one: "
            "python -m sid_train convert"
        )
    recipe = SiDRecipe.from_metadata(metadata, path)
    return _family_named(recipe.architecture, str(path)).open_generator(path, recipe, base)


def export_generator(generator: Generator, path: Path, options: ExportOptions) -> list[str]:
    """Writes ``generator`` to ``path`` as its family does, without a format as ``default_format`` says; returns what
    the user should know.
    """
    family = _family_named(generator.model.architecture, generator.model.name)
    options = replace(options, format=options.format or default_format(generator))
    if options.format not in family.export_formats:
        raise ValueError(
            f"--format: expected {' or '.join(family.export_formats)} for {family.architecture}, got {options.format}"
        )
    read = [generator.source, generator.model.weights, *generator.model.read_from, options.vae]
    read += [] if options.base is None else options.base.read_from
    refuse_to_overwrite(path, [file for file in read if file is not None])
    return family.export(generator, path, options)


def default_format(generator: Generator) -> str:
    """A LoRA where the generator is one and its family writes them, else all in one file."""
    formats = _family_named(generator.model.architecture, generator.model.name).export_formats
    return "lora" if generator.adapter is not None and "lora" in formats else formats[0]


def _family_named(architecture: str, where: str) -> ModelFamily:
    name, _ = split_architecture(architecture)
    for family in FAMILIES:
        if family.architecture == name:
            return family
    known = ", ".join(family.architecture for family in FAMILIES)
    raise ValueError(f"{where}: expected a model of one of {known}, got {name!r}")


def load_generator(source: str, base: str | None = None, resolution: int = 0) -> tuple[ModelBundle, SiDRecipe]:
    """A generator (see ``open_generator``), fp32 on the CPU, and its recipe."""
    generator = open_generator(source, base)
    return load_opened(generator, resolution), generator.recipe


def load_opened(generator: Generator, resolution: int = 0) -> ModelBundle:
    """A generator that was opened, as ``load_generator`` gives it."""
    _family_named(generator.model.architecture, generator.model.name).check_resolution(resolution)
    return generator.load(resolution)


def _metadata(source: str) -> dict[str, str]:
    path = Path(source)
    return read_safetensors_metadata(path) if path.is_file() else {}
