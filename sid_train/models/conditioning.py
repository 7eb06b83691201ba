"""What a network is told besides the noisy latent, and who makes it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core.rng import BatchRNG

CHUNK_TOKENS = 75
"""How many tokens of a prompt CLIP's text encoders read at once, between a start and an end token. Longer prompts are
read in chunks of as many."""
MAX_TOKENS = 225
"""After which prompts are cut where nothing else is said: three chunks, the most that kohya's trainers read."""


class Conditioning:
    """Encoded prompts as named tensors, each [B, ...]: ``Conditioning(text=..., pooled=...)``, ``cond.text``.

    A family decides the names. SDXL's: ``text``, hidden states for cross attention, [B, tokens, width]; ``pooled``, one
    vector a prompt, [B, width]; ``time_ids``, original height and width, crop top and left, target height and width,
    [B, 6]. Indexing and concatenation work on the batch. Texts of different numbers of tokens are made ``equally_long``
    where they meet.
    """

    def __init__(self, **tensors: Tensor):
        self.tensors = tensors

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(f"Conditioning: no tensor named {name!r}") from None

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Any) -> Conditioning:
        return self._map(lambda tensor: tensor[index])

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        return self._map(lambda tensor: tensor.to(*args, **kwargs))

    def expand(self, batch: int) -> Conditioning:
        """A single prompt's conditioning for a batch, without a copy."""
        return self._map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def replace(self, **tensors: Tensor) -> Conditioning:
        """The same with other tensors under some of the names."""
        return Conditioning(**self.tensors | tensors)

    def where(self, mask: Tensor, other: Conditioning) -> Conditioning:
        """Rows of ``other`` where ``mask`` [B] is true, ours elsewhere; ``other`` may be a single row."""

        def pick(ours: Tensor, theirs: Tensor) -> Tensor:
            ours, theirs = equally_long([ours, theirs])
            return torch.where(mask.reshape(-1, *[1] * (ours.ndim - 1)), theirs, ours)

        return Conditioning(**{name: pick(tensor, other.tensors[name]) for name, tensor in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        return Conditioning(**{name: join([part.tensors[name] for part in parts]) for name in parts[0].tensors})

    def _map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: change(tensor) for name, tensor in self.tensors.items()})


def join(parts: Sequence[Tensor]) -> Tensor:
    """Rows of one named tensor as a batch; sequences [B, tokens, width] are made ``equally_long``."""
    return torch.cat(equally_long(parts))


def equally_long(parts: Sequence[Tensor]) -> list[Tensor]:
    """``parts`` with each sequence [B, tokens, width] repeated to the least common multiple of their tokens; others as
    they are.

    Keys and values that are all there equally often leave softmax attention as it is, so that no row is told anything
    else than alone. ComfyUI batches prompts in this way too.
    """
    if parts[0].ndim != 3:
        return list(parts)
    tokens = math.lcm(*(part.shape[1] for part in parts))
    return [part if part.shape[1] == tokens else part.repeat(1, tokens // part.shape[1], 1) for part in parts]


@dataclass
class RealBatch:
    """Real latents [B, C, H, W] with the prompts' conditioning that belongs to them."""

    latents: Tensor
    cond: Conditioning


class Conditioner(Protocol):
    """Encodes prompts; ``encode([""])`` is the ``empty`` unconditional embedding.

    max_tokens: after which a prompt is cut, a multiple of ``CHUNK_TOKENS``; ignored where there are no chunks
    """

    max_tokens: int

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """ValueError for a prompt that cannot be encoded."""
        ...

    def chunks(self, prompts: Sequence[str]) -> list[int]:
        """How many chunks each prompt has, uncut; 1 where there are none. No text encoder is loaded for it."""
        ...

    def to(self, device: torch.device) -> Conditioner:
        """Where prompts are encoded from now on."""
        ...

    def unload(self) -> None:
        """Frees what can be loaded again at the next prompt."""
        ...


class PairSource(Protocol):
    """Real image-text pairs, in batches.

    identity: what they are, wherever they are kept: a digest, or a family's word
    """

    identity: str

    def draw(self, batch: int, rng: BatchRNG) -> RealBatch: ...


class LatentCodec(Protocol):
    """Images [B, 3, H, W] in [-1, 1] <-> latents [B, C, h, w] of about unit variance."""

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def to(self, device: torch.device) -> LatentCodec: ...
