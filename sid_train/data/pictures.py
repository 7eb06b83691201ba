"""Pictures with captions: folders, webdataset shards and parquet files, and what is cut out of each picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..files.reading import reading, require_file, shown
from .archives import read_tar
from .captions import text_of
from .decode import PICTURE_LIMIT, SUFFIXES, UNREAD_SUFFIXES, decode_picture
from .entries import Dropped, Entry
from .folders import read_folder, read_listed, suffix_of, walk
from .tables import GROUP_LIMIT, group_bytes, open_parquet, parquet_columns, read_texts

SETTING = "data.pairs"
METADATA = ("metadata.jsonl", "metadata.csv")
"""Hugging Face's lists of a folder's pictures; the first one counts."""
BYTES_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
"""Columns of a parquet file that hold pictures: bytes, or Hugging Face's struct of ``bytes`` and ``path``."""
EXPECTED = f"a folder of pictures with captions (NAME.txt or {METADATA[0]}), .tar shards or .parquet files"
SHARD_LIMIT = 100_000
"""Files that one pattern may stand for."""
NAMES_LIMIT = 1 << 25
"""Characters of all their names."""

Size = tuple[int, int]
"""Height and width in pixels."""


class Pictures:
    """Captioned pictures, each a range of bytes of some file; nothing is read before ``read``.

    dropped: what else was found, and is not used
    """

    def __init__(self, entries: list[Entry], dropped: Dropped | None = None):
        self.entries, self.dropped = entries, dropped or Dropped()
        empty = [entry for entry in entries if not entry.caption.strip()]
        if empty:
            more = f" ({len(empty) - 1:,} other captions are, too)" if len(empty) > 1 else ""
            raise ValueError(
                f"{SETTING}: {shown(empty[0].name)}: its caption is empty{more}: write one, or remove the picture"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, row: int) -> Image.Image:
        """The picture in RGB (see ``decode_picture``); ValueError names a file that is none."""
        with reading(self.entries[row].name, "a readable picture"):
            return decode_picture(self.read_bytes(row))

    def read_bytes(self, row: int) -> bytes:
        entry = self.entries[row]
        require_file(entry.file)
        if entry.size > PICTURE_LIMIT:
            raise ValueError(f"it has {entry.size:,} bytes, more than {PICTURE_LIMIT:,}")
        with open(entry.file, "rb") as file:
            file.seek(entry.offset)
            return file.read(entry.size)


class ParquetPictures(Pictures):
    """Captioned pictures in parquet files. A row group is read at a time, and the last one is kept."""

    def __init__(self, files: list[Path], dropped: Dropped):
        self.columns: dict[Path, str] = {}
        self.starts: dict[Path, list[int]] = {}  # the first row of every row group
        self.group: tuple[Path, int] | None = None
        self.values: Any = []  # Arrow's, since a dictionary's values would be copied for every row
        super().__init__([entry for file in files for entry in self._entries(file, dropped)], dropped)

    def _entries(self, path: Path, dropped: Dropped) -> Iterator[Entry]:
        where = f"{SETTING}: {shown(path)}"
        names = {name.lower(): name for name in reversed(parquet_columns(path, SETTING))}
        column = next((names[name] for name in BYTES_COLUMNS if name in names), None)
        if column is None:
            raise ValueError(
                f"{where}: expected a column of pictures named {' or '.join(BYTES_COLUMNS)}, found "
                f"{shown(', '.join(reversed(names.values())))}"
            )
        self.columns[path] = column
        with open_parquet(path, SETTING) as file:
            lengths = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.starts[path] = np.cumsum([0, *lengths])[:-1].tolist()
        size = path.stat().st_size
        for row, (place, record) in enumerate(read_texts(path, SETTING, dropped)):
            yield Entry(f"{path}, row {row}", text_of(record, place, dropped), size, path, row)

    def read_bytes(self, row: int) -> bytes:
        entry = self.entries[row]
        starts, column = self.starts[entry.file], self.columns[entry.file]
        group = int(np.searchsorted(starts, entry.offset, side="right")) - 1
        if self.group != (entry.file, group):
            with open_parquet(entry.file, SETTING, (column,)) as file:
                if (size := group_bytes(file, group)) > GROUP_LIMIT:
                    raise ValueError(f"{size:,} bytes are in one row group: write it in smaller ones")
                self.values = file.read_row_group(group, columns=[column]).column(column)
            self.group = (entry.file, group)
        value = self.values[entry.offset - starts[group]].as_py()
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ValueError(f"expected bytes in column {column!r}, got {type(value).__name__}")
        return value


