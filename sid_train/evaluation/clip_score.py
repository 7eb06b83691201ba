"""CLIP score: how well pictures show what their prompts say. It decides which of a run's snapshots is the best."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor

from ..files.images import to_pil
from .metric import CLIP_SCORE


class CLIPScorer:
    """Mean cosine similarity of a CLIP model's picture and text embeddings (arXiv 2104.08718, without its factor).

    source: a folder in transformers' format, or a hub id such as ``openai/clip-vit-large-patch14``
    """

    name = CLIP_SCORE

    def __init__(self, source: str):
        try:
            self.model = CLIPModel.from_pretrained(source).eval().requires_grad_(False)
            self.processor = CLIPProcessor.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"training.clip_model: expected a CLIP model's folder or hub id, got {source!r}: "
                f"{str(error).splitlines()[0]}"
            ) from None

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str]) -> float:
        """Of images [N, 3, H, W] in [-1, 1], one for each prompt: -1 to 1. On the CPU, one picture at a time."""
        total = 0.0
        for image, prompt in zip(images, prompts, strict=True):
            inputs = self.processor(text=[prompt], images=to_pil(image), return_tensors="pt", truncation=True)
            found = self.model(**inputs)
            total += float((found.image_embeds * found.text_embeds).sum())
        return total / len(prompts)
