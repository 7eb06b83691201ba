"""The demo's figures: what FID, CLIP score, precision and recall are for SDXL, at the size of a digit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..evaluation.distances import diagonal_energy, frechet_distance, precision_recall
from ..models.digits.data import RealDigits, Subject
from ..models.digits.layout import ASSETS
from .classifier import DigitClassifier

CLASSIFIER_FILE = ASSETS / "classifier.safetensors"
REFERENCE_SEED = 1


@dataclass
class Row:
    """The figures of one set of images.

    name: real_floor, teacher_many_step, undistilled or sid
    steps: network evaluations in time; 0 for real images
    guidance_scale: classifier-free guidance at sampling time; 1 is none
    frechet, frechet_pixel: Frechet distance to the reference digits in the classifier's features and in pixels
    prompt_accuracy: share of images in which the classifier sees the digit and both colours that were asked for
    precision, recall: k-nearest-neighbour precision and recall in the classifier's features
    high_frequency: 2x2 diagonal-difference energy over the reference digits'
    """

    name: str
    steps: int
    guidance_scale: float
    images: int
    frechet: float
    frechet_pixel: float
    prompt_accuracy: float
    precision: float
    recall: float
    high_frequency: float

    def to_dict(self) -> dict:
        return asdict(self)


class DigitEvaluator:
    """Measures images of given subjects against reference digits that trained nothing."""

    def __init__(self, subjects: Sequence[Subject]):
        self.subjects = list(subjects)
        self.classifier = DigitClassifier()
        self.classifier.load_state_dict(load_file(CLASSIFIER_FILE))
        self.classifier.eval()
        self.reference = RealDigits("reference").draw(self.subjects, torch.Generator().manual_seed(REFERENCE_SEED))
        self.reference_features = self._features(self.reference)
        self.reference_energy = diagonal_energy(self.reference)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier.features(part) for part in images.split(512)])

    @torch.no_grad()
    def _accuracy(self, images: Tensor) -> float:
        said = [torch.cat(parts) for parts in zip(*map(self.classifier, images.split(512)), strict=True)]
        asked = torch.tensor([(s.digit, s.colour, s.ground) for s in self.subjects])
        right = torch.stack([logits.argmax(1) for logits in said], dim=1) == asked
        return float(right.all(dim=1).double().mean())

    def frechet(self, images: Tensor) -> float:
        return frechet_distance(self._features(images), self.reference_features)

    def row(self, name: str, images: Tensor, steps: int, guidance_scale: float = 1.0) -> Row:
        """The figures of ``images`` [N, 3, 16, 16] in [-1, 1], one for each subject, in order."""
        images = images.clamp(-1, 1)
        features = self._features(images)
        precision, recall = precision_recall(self.reference_features, features)
        return Row(
            name=name,
            steps=steps,
            guidance_scale=guidance_scale,
            images=len(images),
            frechet=frechet_distance(features, self.reference_features),
            frechet_pixel=frechet_distance(images.flatten(1), self.reference.flatten(1)),
            prompt_accuracy=self._accuracy(images),
            precision=precision,
            recall=recall,
            high_frequency=diagonal_energy(images) / self.reference_energy,
        )
