"""Prompts from text files, tables, archives and data sets."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ..files.reading import reading, shown
from .archives import read_tar
from .captions import CAPTION_LIMIT, checked, text_key, text_of
from .decode import SUFFIXES, UNREAD_SUFFIXES
from .entries import Dropped
from .folders import suffix_of, walk
from .tables import Record, read_lines, read_records, read_text, read_texts

SETTING = "data.prompts"
NOT_CAPTIONS = ("readme", "license", "licence", "notice", "copying", "changelog", "requirements")
"""Text files that come with a data set."""
TABLES = (".jsonl", ".csv", ".parquet", ".tar")
"""What is read of a folder without caption files: all files of the first kind that is there."""
EXPECTED = "'demo', a .txt, .jsonl, .json, .csv, .parquet or .tar file, a folder of captions or hf:owner/name"


def load_prompts(source: str, report: bool = False) -> list[str]:
    """The distinct prompts of ``source``, stripped, in order; ``report`` prints how many were dropped, and what else
    was not used.

    A .txt file (one a line), .jsonl, .json, .csv or .parquet (under ``prompt``, ``caption`` or ``text``), a folder
    (each .txt or .caption file in it is one caption; without them its tables or archives) or ``hf:owner/name`` (the
    data set's train split). Raises ValueError that names the file, and the line where there is one.
    """
    prompts: dict[str, None] = {}
    count = empty = 0
    dropped = Dropped()
    with reading(source, "prompts"):
        for text in map(str.strip, _texts(source, dropped)):
            count += 1
            empty += not text
            if text:
                prompts[text] = None
        if not prompts:
            also = f" ({dropped})" if str(dropped) else ""
            raise ValueError(f"{SETTING}: {source} has no prompt, {count} empty one(s){also}: put one there at least")
    if report:
        duplicates = count - empty - len(prompts)
        print(f"{source}: {len(prompts)} prompts ({duplicates} duplicates and {empty} empty ones dropped)", flush=True)
        if str(dropped):
            print(f"{source}: not used: {dropped}", flush=True)
    return list(prompts)


def load_captions(source: str) -> list[str]:
    """The captions of ``source``, stripped, in order, also those that are there twice; read as ``load_prompts`` does.
    What is not used is printed. ValueError where one is empty, since a picture is made of each.
    """
    dropped = Dropped()
    with reading(source, "captions"):
        captions = [text.strip() for text in _texts(source, dropped)]
        if not all(captions):
            raise ValueError(f"{source}: caption {captions.index('') + 1:,} is empty: write one, or remove the line")
    if str(dropped):
        print(f"{source}: not used: {dropped}", file=sys.stderr, flush=True)
    return captions


def _texts(source: str, dropped: Dropped) -> Iterator[str]:
    path = Path(source)
    if source.startswith("hf:"):
        yield from (text_of(record, where, dropped) for where, record in _hub_records(source.removeprefix("hf:")))
    elif path.is_dir():
        yield from _in_folder(path, dropped)
    elif not path.is_file():
        raise ValueError(f"{SETTING}: expected {EXPECTED}; no file {shown(repr(source))}")
    elif suffix_of(path) in (".txt", ".json", *TABLES):
        yield from _in_file(path, dropped)
    else:
        raise ValueError(f"{SETTING}: expected {EXPECTED}, got {shown(repr(source))}: rename it to what it is")


def _is_caption(path: Path) -> bool:
    """Not README.txt, README.en.txt, LICENSE-MODEL.txt and their like."""
    return re.split(r"[._-]", path.stem.lower())[0] not in NOT_CAPTIONS


def _in_folder(folder: Path, dropped: Dropped) -> Iterator[str]:
    files = walk(folder, dropped)
    captions = [p for p in files if suffix_of(p) in (".txt", ".caption") and _is_caption(p)]
    kind = next((kind for kind in TABLES if any(suffix_of(path) == kind for path in files)), "")
    used = captions or [path for path in files if suffix_of(path) == kind]
    for path in sorted({*files} - {*used}):
        if suffix_of(path) not in (*SUFFIXES, *UNREAD_SUFFIXES):  # pictures are no news beside captions
            dropped.add("other file(s)", path)
    if not used:
        also = f" ({dropped})" if str(dropped) else ""
        raise ValueError(f"{SETTING}: {shown(folder)}: expected a folder of captions, but it holds no .txt file{also}")
    for path in used:
        if captions:
            yield checked(read_text(path, CAPTION_LIMIT), f"{SETTING}: {shown(path)}")
        else:
            yield from _in_file(path, dropped)


def _in_file(path: Path, dropped: Dropped) -> Iterator[str]:
    suffix = suffix_of(path)
    if suffix == ".txt":
        lines = enumerate(read_lines(path), start=1)
        yield from (checked(line, f"{SETTING}: {shown(path)}, line {number}") for number, line in lines)
    elif suffix == ".tar":
        yield from (entry.caption for entry in read_tar(path, SETTING, dropped))
    else:
        records = read_texts if suffix == ".parquet" else read_records
        yield from (text_of(record, where, dropped) for where, record in records(path, SETTING, dropped))


def _hub_records(name: str) -> Iterator[Record]:
    try:
        import datasets  # slow to import, and only this needs it
    except ImportError:
        raise ValueError(f"{SETTING}: hf:{name} is read with the datasets package: pip install datasets") from None
    where = f"{SETTING}: hf:{name}"
    try:
        # Streamed, so that a data set's pictures are not downloaded for its captions.
        rows = datasets.load_dataset(name, split="train", streaming=True)
        columns = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # the library raises many kinds, not all of them its own
        raise _hub_error(where, error) from None
    key = text_key(columns, where)
    try:
        for row, record in enumerate(rows.select_columns([key])):
            yield f"{where}, row {row}", record
    except Exception as error:
        raise _hub_error(where, error) from None


def _hub_error(where: str, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(
        f"{where}: cannot read the train split of this data set: {reason}. Check its name and the network, or download "
        f"it and give the file"
    )
