"""Which figures there are, and what each is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from ..evaluation.image_reward import ImageReward
from ..evaluation.inception import Inception
from ..evaluation.openclip import AestheticScore, CosineScore, OpenCLIP

INCEPTION = "inception"


class Scorer(Protocol):
    """One value a picture; higher is better."""

    def values(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor: ...


class Weights:
    """The files of weights that the user named; where there is none, the published ones by their usual word."""

    def __init__(self, files: dict[str, str]):
        self.files = files

    def of(self, name: str, published: str) -> str:
        return self.files.get(name, published)

    def required(self, name: str, where: str) -> str:
        """Of what no library fetches by itself."""
        if name not in self.files:
            raise ValueError(f"{setting(name)}: expected the file of {where}: give it as {setting(name)}=FILE")
        return self.files[name]


def setting(name: str) -> str:
    """What the weights of a network are called on the command line."""
    return f"--weights {name}"


def make_inception(weights: Weights, device: torch.device) -> Inception:
    """What FID, FID-T, precision and recall are taken in."""
    return Inception(weights.of(INCEPTION, ""), setting(INCEPTION), device)


def _clip(weights: Weights, device: torch.device) -> Scorer:
    model, file = _model_and_file(weights.of("clip", "laion2b_s12b_b42k"), "ViT-g-14")
    return CosineScore(OpenCLIP(model, file, setting("clip"), device))


def _hpsv2(weights: Weights, device: torch.device) -> Scorer:
    model, file = _model_and_file(weights.required("hpsv2", "HPSv2, xswu/HPSv2 on the hub"), "ViT-H-14")
    return CosineScore(OpenCLIP(model, file, setting("hpsv2"), device))


def _aesthetic(weights: Weights, device: torch.device) -> Scorer:
    head = weights.required("aesthetic", "LAION's aesthetic predictor, sac+logos+ava1-l14-linearMSE.pth")
    model, file = _model_and_file(weights.of("aesthetic-clip", "openai"), "ViT-L-14-quickgelu")
    return AestheticScore(OpenCLIP(model, file, setting("aesthetic-clip"), device), Path(head))


def _image_reward(weights: Weights, device: torch.device) -> Scorer:
    return ImageReward(weights.of("image-reward", "ImageReward-v1.0"), setting("image-reward"), device)


def _model_and_file(text: str, model: str) -> tuple[str, str]:
    """``MODEL:FILE``, or ``FILE`` for the model that a figure is defined with."""
    named, colon, file = text.partition(":")
    is_drive = len(named) == 1  # of a path on Windows
    return (named, file) if colon and not is_drive else (model, text)


@dataclass(frozen=True)
class Metric:
    """A figure that is the mean of one value a picture.

    title: in tables
    form: of its values
    networks: the names of the weights that it takes
    """

    title: str
    form: str
    networks: tuple[str, ...]
    make: Callable[[Weights, torch.device], Scorer]


SCORES: dict[str, Metric] = {
    "clip": Metric("CLIP score", ".4f", ("clip",), _clip),
    "hpsv2": Metric("HPSv2", ".4f", ("hpsv2",), _hpsv2),
    "image-reward": Metric("ImageReward", ".3f", ("image-reward",), _image_reward),
    "aesthetic": Metric("aesthetic score", ".3f", ("aesthetic", "aesthetic-clip"), _aesthetic),
}
DISTANCES: dict[str, str] = {
    "fid": "FID",
    "fid-t": "FID-T",
    "precision": "precision",
    "recall": "recall",
}
"""Figures of all pictures together, in Inception's features: against real pictures, and of ``fid-t`` the teacher's."""
METRICS = (*DISTANCES, *SCORES)
NETWORKS = (INCEPTION, *(name for metric in SCORES.values() for name in metric.networks))
