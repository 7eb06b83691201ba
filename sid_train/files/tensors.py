"""Safetensors files larger than memory: tensors that are read, changed and written one after another."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .atomic import replacing
from .hashing import rest_sha256
from .header import read_header
from .reading import reading, shown

# The types that weights are stored in, by the names that the command line takes.
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}
# All types, by their names in a safetensors header.
HEADER_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in HEADER_DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is not in memory: ``load`` makes it, of this shape and type.

    source: for people, the file and the name that it has there; empty where it is made from no file
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    source: str = ""

    @classmethod
    def of(cls, tensor: Tensor, source: str = "") -> LazyTensor:
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor, source)

    def map(self, change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """What ``change`` makes of it; its shape and type are found out on the meta device, without data."""
        result = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return LazyTensor(tuple(result.shape), result.dtype, lambda: change(self.load()), self.source)

    def to(self, dtype: torch.dtype) -> LazyTensor:
        return self if dtype == self.dtype else self.map(lambda tensor: tensor.to(dtype))

    def load_finite(self) -> Tensor:
        """``load``, but ValueError for NaN and infinite values: one pass over the tensor, about a second for all of
        SDXL.
        """
        tensor = self.load()
        if bad := _not_finite(tensor):
            raise ValueError(
                f"{self.source or 'a tensor'}: expected finite numbers, but {bad:,} of {tensor.numel():,} are NaN or "
                "infinite: the file was damaged, or saved from a model that had diverged; use another copy of it"
            )
        return tensor

    def narrowed(self, dtype: torch.dtype) -> LazyTensor:
        """As ``to``, for files: when it is loaded, ValueError for what is not finite, and for what ``dtype`` cannot
        hold.
        """

        def load() -> Tensor:
            tensor = self.load_finite()
            cast = tensor.to(dtype)
            if _not_finite(cast):
                largest = float(tensor.abs().max())
                kind = next(name for name, known in DTYPES.items() if known == dtype)
                raise ValueError(
                    f"{self.source or 'a tensor'}: expected values that {kind} can hold, up to "
                    f"{torch.finfo(dtype).max:g}, got {largest:g}: use --dtype bf16 or fp32"
                )
            return cast

        return LazyTensor(self.shape, dtype, load, self.source)


def _not_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not tensor.is_floating_point():
        return 0
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # PyTorch asks no fp8 tensor
    return 0 if (finite := wide.isfinite()).all() else int(finite.logical_not().sum())


def open_tensors(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a safetensors file by name, none of them read. ValueError for what is no such file, and for one
    with a type that PyTorch does not compute in.
    """
    header = read_header(path)
    for name, tensor in header.tensors.items():
        if tensor.dtype not in HEADER_DTYPES:
            raise ValueError(
                f"{shown(path)}: tensor {shown(name, 80)}: expected one of the types {', '.join(HEADER_DTYPES)}, got "
                f"{tensor.dtype}"
            )
    with reading(path, "a safetensors file"):
        file = safe_open(path, framework="pt")

    def load(name: str) -> Tensor:
        with reading(path, "a safetensors file"):
            return file.get_tensor(name)

    return {
        name: LazyTensor(
            tensor.shape, HEADER_DTYPES[tensor.dtype], partial(load, name), f"{shown(path)}: tensor {shown(name, 120)}"
        )
        for name, tensor in ((name, header.tensors[name]) for name in file.keys())  # noqa: SIM118  # not a dict
    }


HASH_KEY = "modelspec.hash_sha256"  # of everything after the header, as the model metadata standard defines it
CHECKSUM_KEY = "sid_train.sha256"  # of the header too, this value taken as NO_HASH: for what nobody else reads
NO_HASH = "0x" + "0" * 64


class DamagedFile(ValueError):
    """A file that is not what was written."""


def write_tensors(
    path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], checksum: bool = False
) -> None:
    """Writes a safetensors file with one tensor in memory at a time; the same input gives the same bytes.

    The hash of the data is put into the metadata; with ``checksum`` instead that of the whole file, which ``verify``
    checks.
    """
    key = CHECKSUM_KEY if checksum else HASH_KEY
    facts = {"format": "pt", key: NO_HASH} | dict(metadata)
    header: dict[str, object] = {"__metadata__": dict(sorted(facts.items()))}
    offset = 0
    # The widest types first, as the format's own writer does, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.dtype.itemsize * torch.Size(tensor.shape).numel()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        digest = hashlib.sha256(text if checksum else b"")
        for name in names:
            data = tensors[name].load().detach().cpu().contiguous()
            assert (tuple(data.shape), data.dtype) == (tensors[name].shape, tensors[name].dtype), name
            content = data.reshape(-1).view(torch.uint8).numpy().data
            file.write(content)
            digest.update(content)
        file.seek(8)
        file.write(text.replace(_entry(key, NO_HASH), _entry(key, f"0x{digest.hexdigest()}"), 1))


def _entry(key: str, value: str) -> bytes:
    """A fact as it stands in a header that ``write_tensors`` wrote."""
    return f'"{key}":"{value}"'.encode()


def verify(path: Path) -> bool:
    """Reads a file that ``write_tensors`` wrote and compares its hash with the one in its header: about a second a
    gigabyte, less where the disk is slower. False where it carries none; DamagedFile where it is another or the file
    is not whole.
    """
    try:
        with reading(path, "a whole safetensors file"):
            return _verify(path)
    except DamagedFile:
        raise
    except ValueError as error:  # also of a disk that cannot read it
        raise DamagedFile(str(error)) from None


def _verify(path: Path) -> bool:
    metadata = read_header(path).metadata
    key = CHECKSUM_KEY if CHECKSUM_KEY in metadata else HASH_KEY
    if key not in metadata:
        return False
    with open(path, "rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        text = file.read(size)
        signed = text.replace(_entry(key, metadata[key]), _entry(key, NO_HASH), 1)
        found = rest_sha256(file, signed if key == CHECKSUM_KEY else b"")
    if metadata[key] != f"0x{found}":
        raise DamagedFile(f"{shown(path)}: the file is damaged: its content has another SHA-256 than it says")
    return True
