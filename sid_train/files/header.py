"""The header of a safetensors file: what is in it, without reading a tensor."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .reading import other_kind, reading, require_file, shown

HEADER_LIMIT = 25_000_000
"""Bytes. The format allows four times as much, but that takes gigabytes to parse, and SDXL's own takes 0.4 MB."""
BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}
"""Of an element, by the names of the format's types."""


@dataclass(frozen=True)
class TensorHeader:
    """One tensor: the name of its type, its shape, and where its bytes are in the data."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    metadata: dict[str, str]
    tensors: dict[str, TensorHeader]


def read_header(path: str | Path) -> Header:
    """The header of a safetensors file. ValueError for a file of another kind, one that ends before its last tensor or
    goes on after it, and one that the format's own reader would refuse.
    """
    with reading(path, "a safetensors file"):
        found = require_file(path)
        with open(path, "rb") as file:
            first = file.read(8)
            if len(first) < 8:
                raise ValueError(f"it has {found} bytes: copy or download it again")
            (size,) = struct.unpack("<Q", first)
            if size > HEADER_LIMIT:
                raise ValueError(
                    other_kind(first + file.read(42))
                    or f"its header is said to have {size:,} bytes, more than the {HEADER_LIMIT:,} that are read: save "
                    "it again without its metadata"
                )
            text = file.read(size)
        if len(text) < size:
            raise _cut_off(path, 8 + size, found)
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        metadata = _metadata(header.pop("__metadata__", None))
        tensors = {name: _tensor(name, fields) for name, fields in header.items()}
        end = 0
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            if tensor.start != end:
                raise ValueError(f"tensor {shown(name, 80)} begins at {tensor.start:,}, where {end:,} was expected")
            end = tensor.end
        if found < 8 + size + end:
            raise _cut_off(path, 8 + size + end, found)
        if found > 8 + size + end:
            raise ValueError(
                f"{found - 8 - size - end:,} bytes follow its last tensor, which no reader of the format accepts: "
                "copy or download it again"
            )
        return Header(metadata, tensors)


def read_safetensors_metadata(path: str | Path) -> dict[str, str]:
    """The ``__metadata__`` of a safetensors file (see ``read_header``)."""
    return read_header(path).metadata


def _cut_off(path: str | Path, expected: int, found: int) -> ValueError:
    return ValueError(
        f"{shown(path)}: expected {expected:,} bytes, but the file ends after {found:,}: copy or download it again"
    )


def _metadata(value: Any) -> dict[str, str]:
    if value is None:  # some tools write null, and ComfyUI reads it
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"__metadata__ is no JSON object, but {shown(value, 60)}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise ValueError(
                f"metadata {shown(key, 80)}: expected text, got {shown(text, 60)}: the format's own reader refuses "
                "the file, too; load and save it with the tool that made it"
            )
    return value


def _tensor(name: str, fields: Any) -> TensorHeader:
    where = f"tensor {shown(name, 80)}"
    if not isinstance(fields, dict) or not {"dtype", "shape", "data_offsets"} <= fields.keys():
        raise ValueError(f"{where}: expected dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{where}: unknown type {shown(dtype, 60)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{where}: shape or data_offsets are no sizes")
    start, end = offsets
    if start > end or 8 * (end - start) != math.prod(shape) * BITS[dtype]:
        raise ValueError(f"{where}: its shape and type do not fill its {end - start:,} bytes")
    return TensorHeader(dtype, tuple(shape), start, end)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
