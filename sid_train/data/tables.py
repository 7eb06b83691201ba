"""Records from text files and tables: JSON lines, JSON, CSV and Parquet, each with the place for messages."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import reading as files
from ..files.reading import TEXT_LIMIT, other_kind, reading, require_file, shown
from .captions import CAPTION_LIMIT, OTHER_KEYS, TEXT_KEYS, text_key
from .entries import Dropped

ROW_LIMIT = 100_000_000
"""Rows of a table: a few bytes of Parquet can claim any number."""
BATCH_ROWS = 256
"""Rows of a table's texts that are in memory at a time."""
GROUP_LIMIT = 1 << 32
"""Bytes of a row group."""
BATCH_LIMIT = 1 << 30
"""Bytes of a batch of texts, and of a JSON file."""

Record = tuple[str, dict[str, Any]]
"""Where it stands, for messages, and the record."""


def read_text(path: Path, limit: int = TEXT_LIMIT) -> str:
    r"""The text of a UTF-8 file, lines ended by ``\n`` whichever system wrote them. ValueError names the file."""
    text = files.read_text(path, limit).replace("\r\n", "\n").replace("\r", "\n")
    if kind := other_kind(text[:50].encode()):
        raise ValueError(f"{shown(path)}: expected text: {kind}")
    return text


def read_lines(path: Path) -> list[str]:
    r"""Lines end in ``\n``, ``\r\n`` or ``\r`` and in nothing else: prompts that were copied from the web hold U+2028,
    those from PDF files a form feed.
    """
    return read_text(path).removesuffix("\n").split("\n")


def read_records(path: Path, setting: str, dropped: Dropped) -> Iterator[Record]:
    """The records of a .jsonl, .json or .csv file."""
    reader = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv}[path.suffix.lower()]
    return reader(path, f"{setting}: {shown(path)}", dropped)


