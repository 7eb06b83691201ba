"""A reader that ``fuzz.py`` feeds, and how its seeds are made.

It is called as a command calls it; what it returns is thrown away.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutate import Input, Padded


@dataclass
class Reader:
    """seeds: inputs that it accepts; target: the file in an input that it is given, "" for the folder itself; share: of
    all inputs; names: what else than the target's name tells the user which input it was; same: what it returns must be
    what the undamaged input gives; seconds: it may take, more than for reading where it also trains.
    """

    name: str
    seeds: list[Input]
    target: str
    read: Callable[[Path], Any]
    share: float = 1.0
    names: tuple[str, ...] = ()
    same: bool = False
    seconds: float = 10


def content_of(path: Path, data: bool = True) -> bytes | Padded:
    """A file; without its data (of a model) where only the header counts: zeros take its place."""
    if data or path.suffix != ".safetensors":
        return path.read_bytes()
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        file.seek(0)
        return Padded(file.read(8 + size), path.stat().st_size - 8 - size)


def folder_of(path: Path, data: bool = True, leave_out: tuple[str, ...] = ()) -> Input:
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name not in leave_out)
    return {str(p.relative_to(path)): content_of(p, data) for p in files}


def command(*arguments: object) -> str:
    """A command in this process: what it said; ValueError with its last line where it refused."""
    from sid_train.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in arguments])
    if code:
        raise ValueError(err.getvalue().strip().rpartition("error: ")[2])
    return out.getvalue()