def open_pictures(source: str, report: bool = False) -> Pictures:
    """The pictures that ``source`` names, in a fixed order; ValueError names the file that is wrong or missing.
    ``report`` prints their number, and what is not used.
    """
    with reading(source, EXPECTED):
        pictures = _open(source, [Path(name) for name in expand_braces(source)], Dropped())
    if report:
        print(f"{source}: {len(pictures)} pairs", flush=True)
        if str(pictures.dropped):
            print(f"{source}: not used: {pictures.dropped}", flush=True)
    return pictures


def _open(source: str, paths: list[Path], dropped: Dropped) -> Pictures:
    kinds = {suffix_of(path) for path in paths}
    if len(paths) > 1 or (kinds <= {".tar", ".parquet", ".jsonl", ".json", ".csv"} and not paths[0].is_dir()):
        for path in paths:
            if not path.is_file():
                raise ValueError(f"{SETTING}: {shown(source)}: there is no file {shown(path)}")
        if kinds == {".tar"}:
            return _in_tars(paths, dropped)
        if kinds == {".parquet"}:
            return ParquetPictures(paths, dropped)
        if kinds <= {".jsonl", ".json", ".csv"}:
            return _in_lists(paths, dropped)
        raise ValueError(f"{SETTING}: expected {EXPECTED}, got {shown(repr(source))}")
    folder = paths[0]
    if not folder.is_dir():
        raise ValueError(f"{SETTING}: expected 'demo' or {EXPECTED}; there is no folder {shown(repr(source))}")
    files = walk(folder, dropped)
    pictures = [path for path in files if suffix_of(path) in SUFFIXES]
    for path in files:
        if suffix_of(path) in UNREAD_SUFFIXES:
            dropped.add("picture(s) of formats that are not read", path)
    files = [path for path in files if suffix_of(path) not in UNREAD_SUFFIXES]
    shards = [path for path in files if suffix_of(path) in (".tar", ".parquet")]
    shards = [path for path in shards if path.parent == folder] or ([] if pictures else shards)
    tars = [path for path in shards if suffix_of(path) == ".tar"]
    tables = [path for path in shards if suffix_of(path) == ".parquet"]
    if tars or pictures:
        named = _img2dataset_shards(files)
        tables = [path for path in tables if path.with_suffix("") not in named]
    found = [kind for kind in (tars, tables, pictures) if kind]
    if len(found) != 1:
        holds = "more than one of these" if found else "none of them"
        also = f" ({dropped})" if str(dropped) else ""
        raise ValueError(f"{SETTING}: {shown(source)}: expected {EXPECTED}, but the folder holds {holds}{also}")
    if pictures:
        lists = _lists(folder, files)
        return _in_lists(lists, dropped, pictures) if lists else Pictures(read_folder(files, SETTING, dropped), dropped)
    for path in sorted({*files} - {*tars, *tables}):
        dropped.add("other file(s)", path)
    return _in_tars(tars, dropped) if tars else ParquetPictures(tables, dropped)


def _in_tars(paths: list[Path], dropped: Dropped) -> Pictures:
    return Pictures([entry for path in paths for entry in read_tar(path, SETTING, dropped)], dropped)


def _in_lists(paths: list[Path], dropped: Dropped, pictures: Sequence[Path] = ()) -> Pictures:
    """Pictures that lists name; ``pictures`` are those that are there."""
    entries = [entry for path in paths for entry in read_listed(path, SETTING, dropped)]
    for path in sorted({*pictures} - {entry.file for entry in entries}):
        dropped.add("picture(s) that no list names", path)
    return Pictures(entries, dropped)


