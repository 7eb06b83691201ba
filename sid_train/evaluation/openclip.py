"""Figures from models in OpenCLIP's form: CLIP score, HPSv2 and the aesthetic score. Each is one value a picture."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..files.reading import shown


class OpenCLIP:
    """A picture and text encoder of OpenCLIP.

    model: OpenCLIP's name of it, such as ViT-g-14
    weights: a file, or OpenCLIP's word for published ones, which it takes from its cache or downloads
    setting: what an error calls the choice of weights
    """

    def __init__(self, model: str, weights: str, setting: str, device: torch.device):
        try:
            import open_clip
        except ImportError:
            raise ValueError(f"{setting}: needs OpenCLIP: pip install open-clip-torch") from None
        try:
            source = _unwrapped(weights) if Path(weights).is_file() else weights
            with warnings.catch_warnings():
                # Weights for another activation than the model has: its figures would be wrong.
                warnings.filterwarnings("error", message="QuickGELU mismatch")
                network, _, self.preprocess = open_clip.create_model_and_transforms(
                    model, pretrained=source if isinstance(source, str) else None, load_weights=isinstance(source, str)
                )
            if not isinstance(source, str):
                network.load_state_dict(source)
            self.tokenizer = open_clip.get_tokenizer(model)
        except (OSError, RuntimeError, ValueError, KeyError, UserWarning) as error:
            raise ValueError(
                f"{setting}: the weights {shown(weights)} of {shown(model)} cannot be had: "
                f"{shown(str(error).splitlines()[0])}: give their file as {setting}=FILE"
            ) from None
        self.network: Any = network.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Unit vectors of pictures: fp32, [N, D], on the CPU."""
        pixels = torch.stack([self.preprocess(picture) for picture in pictures]).to(self.device)
        return F.normalize(self.network.encode_image(pixels).float(), dim=1).cpu()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors of prompts, which are cut at the model's context: fp32, [N, D], on the CPU."""
        tokens = self.tokenizer(list(prompts)).to(self.device)
        return F.normalize(self.network.encode_text(tokens).float(), dim=1).cpu()


def _unwrapped(weights: str) -> str | dict[str, Tensor]:
    """A file that OpenCLIP reads by itself, or the tensors in HPSv2's, which are under ``state_dict``."""
    if weights.endswith(".safetensors"):
        return weights
    content = torch.load(weights, map_location="cpu", weights_only=True)
    return content.get("state_dict", weights)


class CosineScore:
    """Cosine similarity of a picture and its prompt: CLIP score (arXiv 2104.08718, without its factor), and with its
    own weights HPSv2 (arXiv 2306.09341).
    """

    def __init__(self, model: OpenCLIP):
        self.model = model

    def values(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """[N], -1 to 1."""
        return (self.model.pictures(pictures) * self.model.texts(prompts)).sum(1)


class AestheticScore:
    """LAION's aesthetic predictor: a few linear layers on CLIP's picture vector, without anything between them
    (christophschuhmann/improved-aesthetic-predictor). About 1 to 10; prompts do not matter.
    """

    def __init__(self, model: OpenCLIP, head: Path):
        self.model = model
        state = torch.load(head, map_location="cpu", weights_only=True)
        layers = sorted({name.rpartition(".")[0] for name in state}, key=lambda name: int(name.rpartition(".")[2]))
        self.layers = [(state[f"{name}.weight"].float(), state[f"{name}.bias"].float()) for name in layers]

    def values(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """[N]."""
        x = self.model.pictures(pictures)
        for weight, bias in self.layers:
            x = F.linear(x, weight, bias)
        return x[:, 0]
