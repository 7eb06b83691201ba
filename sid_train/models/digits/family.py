"""The demo's digits as a model family: a model, prompts and pairs that need no download."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...core.recipe import SiDRecipe
from ...files.tensors import DTYPES
from ..bundle import ModelBundle
from ..conditioning import PairSource
from ..family import AUTO, ExportOptions, Generator, ModelFamily
from ..lora import extract_lora, is_kohya, write_lora
from .data import TRAINING_SUBJECTS, DigitPairs
from .layout import ARCHITECTURE, TEACHER_FILE
from .model import DigitsModel, kohya_modules, open_digits


class DigitsFamily(ModelFamily):
    """Files with a UNet and a text encoder; ``demo`` is the embedded teacher."""

    architecture = ARCHITECTURE
    word = "demo"
    export_formats = ("checkpoint", "lora")

    def check_resolution(self, resolution: int) -> None:
        if resolution:
            raise ValueError("model.resolution: the demo's model has its own; leave it at 0")

    def open(self, source: str, prediction_type: str = AUTO) -> DigitsModel:
        model = open_digits(TEACHER_FILE if source == self.word else Path(source))
        if prediction_type not in (AUTO, model.prediction_type):
            raise ValueError(
                f"model.prediction_type: the demo's model predicts {model.prediction_type}, not {prediction_type}"
            )
        return model

    def open_generator(self, path: Path, recipe: SiDRecipe, base: str | None) -> Generator:
        """A LoRA belongs on the embedded teacher where no other base is named."""
        if not is_kohya(path):
            return super().open_generator(path, recipe, base)
        model = self.open(base or self.word)
        recipe = replace(recipe, architecture=self.architecture)
        return Generator(model, recipe, model.tensors, model.read_lora(path), source=path)

    def export(self, generator: Generator, path: Path, options: ExportOptions) -> list[str]:
        if options.format != "lora":
            return super().export(generator, path, options)
        if options.vae:
            raise ValueError("--vae: the format lora holds none")
        if generator.adapter is not None and (options.rank or options.energy):
            raise ValueError("--rank, --energy: only for a LoRA that is extracted from a whole UNet")
        adapter = generator.adapter
        notes: list[str] = []
        if adapter is None:
            base = options.base or self.open(self.word)
            adapter, notes = extract_lora(generator.tensors, base.tensors, options.rank, options.energy)
        write_lora(path, generator, adapter, kohya_modules(generator.tensors), DTYPES[options.dtype])
        return notes

    def prompts(self) -> list[str]:
        return [subject.prompt for subject in TRAINING_SUBJECTS]

    def pairs(self, model: ModelBundle) -> PairSource:
        return DigitPairs(model.codec, model.conditioner)
