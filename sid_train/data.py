"""Where prompts and real pairs come from."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from .distiller import RealBatch
from .models.conditioning import Conditioner, Conditioning


class PairSource(Protocol):
    """Real image-text pairs for the Diffusion-GAN branch."""

    def draw(self, batch: int, rng: torch.Generator) -> RealBatch: ...


def load_prompts(source: str) -> list[str]:
    """The distinct prompts of a text file, one a line, in order. ``demo`` names the demo's own training prompts."""
    if source == "demo":
        from .demo.digits import TRAINING_SUBJECTS

        return [s.prompt for s in TRAINING_SUBJECTS]
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"data.prompts: expected a text file with one prompt a line, or 'demo'; no file {source!r}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"data.prompts: {source}: expected UTF-8 text with one prompt a line") from None
    prompts = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not prompts:
        raise ValueError(f"data.prompts: {source} has no prompt: expected one a line")
    return prompts


class PromptTable:
    """All prompts, encoded once; batches are rows of the table."""

    def __init__(self, prompts: list[str], conditioner: Conditioner, device: torch.device):
        self.prompts = prompts
        self.cond = conditioner.encode(prompts).to(device)

    def draw(self, batch: int, rng: torch.Generator) -> Conditioning:
        """``batch`` prompts, uniformly with replacement."""
        return self.cond[torch.randint(len(self.prompts), (batch,), generator=rng, device=rng.device)]
