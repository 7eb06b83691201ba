"""Logs with one JSON object a line, which a run that continues rewinds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from .atomic import write_text


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log, oldest first; none if there is no file. Lines that are none, torn by a crash or written by
    somebody else, are passed over.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The entries, and how many lines are none."""
    entries, others = [], 0
    for line in path.read_bytes().split(b"\n") if path.is_file() else []:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and isinstance(entry.get("iteration"), int):
            entries.append(entry)
        else:
            others += bool(line)
    return entries, others


def append_log(path: Path, entry: dict[str, Any]) -> None:
    """One more entry, which is on the disk before a checkpoint counts on it."""
    with open(path, "ab+") as file:
        if file.tell() and not _ends_a_line(file):  # of a write that found no room
            file.write(b"\n")
        file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read() == b"\n"


def rewind_log(path: Path, iteration: int) -> int:
    """Drops the entries after ``iteration``: a run that is continued repeats what came after its last checkpoint. Also
    drops lines that are no entries, and returns their number.
    """
    entries, others = _read(path)
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries if entry["iteration"] <= iteration))
    return others
