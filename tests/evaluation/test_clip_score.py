"""CLIP score with a small random CLIP, held against transformers' own logits."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from sid_train.evaluation.clip_score import CLIPScorer

PROMPTS = ["a lighthouse at dawn", "a cat in a hat", "word " * 100]


def test_score_is_the_mean_of_transformers_similarities(clip_folder):
    images = torch.rand(3, 3, 48, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = [Image.fromarray(((i + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for i in images]
    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(text=PROMPTS, images=pictures, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        expected = (model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()).mean()
    assert CLIPScorer(clip_folder).score(images, PROMPTS) == pytest.approx(float(expected), abs=1e-4)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"training\.clip_model: expected a CLIP model's folder or hub id, got"):
        CLIPScorer(str(tmp_path / "nothing"))
