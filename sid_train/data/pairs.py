"""Real image-text pairs for the Diffusion-GAN branch."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from ..distiller import RealBatch
from ..models.conditioning import Conditioning
from ..rng import BatchRNG
from .pictures import Pictures, Size, bucket_sizes, cut_out, nearest_bucket, open_pictures
from .table import EncodedRows, LiveRows

if TYPE_CHECKING:
    from ..models.bundle import ModelBundle


class PairSource(Protocol):
    """Real image-text pairs for the Diffusion-GAN branch."""

    def draw(self, batch: int, rng: BatchRNG) -> RealBatch: ...


class RowPicker:
    """Which rows make a batch: all from one group, whose latents have one shape."""

    def __init__(self, groups: Sequence[Hashable]):
        self.groups = groups
        self.members: dict[Hashable, list[int]] = {}
        for row, group in enumerate(groups):
            self.members.setdefault(group, []).append(row)

    def draw(self, batch: int, rng: BatchRNG) -> list[int]:
        """``batch`` rows, uniformly with replacement from the group of a uniformly drawn row."""
        members = self.members[self.groups[rng.integer(len(self.groups))]]
        return [members[i] for i in rng.randint(0, len(members), batch).tolist()]


class PicturePairs:
    """Pictures and captions, encoded when they are drawn, one by one (see ``encode_prompts``).

    Without buckets every picture is cut to the model's own size and gets its time ids, as generated ones do. With
    buckets it is cut to the nearest of SDXL's sizes, and its time ids say what it was and what was cut.
    """

    def __init__(self, pictures: Pictures, bundle: ModelBundle, buckets: bool = False):
        self.pictures, self.codec, self.buckets = pictures, bundle.codec, buckets
        self.sizes = picture_sizes(pictures, bundle, buckets)
        self.picker = RowPicker(self.sizes)
        self.captions: EncodedRows = LiveRows([entry.caption for entry in pictures.entries], bundle.conditioner)

    def encode(self, row: int) -> tuple[Tensor, Conditioning]:
        """Latents [1, C, h, w] of one picture and its own caption's conditioning, a single row; on the CPU."""
        image, time_ids = cut_out(self.pictures.read(row), self.sizes[row])
        with torch.no_grad():
            latents = self.codec.encode(image[None]).cpu()
        cond = self.captions.read([row])
        if self.buckets:
            cond = Conditioning(cond.text, cond.pooled, torch.tensor([time_ids], dtype=cond.time_ids.dtype))
        return latents, cond

    def draw(self, batch: int, rng: BatchRNG) -> RealBatch:
        latents, conds = zip(*map(self.encode, self.picker.draw(batch, rng)), strict=True)
        return RealBatch(torch.cat(latents).to(rng.device), Conditioning.cat(conds).to(rng.device))


def picture_sizes(pictures: Pictures, bundle: ModelBundle, buckets: bool) -> list[Size]:
    """What every picture is cut to. Buckets need each picture's own size: all of them are read once."""
    if not buckets:
        return [bundle.image_size] * len(pictures)
    sizes = bucket_sizes(bundle.image_size, bundle.image_size[0] // bundle.latent_shape[1])
    images = map(pictures.read, range(len(pictures)))
    return [nearest_bucket((image.height, image.width), sizes) for image in images]


def load_pairs(source: str, bundle: ModelBundle, buckets: bool = False, cache: str = "") -> PairSource:
    """The pairs that ``data.pairs`` names, or those that ``cache`` made of them; neither the text encoder nor the
    latent codec of ``bundle`` is then used.
    """
    if source == "demo":
        _refuse_for_demo(buckets, cache)
        from ..demo.digits import DigitPairs

        return DigitPairs(bundle.codec, bundle.conditioner)
    pictures = open_pictures(source)
    if not cache:
        return PicturePairs(pictures, bundle, buckets)
    from .cache import Cache, model_facts, pair_facts

    opened = Cache(Path(cache))
    opened.expect(model_facts(bundle) | pair_facts(pictures, buckets))
    return opened.pairs()


def _refuse_for_demo(buckets: bool, cache: str) -> None:
    if buckets:
        raise ValueError("data.buckets: the demo's pictures are all of one size: set it to false")
    if cache:
        raise ValueError("data.cache: the demo's pictures are made anew at each draw: they cannot be cached")