def _lists(folder: Path, files: list[Path]) -> list[Path]:
    """The list of a folder's pictures, or those of the folders below."""
    first: dict[Path, Path] = {}
    for name in METADATA:
        for path in files:
            if path.name == name:
                first.setdefault(path.parent, path)
    return [first[folder]] if folder in first else sorted(first.values())


def _img2dataset_shards(files: list[Path]) -> set[Path]:
    """The paths, without suffix, of shards beside which a .parquet file only repeats what is in them."""
    named = {path.parent for path in files}
    for path in files:
        if suffix_of(path) == ".tar":
            named.add(path.with_suffix(""))
        elif path.name.endswith("_stats.json"):
            named.add(path.with_name(path.name.removesuffix("_stats.json")))
    return named


def expand_braces(source: str) -> list[str]:
    """webdataset's notation: ``{00..10}`` stands for the numbers from 00 to 10, as wide as they are written. ValueError
    if these are too many.
    """
    if not source.strip():
        raise ValueError(f"{SETTING}: expected {EXPECTED}, got {source!r}")
    parts = re.split(r"\{([0-9]+)\.\.([0-9]+)\}", source)
    names = [parts[0]]
    for first, last, after in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        written = f"{{{first}..{last}}}"
        if max(len(first), len(last)) > 9:
            got = shown(written, 60)
            raise ValueError(f"{SETTING}: {shown(source)}: expected numbers of at most 9 digits, got {got}")
        if int(first) > int(last):
            raise ValueError(f"{SETTING}: {shown(source)}: expected rising numbers, got {written}")
        count = int(last) - int(first) + 1
        if len(names) * count > SHARD_LIMIT:
            raise ValueError(f"{SETTING}: {shown(source)}: stands for more than {SHARD_LIMIT:,} files")
        if len(names) * count * len(source) > NAMES_LIMIT:
            raise ValueError(f"{SETTING}: {shown(source)}: stands for names of more than {NAMES_LIMIT:,} characters")
        numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
        names = [name + number + after for name in names for number in numbers]
    return names


# -- sizes -------------------------------------------------------------------------------------------------------


def bucket_sizes(size: Size, factor: int) -> list[Size]:
    """SDXL's aspect buckets (arXiv 2307.01952, appendix I) around ``size``: up to 10% fewer pixels, aspects 1:4 to 4:1.

    ``factor``: image pixels a latent pixel. Sides are multiples of 8 latent pixels, of 4 at less than 64 of them, so
    that the UNet's halvings come out even. Widest first.
    """
    step = factor * (8 if min(size) >= 64 * factor else 4)
    pixels, side = size[0] * size[1], math.isqrt(size[0] * size[1])
    sides = range(-(-side // (2 * step)) * step, 2 * side + 1, step)
    return [(h, w) for h in sides for w in sides if 0.9 * pixels <= h * w <= pixels]


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of the closest aspect, the larger one of two."""
    aspect = math.log(size[1] / size[0])
    return min(buckets, key=lambda b: (abs(math.log(b[1] / b[0]) - aspect), -b[0] * b[1]))


def cut_out(image: Image.Image, size: Size) -> tuple[Tensor, list[int]]:
    """The middle of a picture that was resized to cover ``size``: a tensor [3, H, W] in [-1, 1].

    Also SDXL's time ids: original height and width, the cut's top and left, target height and width.
    """
    height, width = size
    scale = max(height / image.height, width / image.width)
    resized = (max(height, round(image.height * scale)), max(width, round(image.width * scale)))
    top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
    # Only what is kept is resized: of a strip of 1 x 30,000 pixels, the whole would have 31 thousand million.
    x, y = image.width / resized[1], image.height / resized[0]
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    cut = image.resize((width, height), Image.Resampling.LANCZOS, box)
    pixels = torch.from_numpy(np.array(cut)).float() / 127.5 - 1
    return rearrange(pixels, "h w c -> c h w"), [image.height, image.width, top, left, height, width]
