"""From the bytes of a picture to its pixels in RGB."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from ..files.reading import other_kind

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "AVIF")
"""Pillow's names of what is read. It knows more, and runs Ghostscript for one of them."""
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".jfif", ".jpe", ".bmp", ".tif", ".tiff", ".gif")
UNREAD_SUFFIXES = (".heic", ".heif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".ico", ".tga", ".exr", ".hdr", ".raw")
UNREAD_SUFFIXES += (".dng", ".cr2", ".cr3", ".nef", ".arw", ".qoi", ".ppm", ".pgm", ".eps", ".xcf")
if "avif" in features.modules and features.check_module("avif"):  # since Pillow 11.3
    SUFFIXES += (".avif",)
else:
    UNREAD_SUFFIXES += (".avif",)
PIXEL_LIMIT = 1 << 26
"""Pixels of a picture, 67 megapixels, more than a 35 mm camera has: 1 GB while a WebP is decoded. A file of some
kilobytes can claim any number."""
PICTURE_LIMIT = 1 << 28
"""Bytes of a picture's file."""
GROUND = "white"
"""What shows through transparent pixels."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_picture(data: bytes) -> Image.Image:
    """The picture in RGB: the first one of several, turned as its EXIF orientation says, on a white ground where it is
    transparent. ValueError, or one of Pillow's many errors, where it cannot be read or has too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        kind = other_kind(data[:50]) or f"it is none of {', '.join(FORMATS)}, or damaged at its start"
        raise ValueError(kind) from None
    if image.width * image.height > PIXEL_LIMIT:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {PIXEL_LIMIT:,}: make it smaller")
    image.load()
    turn = _TURNS.get(_orientation(image))
    image = _on_ground(_eight_bits(image))
    return image if turn is None else image.transpose(turn)


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    """What EXIF says of it, 1 where that cannot be read. No other value is looked at: cameras write bad ones."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow's parser raises a dozen kinds
        return 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits in 8: Pillow would cut off what is above 255, which leaves white."""
    if image.mode in ("I", "F") and image.format != "PNG":  # older Pillows call PNG's 16 bits so
        raise ValueError("its pixels have 32 bits, whose white is unknown: save it with 8 or 16")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.uint16)
    if isinstance(transparent := image.info.get("transparency"), int):
        values[values == transparent] = 65535  # as _on_ground would
    return Image.fromarray((values // 257 + (values % 257 > 128)).astype(np.uint8))


def _on_ground(image: Image.Image) -> Image.Image:
    """In RGB. The colours of transparent pixels are whatever an editor left there: nobody saw them."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGB", image.size, GROUND)
    layer = image if image.mode == "RGBA" else image.convert("RGBA")
    ground.paste(layer, mask=layer.getchannel("A"))
    return ground
