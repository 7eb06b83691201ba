"""The configurations that ship: what ``--config NAME`` takes."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped(pattern: str = "*") -> list[str]:
    """The names of those that match ``pattern``, sorted."""
    return sorted(path.stem for path in FOLDER.glob(f"{pattern}.toml"))


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.toml"
