"""Captioned pictures in folders: which files are there, whose caption is whose, and names that stay in the folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..files.reading import SMALL_LIMIT, read_bytes, shown
from .captions import CAPTION_LIMIT, CAPTION_SUFFIXES, parse_caption, text_of
from .decode import SUFFIXES
from .entries import Dropped, Entry
from .tables import read_records, read_text

NOT_DATA = ("__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini")
"""What operating systems leave in folders and archives, beside what begins with a dot."""


def is_hidden(parts: Iterable[str]) -> bool:
    """Whether a path below a data folder is no data: ``.ipynb_checkpoints``, ``._a.jpg``, ``__MACOSX``."""
    return any(part.startswith(".") or part in NOT_DATA for part in parts)


def suffix_of(path: Path) -> str:
    """``.jpg`` of ``a.b.JPG``."""
    return path.suffix.lower()


def walk(folder: Path, dropped: Dropped) -> list[Path]:
    """The regular files in ``folder`` and below, in the order of their paths. Links are followed, but no folder is
    entered twice. What is hidden, and what is no regular file, is counted in ``dropped``.
    """
    files: list[Path] = []
    entered: set[str] = set()
    folders, links = [folder], []
    while folders or links:
        # Linked folders come last, so that files keep their own paths where both lead to them.
        here = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(here)
        if real in entered:
            dropped.add("link(s) to a folder that is read already", here)
            continue
        entered.add(real)
        with os.scandir(here) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            path = here / entry.name
            try:
                is_folder, is_file = entry.is_dir(), entry.is_file()
            except OSError:  # links in a circle
                is_folder = is_file = False
            if is_hidden([entry.name]):
                dropped.add("hidden file(s) or folder(s)", path)
            elif is_folder:
                (links if entry.is_symlink() else folders).append(path)
            elif is_file:
                files.append(path)
            elif os.path.exists(path):
                dropped.add("pipe(s), socket(s) or device(s)", path)
            else:
                dropped.add("link(s) that lead nowhere", path)
    return sorted(files)


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of a file that a stranger's file names; ValueError if it is not below ``folder``."""
    root = os.path.abspath(folder)
    path = os.path.abspath(os.path.join(root, name))
    if not path.startswith(os.path.join(root, "")):
        raise ValueError(f"{where}: expected the name of a file in {shown(folder)}, got {shown(repr(name))}")
    return folder / os.path.relpath(path, root)


def read_folder(files: list[Path], setting: str, dropped: Dropped) -> list[Entry]:
    """The pictures among ``files`` with their captions: for ``A.jpg`` the first of ``A.txt``, ``A.caption``,
    ``A.jpg.txt``, ``A.jpg.caption`` and ``A.json`` that is there. ValueError where one has none.
    """
    captions: dict[tuple[str, str], Path] = {}
    for path in files:
        if suffix_of(path) in CAPTION_SUFFIXES:
            captions.setdefault((str(path.with_suffix("")), suffix_of(path)), path)
    found, missing = {}, []
    for path in files:
        if suffix_of(path) in SUFFIXES:
            stems = (str(path.with_suffix("")), str(path))
            names = [(stem, suffix) for suffix in CAPTION_SUFFIXES for stem in stems]
            caption = next((captions[name] for name in names if name in captions), None)
            if caption is None:
                missing.append(path)
            else:
                found[path] = caption
    if missing:
        more = f"; {len(missing) - 1:,} other picture(s) have none either" if len(missing) > 1 else ""
        raise ValueError(
            f"{setting}: {shown(missing[0])}: expected its caption in {shown(missing[0].stem)}.txt; there is no such "
            f"file{more}"
        )
    for path in sorted({*files} - {*found, *found.values()}):
        kind = "caption file(s) without a picture" if suffix_of(path) in (".txt", ".caption") else "other file(s)"
        dropped.add(kind, path)
    return [_entry(path, _caption(caption, setting, dropped)) for path, caption in found.items()]


def _caption(path: Path, setting: str, dropped: Dropped) -> str:
    if suffix_of(path) == ".json":
        return parse_caption(read_bytes(path, SMALL_LIMIT), True, f"{setting}: {shown(path)}", dropped)
    return read_text(path, CAPTION_LIMIT).strip()


def _entry(path: Path, caption: str) -> Entry:
    return Entry(str(path), caption, path.stat().st_size, path)


def read_listed(table: Path, setting: str, dropped: Dropped) -> list[Entry]:
    """The pictures that a ``metadata.jsonl`` or .csv names under ``file_name``, or a .json of kohya's; paths are
    relative to its folder and stay in it. kohya's need no suffix.
    """
    entries = []
    for where, record in read_records(table, setting, dropped):
        name = record.get("file_name")
        if not isinstance(name, str):
            found = shown(", ".join(map(str, record)))
            raise ValueError(f"{where}: expected the picture's path under file_name, found {found}")
        path = inside(table.parent, name, where)
        names = [path, *(path.with_name(path.name + suffix) for suffix in SUFFIXES)]
        path = next((path for path in names if os.path.isfile(path)), path)
        if not os.path.isfile(path):  # not Path.is_file, which raises where a name is too long
            raise ValueError(f"{where}: there is no file {shown(path)}")
        entries.append(_entry(path, text_of(record, where, dropped)))
    return entries
