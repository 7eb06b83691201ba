"""Real image-text pairs for the Diffusion-GAN branch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..core.rng import BatchRNG
from ..models.bundle import ModelBundle
from ..models.conditioning import Conditioning, PairSource, RealBatch
from ..models.families import shipped_by
from .cache import Cache, model_facts, pair_facts, pairs_digest
from .lengths import Lengths, measure, report_long
from .picker import RowPicker
from .pictures import Pictures, Size, bucket_sizes, cut_out, nearest_bucket, open_pictures
from .rows import EncodedRows, LiveRows


class PicturePairs:
    """Pictures and captions, encoded when they are drawn, one by one (see ``encode_prompts``).

    Without buckets every picture is cut to the model's own size and gets its time ids, as generated ones do. With
    buckets it is cut to the nearest of SDXL's sizes, and its time ids say what it was and what was cut.
    """

    def __init__(self, pictures: Pictures, bundle: ModelBundle, buckets: bool = False):
        self.pictures, self.codec, self.buckets = pictures, bundle.codec, buckets
        self.sizes = picture_sizes(pictures, bundle, buckets)
        self.identity = pairs_digest(pictures)
        self.picker = RowPicker(self.sizes)
        self.captions: EncodedRows = LiveRows([entry.caption for entry in pictures.entries], bundle.conditioner)

    def encode(self, row: int) -> tuple[Tensor, Conditioning]:
        """Latents [1, C, h, w] of one picture and its own caption's conditioning, a single row; on the CPU."""
        image, time_ids = cut_out(self.pictures.read(row), self.sizes[row])
        with torch.no_grad():
            latents = self.codec.encode(image[None]).cpu()
        if not latents.isfinite().all():
            raise ValueError(
                f"{self.pictures.entries[row].name}: its latents are not finite: the VAE is damaged: get the teacher's "
                "file anew"
            )
        cond = self.captions.read([row])
        if self.buckets and "time_ids" in cond.tensors:  # SD 1.x and 2.x are told no sizes
            cond = cond.replace(time_ids=torch.tensor([time_ids], dtype=cond.time_ids.dtype))
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


def caption_lengths(bundle: ModelBundle, pictures: Pictures) -> Lengths:
    return measure(bundle.conditioner, [entry.caption for entry in pictures.entries])


def load_pairs(
    source: str, bundle: ModelBundle, buckets: bool = False, cache: str = "", report: bool = False
) -> PairSource:
    """The pairs that ``data.pairs`` names, or those that ``cache`` made of them; neither the text encoder nor the
    latent codec of ``bundle`` is then used. ``report`` prints their number, what is not used, and how many captions are
    long.
    """
    if (family := shipped_by(source)) is not None:
        if buckets:
            raise ValueError("data.buckets: the demo's pictures are all of one size: set it to false")
        if cache:
            raise ValueError("data.cache: the demo's pictures are made anew at each draw: they cannot be cached")
        return family.pairs(bundle)
    pictures = open_pictures(source, report)
    lengths = caption_lengths(bundle, pictures)
    if report:
        report_long(lengths, f"{source}, captions")
    if not cache:
        return PicturePairs(pictures, bundle, buckets)
    opened = Cache(Path(cache))
    opened.expect(model_facts(bundle) | pair_facts(pictures, buckets, lengths))
    return opened.pairs()
