"""Mutations of bytes: of any file, of archives, and of pictures."""

from __future__ import annotations

import random
import re
import struct
import zlib

from hostile import OTHER_KINDS


def raw(rng: random.Random, data: bytes) -> bytes:
    """Of any file: bits, lengths, chunks, and integers at their extremes."""
    if not data or rng.random() < 0.03:
        return rng.choice(OTHER_KINDS)
    at = rng.randrange(min(len(data), 400) if rng.random() < 0.5 else len(data))
    length = min(rng.choice((1, 2, 4, 16, 100, 1000)), len(data) - at)
    kind = rng.randrange(8)
    if kind == 0:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 2, 8))):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return bytes(changed)
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + data[at + length :]
    if kind == 3:
        return data[:at] + data[at : at + length] * rng.choice((2, 3, 200)) + data[at + length :]
    if kind == 4:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if kind == 5:
        width = rng.choice((1, 2, 4, 8))
        value = rng.choice((0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1))
        return data[:at] + value.to_bytes(width, rng.choice(("little", "big"))) + data[at + width :]
    if kind == 6:
        return data[:at] + bytes(length) + data[at + length :]
    other = rng.randrange(len(data))
    return data[:at] + data[other : other + length] + data[at:]


def of_tar(rng: random.Random, data: bytes) -> bytes:
    """A field of a member's header, with the checksum made right; or a sparse or extended header's text."""
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return raw(rng, data)
    at = rng.choice(starts)
    header = bytearray(data[at : at + 512])
    start, length = rng.choice(((0, 100), (124, 12), (124, 12), (156, 1), (157, 100), (345, 155), (386, 24), (483, 12)))
    texts = (b"", b"\xff" * length, b"7" * length, b"\x80" + b"\xff" * 11, b"\x80" + (3 << 30).to_bytes(11, "big"))
    names = (b"../x.jpg", b"/etc/a.jpg", b"a.b.c.jpg", b".jpg", b"a.JPG", b"a\x1b.txt", b"\xff\xfe.png", b"x/./y.png")
    types = (b"S", b"x", b"g", b"L", b"K", b"1", b"2", b"3", b"6", b"7", b"\0", b"5")
    values = {100: names, 1: types}.get(length, texts)
    header[start : start + length] = rng.choice(values)[:length].ljust(length, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[:at] + bytes(header) + data[at + 512 :]


def of_picture(rng: random.Random, data: bytes) -> bytes:
    """PNG's sizes and chunks with right checksums, JPEG's segments, WebP's lengths."""
    if data.startswith(b"\x89PNG"):
        at = rng.choice([m.start() for m in re.finditer(rb"IHDR|IDAT|IEND|tEXt|PLTE", data)] or [12])
        (length,) = struct.unpack(">I", data[at - 4 : at])
        body = bytearray(data[at + 4 : at + 4 + length])
        if data[at : at + 4] == b"IHDR" and len(body) >= 13:
            where = rng.choice((0, 4))
            body[where : where + 4] = struct.pack(">I", rng.choice((0, 1, 30_000, 65_535, 2**31 - 1, 2**32 - 1)))
            body[8:10] = bytes((rng.choice((1, 8, 16, 3)), rng.choice((0, 2, 3, 4, 6, 7))))
        made = data[at : at + 4] + bytes(body)
        extra = rng.choice(
            (b"", b"zTXta\0\0" + zlib.compress(bytes(1 << 20)), b"iCCPa\0\0" + zlib.compress(bytes(9999)))
        )
        more = struct.pack(">I", len(extra) - 4) + extra + struct.pack(">I", zlib.crc32(extra)) if extra else b""
        checked = made + struct.pack(">I", zlib.crc32(made))
        return data[: at - 4] + struct.pack(">I", len(body)) + checked + more + data[at + 8 + length :]
    if data.startswith(b"\xff\xd8"):
        found = [m.start() for m in re.finditer(rb"\xff[\xc0-\xef]", data)]
        at = rng.choice(found) + 2
        value = rng.choice((0, 1, 2, 0xFFFF, 0x7FFF))
        at += rng.choice((0, 0, 3, 5))
        return data[:at] + struct.pack(">H", value) + data[at + 2 :]
    if data.startswith(b"RIFF"):
        at = rng.choice((4, 16, 24, 26))
        return data[:at] + struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1, 0x3FFF))) + data[at + 4 :]
    return raw(rng, data)
