"""Headers of safetensors files that other tools, broken downloads and attackers make."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from sid_train.files.header import HEADER_LIMIT, read_header, read_safetensors_metadata


def file_with(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(start=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def test_what_the_library_wrote(path):
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.float8_e4m3fn)}, path, {"key": "a cat, 猫"})
    header = read_header(path)
    assert header.metadata == {"key": "a cat, 猫"}
    assert {name: (t.dtype, t.shape) for name, t in header.tensors.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("F8_E4M3", (5,)),
    }


def test_null_metadata_is_none(path):
    assert read_safetensors_metadata(file_with(path, {"__metadata__": None, "a": tensor()}, bytes(8))) == {}


DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize(
    ("header", "data", "problem"),
    [
        (DEEP, b"", "nested too deeply"),
        ({"__metadata__": [[1, 2]]}, b"", "no JSON object"),
        ({"__metadata__": {"ss_epoch": 3}}, b"", "ss_epoch.*load and save it"),
        ({"a": tensor()}, bytes(16), "8 bytes follow its last tensor"),
        ({"a": tensor()}, bytes(7), "copy or download it again"),
        ({"a": tensor(shape=(3,))}, bytes(8), "do not fill"),
        ({"a": tensor(dtype="Q7")}, bytes(8), "unknown type"),
        ({"a": tensor(dtype=[])}, bytes(8), "unknown type"),
        ({"a": tensor(shape=("2",))}, bytes(8), "no sizes"),
        ({"a": tensor(start=-8, end=0)}, bytes(8), "no sizes"),
        ({"a": tensor(4, 12)}, bytes(12), "begins at 4, where 0"),
        ({"a": tensor(), "b": tensor()}, bytes(8), "begins at 0, where 8"),
        ({"a": 3}, b"", "expected dtype"),
        ({"a": tensor(end=float("inf"))}, b"", "no sizes"),
    ],
)
def test_a_broken_header_is_one_line_that_names_the_file(header, data, problem, path):
    with pytest.raises(ValueError, match=problem) as error:
        read_header(file_with(path, header, data))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"PK\x03\x04\x14\x00\x08\x08" + bytes(60), "pickle or an archive"),
        (b"\x80\x02}q\x00(X\x05" + bytes(60), "pickle or an archive"),
        (
            struct.pack("<Q", HEADER_LIMIT + 1),
            "header is said to have 25,000,001 bytes, more than the 25,000,000 that are read: save",
        ),
    ],
)
def test_other_files_are_called_what_they_are(content, problem, path):
    path.write_bytes(content)
    with pytest.raises(ValueError, match=problem) as error:
        read_header(path)
    assert str(path) in str(error.value)
