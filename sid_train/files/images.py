"""Tensors <-> pictures."""

from __future__ import annotations

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
