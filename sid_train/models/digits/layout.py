"""What the demo's model is beside its UNet: its files, its words, and what its latents mean. All of it without
diffusers, so that ComfyUI has it too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import Embedding

from ...core.architectures import DIGITS as DIGITS_ARCHITECTURE
from ..conditioning import Conditioning
from .data import COLOURS, DIGITS, GROUNDS, IMAGE_SIZE

ASSETS = Path(__file__).parent / "assets"
TEACHER_FILE = ASSETS / "teacher.safetensors"
TEXT = "text_encoder."  # before the conditioner's tensors in a file
PREDICTION_TYPE = "prediction_type"
"""Of a teacher, in its file's header; a generator's recipe says its own."""
ARCHITECTURE = DIGITS_ARCHITECTURE.name
LATENT_SHAPE = (12, IMAGE_SIZE // 2, IMAGE_SIZE // 2)
WIDTHS = (64, 96)  # of the UNet's two levels
GROUPS = 16  # of its normalisations
MAX_TOKENS = 8
TEXT_WIDTH = 64
TIME_ID_WIDTH = 8  # SDXL has 256
VOCABULARY = ("<pad>", "a", "on", "ground", *DIGITS, *COLOURS, *GROUNDS)


def time_ids() -> Tensor:
    """What SDXL is told of a picture's size, of the only one that there is here: [6]."""
    size = float(IMAGE_SIZE)
    return torch.tensor([size, size, 0.0, 0.0, size, size])


class DigitConditioner(nn.Module):
    """Words and positions as fixed random vectors: enough text encoder for a vocabulary of two dozen words."""

    max_tokens = MAX_TOKENS  # more are refused, not cut

    def __init__(self) -> None:
        super().__init__()
        self.words = Embedding(len(VOCABULARY), TEXT_WIDTH)
        self.positions = Embedding(MAX_TOKENS, TEXT_WIDTH)
        self.requires_grad_(False)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        text = self.embed(torch.tensor([self.tokenize(p) for p in prompts], device=self.words.weight.device))
        ids = time_ids().to(text.device).repeat(len(prompts), 1)
        return Conditioning(text=text, pooled=self.pool(text), time_ids=ids)

    def embed(self, tokens: Tensor) -> Tensor:
        """Hidden states [B, 8, 64] of tokens [B, 8]."""
        return self.words(tokens) + self.positions.weight

    @staticmethod
    def pool(text: Tensor) -> Tensor:
        """One vector a prompt, [B, 64]."""
        return text.mean(dim=1) * MAX_TOKENS**0.5

    def chunks(self, prompts: Sequence[str]) -> list[int]:
        return [1] * len(prompts)

    def unload(self) -> None:
        """There is nothing to be had back."""

    @staticmethod
    def tokenize(prompt: str) -> list[int]:
        """Eight tokens; ValueError for more words, or unknown ones."""
        words = prompt.lower().split()
        unknown = [w for w in words if w not in VOCABULARY[1:]]
        if unknown or len(words) > MAX_TOKENS:
            raise ValueError(
                f"prompt {prompt!r}: the demo model reads at most {MAX_TOKENS} words such as "
                f"'a red three on a blue ground'"
                + (f" and does not know {', '.join(map(repr, unknown))}" if unknown else "")
                + f". It knows: {', '.join(VOCABULARY[1:])}."
            )
        return [VOCABULARY.index(w) for w in words] + [0] * (MAX_TOKENS - len(words))


class DigitCodec:
    """16x16 RGB images <-> 12x8x8 latents: an orthonormal Haar transform, its bands brought to about unit variance.

    SDXL's VAE does the same for its latents with one factor, 0.13025. The factors are one over the standard deviations
    of 3,000 real images (1.0, 0.21, 0.17), halved for the diagonal band (0.053), which is nearly empty.
    """

    MEAN = -0.5  # of the low-pass band
    SCALE = (1.0, 5.0, 5.0, 10.0)
    HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, 3, 16, 16] in [-1, 1] -> latents [B, 12, 8, 8]."""
        haar, scale = self._bands(images)
        pixels = rearrange(images, "b c (h p) (w q) -> b c (p q) h w", p=2, q=2)
        bands = torch.einsum("kp,bcphw->bckhw", haar, pixels)
        bands[:, :, 0] -= self.MEAN
        return rearrange(bands * scale, "b c k h w -> b (c k) h w")

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, 12, 8, 8] -> images [B, 3, 16, 16], not clamped."""
        haar, scale = self._bands(latents)
        bands = rearrange(latents, "b (c k) h w -> b c k h w", k=4) / scale
        bands[:, :, 0] += self.MEAN
        pixels = torch.einsum("kp,bckhw->bcphw", haar, bands)
        return rearrange(pixels, "b c (p q) h w -> b c (h p) (w q)", p=2, q=2)

    def to(self, device: torch.device) -> DigitCodec:
        """It works wherever its input is."""
        return self

    def _bands(self, like: Tensor) -> tuple[Tensor, Tensor]:
        haar = torch.tensor(self.HAAR, dtype=like.dtype, device=like.device) / 2
        return haar, torch.tensor(self.SCALE, dtype=like.dtype, device=like.device)[:, None, None]
