"""Tensors <-> pictures."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from einops import rearrange
from PIL import Image
from torch import Tensor


def image_grid(images: Tensor, columns: int) -> Tensor:
    """Images [N, 3, H, W], N a multiple of ``columns``, side by side: [3, rows * H, columns * W]."""
    return rearrange(images, "(r c) k h w -> k (r h) (c w)", c=columns)


def to_pil(image: Tensor) -> Image.Image:
    """An image [3, H, W] in [-1, 1], clamped, as 8-bit RGB."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(rearrange(pixels, "k h w -> h w k").contiguous().cpu().numpy())


THUMBNAIL_SIZE = 256
"""Pixels: what https://github.com/Stability-AI/ModelSpec recommends."""
THUMBNAIL_LIMIT = 30_000
"""Characters of the URL: little beside SDXL's header, and less than any reader of headers minds."""


def thumbnail(grid: Path, columns: int) -> str:
    """The first two by two pictures of an image file of square pictures in ``columns``, as a data: URL of a JPEG of at
    most 256x256. OSError where it is no image.
    """
    try:
        with Image.open(grid) as image:
            side = 2 * (image.width // columns)
            picture = image.convert("RGB").crop((0, 0, side, side))
    except Image.DecompressionBombError as error:  # a grid of huge pictures
        raise OSError(str(error)) from None
    picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    for quality in (85, 60, 35, 10):  # noise, which compresses worst, fits at the last
        file = io.BytesIO()
        picture.save(file, format="JPEG", quality=quality)
        url = f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
        if len(url) <= THUMBNAIL_LIMIT:
            break
    return url
