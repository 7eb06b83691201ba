"""Prompts from text files, tables and data sets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

TEXT_KEYS = ("prompt", "caption", "text")
"""Keys and columns that hold a prompt; the first one that is there counts."""


def load_prompts(source: str, report: bool = False) -> list[str]:
    """The distinct prompts of ``source``, stripped, in order; ``report`` prints how many were dropped.

    A .txt file (one a line), .jsonl, .csv or .parquet (under ``prompt``, ``caption`` or ``text``), a folder (each .txt
    file in it is one caption) or ``hf:owner/name`` (the data set's train split). Raises ValueError that names the file,
    and the line where there is one.
    """
    texts = [text.strip() for text in _read_texts(source)]
    kept = [text for text in texts if text]
    prompts = list(dict.fromkeys(kept))
    if not prompts:
        raise ValueError(f"data.prompts: {source} has no prompt, {len(texts)} empty one(s): put one there at least")
    if report:
        duplicates, empty = len(kept) - len(prompts), len(texts) - len(kept)
        print(f"{source}: {len(prompts)} prompts ({duplicates} duplicates and {empty} empty ones dropped)", flush=True)
    return prompts


def _read_texts(source: str) -> Iterable[str]:
    if source.startswith("hf:"):
        return _from_hub(source.removeprefix("hf:"))
    path = Path(source)
    if path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files:
            raise ValueError(f"data.prompts: {source}: expected a folder of captions, but it holds no .txt file")
        return (read_text(file, "data.prompts") for file in files)
    readers = {".txt": _from_txt, ".jsonl": _from_jsonl, ".csv": _from_csv, ".parquet": _from_parquet}
    expected = "'demo', a .txt, .jsonl, .csv or .parquet file, a folder of captions or hf:owner/name"
    if not path.is_file():
        raise ValueError(f"data.prompts: expected {expected}; no file {source!r}")
    if path.suffix.lower() not in readers:
        raise ValueError(f"data.prompts: expected {expected}, got {source!r}: rename it to what it is")
    return readers[path.suffix.lower()](path)


def read_text(path: Path, setting: str) -> str:
    """The text of a UTF-8 file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{setting}: {path}: expected UTF-8 text: convert the file") from None


def text_of(record: Mapping[str, Any], where: str) -> str:
    """The prompt in a record, "" for null; ValueError names ``where`` and the keys that it has."""
    value = record[text_key(record, where)]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected text, got {value!r}")
    return value


def text_key(keys: Iterable[str], where: str) -> str:
    """The key or column that holds the prompts."""
    found = list(keys)
    for key in TEXT_KEYS:
        if key in found:
            return key
    raise ValueError(
        f"{where}: expected {', '.join(TEXT_KEYS[:-1])} or {TEXT_KEYS[-1]}, found {', '.join(map(repr, found))}: "
        f"rename the one that holds the prompts"
    )


def read_jsonl(path: Path, setting: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file with one a line, each with the file and line number for messages."""
    for number, line in enumerate(read_text(path, setting).split("\n"), start=1):
        where = f"{setting}: {path}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise ValueError(f'{where}: expected a JSON object such as {{"prompt": "a cat"}}, got {line[:60]!r}')
        yield where, record


def import_pyarrow(setting: str):
    """pyarrow's parquet module; ValueError where it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{setting}: parquet files are read with pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


def open_parquet(path: Path, setting: str):
    """A ``pyarrow.parquet.ParquetFile``; ValueError where it is none."""
    parquet = import_pyarrow(setting)
    try:
        return parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's own errors are among the former
        raise ValueError(f"{setting}: {path}: not a readable parquet file: {error}") from None


def _from_txt(path: Path) -> Iterable[str]:
    return read_text(path, "data.prompts").splitlines()


def _from_jsonl(path: Path) -> Iterable[str]:
    return (text_of(record, where) for where, record in read_jsonl(path, "data.prompts"))


def _from_csv(path: Path) -> Iterable[str]:
    lines = read_text(path, "data.prompts").splitlines(keepends=True)
    try:
        rows = csv.DictReader(lines, strict=True)
        key = text_key(rows.fieldnames or [], f"data.prompts: {path}, first line")
        return [row[key] or "" for row in rows]
    except csv.Error as error:
        raise ValueError(f"data.prompts: {path}: not a readable CSV file: {error}") from None


def _from_parquet(path: Path) -> Iterable[str]:
    with open_parquet(path, "data.prompts") as file:
        key = text_key(file.schema_arrow.names, f"data.prompts: {path}")
        values = file.read(columns=[key]).column(key).to_pylist()
    return (text_of({key: value}, f"data.prompts: {path}, row {row}") for row, value in enumerate(values))


def _from_hub(name: str) -> Iterable[str]:
    try:
        import datasets  # slow to import, and only this needs it
    except ImportError:
        raise ValueError("data.prompts: hf:... is read with the datasets package: pip install datasets") from None
    where = f"data.prompts: hf:{name}"
    try:
        # Streamed, so that a data set's pictures are not downloaded for its captions.
        rows = datasets.load_dataset(name, split="train", streaming=True)
        columns = rows.column_names or list(next(iter(rows)))
    except Exception as error:  # the library raises many kinds, not all of them its own
        raise _hub_error(where, error) from None
    key = text_key(columns, where)
    try:
        values = [row[key] for row in rows.select_columns([key])]
    except Exception as error:
        raise _hub_error(where, error) from None
    return (text_of({key: value}, f"{where}, row {row}") for row, value in enumerate(values))


def _hub_error(where: str, error: Exception) -> ValueError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ValueError(
        f"{where}: cannot read the train split of this data set: {reason}. Check its name and the network, or download "
        f"it and give the file"
    )
