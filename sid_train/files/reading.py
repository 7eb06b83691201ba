"""Reading what strangers made: regular files within a bound, and one error that names the file whatever goes wrong."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEXT_LIMIT = 1 << 30
"""Bytes of a text file: ten million prompts."""
SMALL_LIMIT = 16 << 20
"""Bytes of a configuration, an index or a caption."""
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""Of what ``torch.save`` and ``pickle`` write."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def shown(text: object, limit: int = 300) -> str:
    """``text`` from a stranger's file in one line: what cannot be printed is escaped, what is too long is cut."""
    whole = str(text)
    cut = whole if len(whole) <= limit else f"{whole[:limit]} ... ({len(whole):,} characters)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def half_character(text: str) -> int:
    """Where ``text`` has half a surrogate pair, as of an emoji that was cut in two or of bytes that are no UTF-8, which
    no file and no tokenizer takes; -1 where it has none.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return -1


@contextmanager
def reading(path: str | Path, expected: str) -> Iterator[None]:
    """Around all code that reads one file: whatever is raised inside leaves as a ValueError that names the file, once,
    or as the OSError or ValueError it was if that names the file already.

    expected: what the file should be, with an article
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError | OSError) and any(str(p) in str(error) for p in (path, shown(path))):
            raise
        reason = str(error) or type(error).__name__
        if isinstance(error, RecursionError):
            reason = "it is nested too deeply"
        elif isinstance(error, MemoryError):
            reason = "it needs more memory than there is"
        raise ValueError(f"{shown(path)}: expected {expected}, but it cannot be read: {shown(reason)}") from error


def other_kind(first: bytes) -> str:
    """What came instead of a file that was to be downloaded, told by its first 50 bytes; "" for none of those."""
    if first.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, and the file itself was not downloaded (git lfs pull)"
    if first.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "it is a web page: the download went wrong; download it again"
    if first.startswith(PICKLE_STARTS):
        return "it is a pickle or an archive (.pkl, .ckpt, .pt, .zip): python -m sid_train convert reads a UNet in it"
    return ""


def require_file(path: str | Path, limit: int | None = None) -> int:
    """The size in bytes of a regular file; what a link leads to counts. ValueError for a pipe or a device, which may
    never end, and for more than ``limit`` bytes; OSError where there is none.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"{shown(path)}: expected a regular file, got {kind}")
    if limit is not None and status.st_size > limit:
        raise ValueError(f"{shown(path)}: expected at most {limit:,} bytes, got {status.st_size:,}")
    return status.st_size


def read_bytes(path: str | Path, limit: int = SMALL_LIMIT) -> bytes:
    """All of a regular file of at most ``limit`` bytes."""
    require_file(path, limit)
    with open(path, "rb") as file:
        return file.read(limit)


def read_text(path: str | Path, limit: int = TEXT_LIMIT) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    data = read_bytes(path, limit)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(path)}: expected UTF-8 text, but byte {error.start:,} is none: convert the file"
        ) from None


def read_json(path: str | Path, limit: int = SMALL_LIMIT) -> Any:
    """What a JSON file holds."""
    with reading(path, "JSON"):
        return json.loads(read_text(path, limit))
