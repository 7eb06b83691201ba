"""One picture with its caption, and the count of what a source holds and nobody uses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..files.reading import shown


@dataclass(frozen=True)
class Entry:
    """One picture with its caption.

    name: its path, for messages
    size: bytes; of its file where the picture's own are not known without reading it
    offset: where it starts in ``file``: bytes, or rows of a parquet file
    """

    name: str
    caption: str
    size: int
    file: Path
    offset: int = 0


class Dropped:
    """What of a source is not used: how many of each kind, and what the first is called."""

    def __init__(self) -> None:
        self.kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: object, count: int = 1) -> None:
        """``kind``: what was dropped, such as "hidden file(s)"; ``name``: where, for the first one."""
        before, first = self.kinds.get(kind, (0, str(name)))
        self.kinds[kind] = before + count, first

    def __str__(self) -> str:
        """In one line; "" where everything is used."""
        return "; ".join(f"{n:,} {kind} (first: {shown(name, 200)})" for kind, (n, name) in self.kinds.items())
