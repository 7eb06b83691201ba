"""From a picture's bytes to RGB: formats, 16 bits, transparency, orientation and bounds."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from sid_train.data import decode
from sid_train.data.decode import decode_picture
from sid_train.data.entries import Entry
from sid_train.data.pictures import Pictures, cut_out


def stored(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [f for f in decode.FORMATS if f != "AVIF" or ".avif" in decode.SUFFIXES])
def test_every_format_is_read(kind):
    assert decode_picture(stored(Image.new("RGB", (16, 8), "white"), kind)).getpixel((3, 3)) == (255, 255, 255)


def test_no_other_format_is_tried():
    """Pillow hands this one to Ghostscript, whatever the file is called."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    for data in (postscript, stored(Image.new("RGB", (8, 8)), "PPM"), b"", b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(ValueError, match="none of JPEG, PNG"):
            decode_picture(data)
    with pytest.raises(ValueError, match="git lfs pull"):
        decode_picture(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_shades(kind):
    values = np.array([[0, 128, 129, 0x4000, 0x8000, 0xFEFF, 0xFFFF]], dtype=np.uint16)
    shades = np.asarray(decode_picture(stored(Image.fromarray(values), kind)))[0, :, 0]
    assert shades.tolist() == np.rint(values[0] / 257).astype(int).tolist() == [0, 0, 1, 64, 128, 254, 255]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_have_no_white(dtype):
    with pytest.raises(ValueError, match="32 bits"):
        decode_picture(stored(Image.fromarray(np.zeros((4, 4), dtype)), "TIFF"))


def transparent(mode: str) -> bytes:
    """Three pixels: opaque red, half of it, and red that nobody sees."""
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 128))
    image.putpixel((2, 0), (255, 0, 0, 0))
    return stored(image, "WEBP", lossless=True, exact=True) if mode == "WEBP" else stored(image.convert(mode))


def test_transparent_pixels_show_white():
    white, red, rose = (255, 255, 255), (255, 0, 0), (255, 127, 127)
    for mode in ("RGBA", "WEBP"):
        picture = decode_picture(transparent(mode))
        assert [picture.getpixel((x, 0)) for x in range(3)] == [red, rose, white]
    grey = decode_picture(transparent("LA"))
    assert [grey.getpixel((x, 0)) for x in (0, 2)] == [(76, 76, 76), white]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    for options in ({"transparency": 1}, {"transparency": b"\xff\x00"}):
        picture = decode_picture(stored(palette, **options))
        assert [picture.getpixel((x, 0)) for x in range(2)] == [red, white]
    for image, key in [(Image.new("RGB", (1, 1), (1, 2, 3)), (1, 2, 3)), (Image.new("L", (1, 1), 7), 7)]:
        assert decode_picture(stored(image, transparency=key)).getpixel((0, 0)) == white
    assert decode_picture(stored(Image.new("I;16", (1, 1), 9), transparency=9)).getpixel((0, 0)) == white


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_alone_is_taken_of_exif(orientation, kind):
    upright = Image.new("L", (32, 16), 0)
    upright.paste(255, (0, 0, 16, 8))  # the upper left corner
    back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    as_stored = (
        upright.transpose(back.get(orientation) or decode._TURNS.get(orientation)) if orientation > 1 else upright
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = decode_picture(stored(as_stored.convert("RGB"), kind, exif=exif))
    assert picture.size == (32, 16)
    assert picture.getpixel((6, 3))[0] > 200
    assert max(picture.getpixel(at)[0] for at in ((25, 3), (6, 12), (25, 12))) < 50


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_exif_does_not_stop():
    """A valid orientation, and a rational number that is cut off."""
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack("<HHII", 0x011A, 5, 1, 0xFFFFFF00)
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + entries + b"\0\0\0\0"
    assert decode_picture(stored(Image.new("RGB", (32, 16)), "JPEG", exif=exif)).size == (16, 32)
    assert decode_picture(stored(Image.new("RGB", (32, 16)), "JPEG", exif=b"Exif\0\0nonsense")).size == (32, 16)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.filterwarnings("ignore:Image size")
def test_a_picture_that_claims_too_many_pixels_is_refused_before_it_is_decoded(tmp_path):
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    bomb = PngImagePlugin._MAGIC + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(bomb)
    pictures = Pictures([Entry("a.png", "a cat", len(bomb), tmp_path / "a.png")])
    with pytest.raises(ValueError, match=r"a\.png: .*12000 x 12000 pixels, more than 67,108,864"):
        pictures.read(0)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1)])
def test_a_strip_is_cut_before_it_is_resized(size):
    """Resized whole to cover 1024 x 1024, it would have 31 thousand million pixels."""
    pixels, time_ids = cut_out(Image.new("RGB", size, (255, 0, 0)), (1024, 1024))
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, -1.0])[:, None, None].expand(3, 1024, 1024))
    assert time_ids[:2] == [size[1], size[0]]
    assert max(time_ids[2:4]) == (30_000 * 1024 - 1024) // 2


def test_the_cut_is_that_of_the_whole_picture_resized():
    values = torch.rand(3, 12, 18, generator=torch.Generator().manual_seed(0)) * 255
    image = Image.fromarray(values.byte().permute(1, 2, 0).numpy()).resize((270, 180), Image.Resampling.BICUBIC)
    whole = np.asarray(image.resize((96, 64), Image.Resampling.LANCZOS))[:, 16:80].astype(int)
    cut = ((cut_out(image, (64, 64))[0] + 1) * 127.5).round().int().permute(1, 2, 0).numpy()
    assert abs(cut - whole).max() <= 1
