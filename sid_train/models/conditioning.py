"""What a network is told besides the noisy latent, and who makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts in SDXL's form. Indexing and concatenation work on the batch.

    text: hidden states for cross attention, [B, tokens, width]
    pooled: one vector a prompt, [B, pooled width]
    time_ids: original height, width, crop top, left, target height, width, [B, 6]
    """

    text: Tensor
    pooled: Tensor
    time_ids: Tensor

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index) -> Conditioning:
        return Conditioning(self.text[index], self.pooled[index], self.time_ids[index])

    def to(self, *args, **kwargs) -> Conditioning:
        return Conditioning(*(t.to(*args, **kwargs) for t in (self.text, self.pooled, self.time_ids)))

    def expand(self, batch: int) -> Conditioning:
        """A single prompt's conditioning for a batch, without a copy."""
        return Conditioning(*(t.expand(batch, *t.shape[1:]) for t in (self.text, self.pooled, self.time_ids)))

    def where(self, mask: Tensor, other: Conditioning) -> Conditioning:
        """Rows of ``other`` where ``mask`` [B] is true, ours elsewhere; ``other`` may be a single row."""

        def pick(ours: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(mask.reshape(-1, *[1] * (ours.ndim - 1)), theirs, ours)

        return Conditioning(
            pick(self.text, other.text), pick(self.pooled, other.pooled), pick(self.time_ids, other.time_ids)
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning(
            torch.cat([p.text for p in parts]),
            torch.cat([p.pooled for p in parts]),
            torch.cat([p.time_ids for p in parts]),
        )


class Conditioner(Protocol):
    """Encodes prompts; ``encode([""])`` is the ``empty`` unconditional embedding."""

    def encode(self, prompts: Sequence[str]) -> Conditioning: ...

    def to(self, device: torch.device) -> Conditioner:
        """Where prompts are encoded from now on."""
        ...

    def unload(self) -> None:
        """Frees what can be loaded again at the next prompt."""
        ...


class LatentCodec(Protocol):
    """Images [B, 3, H, W] in [-1, 1] <-> latents [B, C, h, w] of about unit variance."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def to(self, device: torch.device) -> LatentCodec: ...