def _read_jsonl(path: Path, file: str, dropped: Dropped) -> Iterator[Record]:
    for number, line in enumerate(read_lines(path), start=1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        yield where, _object(record, line, where)


def _object(value: Any, text: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{where}: expected a JSON object such as {{"prompt": "a cat"}}, got {shown(repr(text[:60]))}')
    return value


def _read_json(path: Path, file: str, dropped: Dropped) -> Iterator[Record]:
    """A list of prompts or records, or kohya's object whose keys are pictures: ``{"a.jpg": {"caption": "..."}}``."""
    content = files.read_json(path, BATCH_LIMIT)
    texts = {str(key).lower(): value for key, value in content.items()} if isinstance(content, dict) else {}
    for key in (*TEXT_KEYS, *OTHER_KEYS):
        if isinstance(texts.get(key), str | list):  # {"prompts": [...]}, or a single record
            content = texts[key] if isinstance(texts[key], list) else [content]
            break
    if isinstance(content, dict):
        for name, value in content.items():
            where = f"{file}, {shown(repr(name), 80)}"
            record = {"caption": value} if isinstance(value, str) else _object(value, repr(value), where)
            yield where, {**record, "file_name": name, **_with_tags(record)}
    elif isinstance(content, list):
        for number, value in enumerate(content, start=1):
            where = f"{file}, item {number}"
            yield where, {"prompt": value} if isinstance(value, str) else _object(value, repr(value), where)
    else:
        raise ValueError(f"{file}: expected a list of prompts or an object, got {shown(repr(content), 60)}")


def _with_tags(record: dict[str, Any]) -> dict[str, str]:
    """kohya's trainer shows caption and tags together, with a comma between."""
    both = [record.get(key) for key in ("caption", "tags")]
    return {"caption": ", ".join(both)} if all(isinstance(text, str) and text for text in both) else {}


def _read_csv(path: Path, file: str, dropped: Dropped) -> Iterator[Record]:
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    try:
        text_key(rows.fieldnames or [], f"{file}, first line")
        for row in rows:
            where = f"{file}, line {rows.line_num}"
            beyond = row.pop(None, None)  # type: ignore[call-overload]  # DictReader's name for what has no column
            if beyond:
                dropped.add("field(s) beyond the header's: put quotes around prompts with commas", where, len(beyond))
            yield where, row
    except csv.Error as error:
        raise ValueError(f"{file}: not a readable CSV file: line {rows.line_num}: {error}") from None


# -- Parquet -----------------------------------------------------------------------------------------------------


def parquet_columns(path: Path, setting: str) -> list[str]:
    with open_parquet(path, setting) as file:
        return file.schema_arrow.names


@contextmanager
def open_parquet(path: Path, setting: str, columns: tuple[str, ...] = ()) -> Iterator[Any]:
    """A ``pyarrow.parquet.ParquetFile``. Whatever goes wrong with it in the block is a ValueError that names the file.

    columns: those that will be read. Their texts and bytes arrive as dictionaries, each different value once, as they
    are in the file: 300 kB can stand for 9 GB otherwise.
    """
    with reading(path, "a Parquet file"):
        parquet = _import_pyarrow(f"{setting}: {shown(path)}")
        require_file(path)
        with parquet.ParquetFile(path) as file:
            if file.metadata.num_rows > ROW_LIMIT:
                raise ValueError(f"it has {file.metadata.num_rows:,} rows, more than {ROW_LIMIT:,}: split it")
            leaves = [name for name in _leaves(file) if name.split(".")[0] in columns]
            if not leaves:
                yield file
                return
        with parquet.ParquetFile(path, read_dictionary=leaves) as file:
            yield file


def _import_pyarrow(where: str):
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{where}: parquet files are read with pyarrow: pip install pyarrow") from None
    return pyarrow.parquet


def _leaves(file: Any) -> list[str]:
    """The paths of the columns of bytes and texts, if they fit into one dictionary."""
    if max((group_bytes(file, group) for group in range(file.num_row_groups)), default=0) >= 1 << 31:
        return []
    columns = (file.metadata.schema.column(number) for number in range(len(file.metadata.schema)))
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def group_bytes(file: Any, group: int) -> int:
    """Bytes of a row group, no longer compressed.

    Not those of one column: where a column's statistics contradict its schema, pyarrow (26) ends the whole process when
    it is asked about the column.
    """
    return file.metadata.row_group(group).total_byte_size


def read_texts(path: Path, setting: str, dropped: Dropped) -> Iterator[Record]:
    """The prompts of a Parquet file, as records of one key."""
    file_name = f"{setting}: {shown(path)}"
    key = text_key(parquet_columns(path, setting), file_name)
    with open_parquet(path, setting, (key,)) as file:
        for group in range(file.num_row_groups):
            if (size := group_bytes(file, group)) > GROUP_LIMIT:
                raise ValueError(f"{size:,} bytes are in one row group: write it in smaller ones")
        row = 0
        for batch in file.iter_batches(BATCH_ROWS, columns=[key]):
            for value in _short_texts(batch.column(0)):
                yield f"{file_name}, row {row}", {key: value}
                row += 1


def _short_texts(array: Any) -> list[Any]:
    """The values of an array of texts, or of lists of them, unless they would fill the memory."""
    import pyarrow
    import pyarrow.compute

    texts = array
    while pyarrow.types.is_list(texts.type) or pyarrow.types.is_large_list(texts.type):
        texts = texts.flatten()
    values = texts.dictionary if pyarrow.types.is_dictionary(texts.type) else texts
    longest = 0
    if len(values) and not (pyarrow.types.is_null(values.type) or pyarrow.types.is_primitive(values.type)):
        longest = pyarrow.compute.max(pyarrow.compute.binary_length(values)).as_py() or 0
    if longest > CAPTION_LIMIT or longest * len(texts) > BATCH_LIMIT:
        raise ValueError(f"expected texts of at most {CAPTION_LIMIT:,} bytes, got one of {longest:,}")
    return array.to_pylist()
