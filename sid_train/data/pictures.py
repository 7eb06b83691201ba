"""Pictures with captions: folders, webdataset shards and parquet files, and what is cut out of each picture."""

from __future__ import annotations

import io
import json
import math
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from .prompts import open_parquet, read_jsonl, read_text, text_key, text_of

EXTENSIONS = ("jpg", "jpeg", "png", "webp")
METADATA = "metadata.jsonl"
BYTES_COLUMNS = ("image", *EXTENSIONS, "image_bytes", "bytes")
"""Columns of a parquet file that hold pictures: bytes, or Hugging Face's struct of ``bytes`` and ``path``."""
EXPECTED = f"a folder of pictures with captions (NAME.txt or {METADATA}), .tar shards or .parquet files"

Size = tuple[int, int]
"""Height and width in pixels."""


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


class Pictures:
    """Captioned pictures, each a range of bytes of some file; nothing is read before ``read``."""

    def __init__(self, entries: list[Entry]):
        self.entries = entries
        for entry in entries:
            if not entry.caption.strip():
                raise ValueError(f"data.pairs: {entry.name}: its caption is empty: write one, or remove the picture")

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, row: int) -> Image.Image:
        """The picture in RGB, turned as its EXIF orientation says; ValueError names a file that is none."""
        try:
            image = Image.open(io.BytesIO(self.read_bytes(row)))
            return ImageOps.exif_transpose(image).convert("RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(
                f"data.pairs: {self.entries[row].name}: not a readable picture: {error}. Repair or remove it"
            ) from None

    def read_bytes(self, row: int) -> bytes:
        entry = self.entries[row]
        with open(entry.file, "rb") as file:
            file.seek(entry.offset)
            return file.read(entry.size)


class ParquetPictures(Pictures):
    """Captioned pictures in parquet files. A row group is read at a time, and the last one is kept."""

    def __init__(self, files: list[Path]):
        self.columns: dict[Path, str] = {}
        self.starts: dict[Path, list[int]] = {}  # the first row of every row group
        self.group: tuple[Path, int] | None = None
        self.values: list[Any] = []
        super().__init__([entry for file in files for entry in self._entries(file)])

    def _entries(self, path: Path) -> Iterator[Entry]:
        with open_parquet(path, "data.pairs") as file:
            names = file.schema_arrow.names
            column = next((name for name in BYTES_COLUMNS if name in names), None)
            if column is None:
                raise ValueError(
                    f"data.pairs: {path}: expected a column of pictures named {' or '.join(BYTES_COLUMNS)}, found "
                    f"{', '.join(names)}"
                )
            self.columns[path] = column
            lengths = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
            self.starts[path] = np.cumsum([0, *lengths])[:-1].tolist()
            key = text_key(names, f"data.pairs: {path}")
            captions = file.read(columns=[key]).column(key).to_pylist()
        for row, caption in enumerate(captions):
            name = f"{path}, row {row}"
            yield Entry(name, text_of({key: caption}, f"data.pairs: {name}"), path.stat().st_size, path, row)

    def read_bytes(self, row: int) -> bytes:
        entry = self.entries[row]
        starts, column = self.starts[entry.file], self.columns[entry.file]
        group = int(np.searchsorted(starts, entry.offset, side="right")) - 1
        if self.group != (entry.file, group):
            with open_parquet(entry.file, "data.pairs") as file:
                self.values = file.read_row_group(group, columns=[column]).column(column).to_pylist()
            self.group = (entry.file, group)
        value = self.values[entry.offset - starts[group]]
        value = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(value, bytes):
            raise ValueError(f"expected bytes in column {column!r}, got {type(value).__name__}")
        return value


