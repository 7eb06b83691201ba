"""Captioned pictures in tar archives, as webdataset and img2dataset write them."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..files.reading import SMALL_LIMIT, reading, require_file, shown
from .captions import CAPTION_LIMIT, CAPTION_SUFFIXES, parse_caption
from .decode import SUFFIXES, UNREAD_SUFFIXES
from .entries import Dropped, Entry
from .folders import is_hidden


class _Bounded:
    """A file that hands out no more at once than a header or a caption needs, whatever a header claims."""

    def __init__(self, file: BinaryIO):
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= SMALL_LIMIT:
            raise ValueError(f"it has a header of {size:,} bytes")
        return self.file.read(size)


def read_tar(path: Path, setting: str, dropped: Dropped) -> list[Entry]:
    """The pictures of an archive with their captions, in its order: ``KEY.jpg`` with ``KEY.txt``, ``KEY.caption``,
    ``KEY.jpg.txt`` or ``KEY.json``. ValueError names the archive, and the member where there is one.
    """
    with reading(path, "an uncompressed tar archive"):
        require_file(path)
        with open(path, "rb") as file:
            members = _members(file, f"{setting}: {shown(path)}", dropped)
            return list(_samples(path, file, members, setting, dropped))


def _members(file: BinaryIO, where: str, dropped: Dropped) -> dict[PurePosixPath, tarfile.TarInfo]:
    """The regular files in an archive by their names."""
    members: dict[PurePosixPath, tarfile.TarInfo] = {}
    size = file.seek(0, 2)
    file.seek(0)
    with tarfile.open(fileobj=_Bounded(file), mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            name = PurePosixPath(member.name)
            if member.isdir():
                continue
            if is_hidden(name.parts):
                dropped.add("hidden file(s) or folder(s)", f"{where}/{name}")
            elif not member.isreg():
                dropped.add("link(s) or device(s) in archives", f"{where}/{name}")
            elif member.issparse() or not 0 <= member.size <= size - member.offset_data:
                raise ValueError(
                    f"{where}/{shown(name)}: expected {member.size:,} bytes that stand in the archive, which has "
                    f"{size:,}: pack or download it again"
                )
            else:
                if name in members:
                    dropped.add("file(s) in archives that a later one of the same name replaces", f"{where}/{name}")
                members[name] = member
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile ends there without a word
            raise ValueError(f"the header at byte {tar.offset:,} is damaged: pack or download it again")
    return members


def _samples(
    path: Path, file: BinaryIO, members: dict[PurePosixPath, tarfile.TarInfo], setting: str, dropped: Dropped
) -> Iterator[Entry]:
    where = f"{setting}: {shown(path)}"
    pictures: dict[str, PurePosixPath] = {}
    captions: dict[str, list[PurePosixPath]] = {}
    unread: set[str] = set()
    others: list[PurePosixPath] = []
    for name in members:
        suffix, key = name.suffix.lower(), str(name.with_suffix(""))
        if suffix in SUFFIXES:
            if key not in pictures:
                pictures[key] = name
            elif _sample_of(name) == key:
                raise ValueError(f"{where}/{shown(name)}: the sample {key!r} has another picture, {pictures[key]}")
            else:
                others.append(name)
        elif suffix in CAPTION_SUFFIXES:
            captions.setdefault(key, []).append(name)
        elif suffix in UNREAD_SUFFIXES:
            dropped.add("picture(s) of formats that are not read", f"{path}/{name}")
            unread.add(key)
        else:
            others.append(name)
    for key, name in list(pictures.items()):  # KEY.jpg.txt
        captions.setdefault(key, []).extend(captions.pop(str(name), []))
    for key in [key for key in pictures if not captions[key]]:
        # webdataset's samples end at the first dot: 0.mask.png belongs to 0.jpg, and has no caption of its own.
        owner = _sample_of(pictures[key])
        if owner == key or owner not in pictures:
            raise ValueError(f"{where}: the sample {key!r} has no caption (.txt, .caption or .json)")
        others.append(pictures.pop(key))
        captions.pop(key)
    for key in captions.keys() - pictures.keys():
        if key not in unread and _sample_of(captions[key][0]) not in pictures:
            raise ValueError(f"{where}: the sample {key!r} has no picture ({', '.join(s[1:] for s in SUFFIXES)})")
        others += captions[key]
    for name in others:
        dropped.add("other file(s) in archives", f"{path}/{name}")
    for key, name in pictures.items():
        caption = min(captions[key], key=lambda c: CAPTION_SUFFIXES.index(c.suffix.lower()))
        member = members[name]
        text = _caption(file, members[caption], f"{where}/{shown(caption)}", dropped)
        yield Entry(f"{path}/{member.name}", text, member.size, path, member.offset_data)


def _sample_of(name: PurePosixPath) -> str:
    """webdataset's key: the name up to its first dot."""
    return str(name.with_name(name.name.partition(".")[0]))


def _caption(file: BinaryIO, member: tarfile.TarInfo, where: str, dropped: Dropped) -> str:
    if member.size > CAPTION_LIMIT:
        raise ValueError(f"{where}: expected a caption of at most {CAPTION_LIMIT:,} bytes, got {member.size:,}")
    file.seek(member.offset_data)
    return parse_caption(file.read(member.size), member.name.lower().endswith(".json"), where, dropped)
