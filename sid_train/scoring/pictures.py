"""Folders of pictures, in the order of their captions: those that are made here, and those that something else made."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ..data.decode import PICTURE_LIMIT, SUFFIXES, decode_picture
from ..data.entries import Dropped
from ..data.folders import suffix_of, walk
from ..files.atomic import replacing, write_text
from ..files.images import to_pil
from ..files.reading import read_bytes, read_json, reading, shown
from .sources import Source

SETTINGS = "made-with.json"


def picture_files(folder: Path) -> list[Path]:
    """The pictures in a folder, in the order of their names, of which numbers count as such: 2.png is before 10.png.
    ValueError where there is none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of pictures, and there is none of that name")
    files = [file for file in walk(folder, Dropped()) if suffix_of(file) in SUFFIXES]
    if not files:
        raise ValueError(f"{folder}: expected a folder of pictures ({', '.join(sorted(SUFFIXES))}), found none")
    return sorted(files, key=lambda file: _natural(file.relative_to(folder).as_posix()))


def _natural(name: str) -> list[tuple[int, str]]:
    """A name's digits as numbers, between its other characters."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_picture(file: Path) -> Image.Image:
    """In RGB; ValueError names a file that is none."""
    with reading(file, "a readable picture"):
        return decode_picture(read_bytes(file, PICTURE_LIMIT))


def read_pictures(files: Sequence[Path], batch: int, told: str) -> Iterator[list[Image.Image]]:
    """Pictures in batches, as ``read_picture`` gives them."""
    for start in tqdm(range(0, len(files), batch), desc=told, leave=False, disable=None):
        yield [read_picture(file) for file in files[start : start + batch]]


def make_pictures(
    folder: Path, source: Source, prompts: Sequence[str], seed: int, rank: int = 0, ranks: int = 1
) -> None:
    """Makes those of ``prompts`` that are not in ``folder`` yet: 000000.png, 000001.png ... Of several processes each
    makes every ``ranks``-th.
    """
    missing = [place for place in range(rank, len(prompts), ranks) if not (folder / _name(place)).is_file()]
    for start in tqdm(range(0, len(missing), source.batch), desc=f"pictures of {folder.name}", disable=None):
        places = missing[start : start + source.batch]
        images = source.pictures([prompts[place] for place in places], places, seed)
        for place, image in zip(places, images, strict=True):
            with replacing(folder / _name(place)) as temporary:
                to_pil(image).save(temporary, format="PNG")


def made_files(folder: Path, count: int) -> list[Path]:
    return [folder / _name(place) for place in range(count)]


def _name(place: int) -> str:
    return f"{place:06d}.png"


def claim(folder: Path, settings: dict[str, object]) -> None:
    """Says what the pictures in ``folder`` are made with; ValueError where it says something else already."""
    path = folder / SETTINGS
    if path.is_file():
        with reading(path, "what 'evaluate' wrote"):
            there = read_json(path)
        changed = [key for key in settings if there.get(key) != settings[key]]
        if changed:
            raise ValueError(
                f"{folder}: its pictures were made with {changed[0]} {shown(there.get(changed[0]), 100)}, not "
                f"{shown(settings[changed[0]], 100)}: choose another --out"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    if any(name.endswith(".png") for name in os.listdir(folder)):
        raise ValueError(f"{folder}: it holds pictures already: choose another --out")
    write_text(path, json.dumps(settings, indent=1) + "\n")