def open_pictures(source: str) -> Pictures:
    """The pictures that ``source`` names, in a fixed order; ValueError names the file that is wrong or missing."""
    paths = [Path(name) for name in expand_braces(source)]
    if len(paths) > 1 or paths[0].suffix.lower() in (".tar", ".parquet"):
        for path in paths:
            if not path.is_file():
                raise ValueError(f"data.pairs: {source}: there is no file {path}")
        kinds = {path.suffix.lower() for path in paths}
        if kinds == {".tar"}:
            return Pictures([entry for path in paths for entry in _in_tar(path)])
        if kinds == {".parquet"}:
            return ParquetPictures(paths)
        raise ValueError(f"data.pairs: expected {EXPECTED}, got {source!r}")
    folder = paths[0]
    if not folder.is_dir():
        raise ValueError(f"data.pairs: expected 'demo' or {EXPECTED}; there is no folder {source!r}")
    tars, tables = sorted(folder.glob("*.tar")), sorted(folder.glob("*.parquet"))
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower().lstrip(".") in EXTENSIONS)
    found = [kind for kind in (tars, tables, pictures) if kind]
    if len(found) != 1:
        holds = "more than one of these" if found else "none of them"
        raise ValueError(f"data.pairs: {source}: expected {EXPECTED}, but the folder holds {holds}")
    if tars:
        return Pictures([entry for path in tars for entry in _in_tar(path)])
    if tables:
        return ParquetPictures(tables)
    return Pictures(list(_in_metadata(folder) if (folder / METADATA).is_file() else map(_with_caption_file, pictures)))


def expand_braces(source: str) -> list[str]:
    """webdataset's notation: ``{00..10}`` stands for the numbers from 00 to 10, as wide as they are written."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", source)
    if match is None:
        return [source]
    first, last = match.groups()
    if int(first) > int(last):
        raise ValueError(f"data.pairs: {source}: expected rising numbers, got {match.group()}")
    before, after = source[: match.start()], source[match.end() :]
    numbers = [f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)]
    return [before + number + rest for number in numbers for rest in expand_braces(after)]


def _with_caption_file(path: Path) -> Entry:
    caption = path.with_suffix(".txt")
    if not caption.is_file():
        raise ValueError(f"data.pairs: {path}: expected its caption in {caption.name}; there is no such file")
    return Entry(str(path), read_text(caption, "data.pairs").strip(), path.stat().st_size, path)


def _in_metadata(folder: Path) -> Iterator[Entry]:
    for where, record in read_jsonl(folder / METADATA, "data.pairs"):
        name = record.get("file_name")
        if not isinstance(name, str):
            raise ValueError(f"{where}: expected the picture's path under file_name, found {', '.join(record)}")
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{where}: there is no file {path}")
        yield Entry(str(path), text_of(record, where), path.stat().st_size, path)


def _in_tar(path: Path) -> Iterator[Entry]:
    """webdataset's layout: the members ``KEY.jpg`` and ``KEY.txt`` (or ``KEY.json``) make a sample."""
    pictures: dict[str, tarfile.TarInfo] = {}
    captions: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:  # not compressed, so that a picture can be read where it stands
            for member in tar:
                if not member.isreg():
                    continue
                member_path = PurePosixPath(member.name)
                stem, _, extension = member_path.name.partition(".")
                key, extension = str(member_path.with_name(stem or member_path.name)), extension.lower()
                where = f"data.pairs: {path}/{member.name}"
                if extension in EXTENSIONS:
                    if key in pictures:
                        raise ValueError(f"{where}: the sample {key!r} has another picture, {pictures[key].name}")
                    pictures[key] = member
                elif extension == "txt" or (extension == "json" and key not in captions):
                    captions[key] = _caption_in_tar(tar.extractfile(member).read(), extension, where)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"data.pairs: {path}: not a readable, uncompressed tar file: {error}") from None
    for key in pictures.keys() ^ captions.keys():
        missing = "caption (.txt or .json)" if key in pictures else f"picture ({', '.join(EXTENSIONS)})"
        raise ValueError(f"data.pairs: {path}: the sample {key!r} has no {missing}")
    for key, member in pictures.items():
        yield Entry(f"{path}/{member.name}", captions[key], member.size, path, member.offset_data)


def _caption_in_tar(data: bytes, extension: str, where: str) -> str:
    try:
        text = data.decode("utf-8-sig")
        record = json.loads(text) if extension == "json" else {"text": text}
    except ValueError:  # both of UTF-8 and of JSON
        raise ValueError(f"{where}: expected UTF-8 text, or a JSON object with the caption") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object with the caption, got {text[:60]!r}")
    return text_of(record, where).strip()


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
    cut = image.resize(resized[::-1], Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(cut)).float() / 127.5 - 1
    return rearrange(pixels, "h w c -> c h w"), [image.height, image.width, top, left, height, width]
