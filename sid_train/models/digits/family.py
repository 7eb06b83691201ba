"""The demo's digits as a model family: a model, prompts and pairs that need no download."""

from __future__ import annotations

from pathlib import Path

from ..bundle import ModelBundle
from ..conditioning import PairSource
from ..family import AUTO, ModelFamily
from .data import TRAINING_SUBJECTS, DigitPairs
from .model import ARCHITECTURE, TEACHER_FILE, DigitsModel, open_digits


class DigitsFamily(ModelFamily):
    """Files with a UNet and a text encoder; ``demo`` is the embedded teacher."""

    architecture = ARCHITECTURE
    word = "demo"

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

    def prompts(self) -> list[str]:
        return [subject.prompt for subject in TRAINING_SUBJECTS]

    def pairs(self, model: ModelBundle) -> PairSource:
        return DigitPairs(model.codec, model.conditioner)
