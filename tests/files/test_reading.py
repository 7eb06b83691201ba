"""The boundary of every reader."""

import json
import os
import sys

import pytest

from sid_train.files.reading import read_bytes, read_json, read_text, reading, require_file, shown


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes among files")
def test_pipes_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name, kind in (("pipe.txt", "pipe"), ("zero.txt", "device"), (".", "folder")):
        with pytest.raises(ValueError, match=f"expected a regular file, got a {kind}"):
            require_file(tmp_path / name)


def test_a_link_to_a_file_is_that_file(tmp_path):
    (tmp_path / "a").write_text("12345")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert require_file(tmp_path / "b") == 5


def test_bounds(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(ValueError, match=r"a\.txt: expected at most 4 bytes, got 5"):
        read_text(path, 4)


def test_a_byte_order_mark_is_no_text_and_other_encodings_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "é"}, ensure_ascii=False).encode())
    assert read_json(path) == {"a": "é"}
    path.write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.json: expected UTF-8 text, but byte 7"):
        read_json(path)


@pytest.mark.parametrize(
    "error", [KeyError("x"), RecursionError(), MemoryError(), AttributeError("a\nb"), ValueError("bad")]
)
def test_any_error_names_the_file_in_one_line(error):
    expected = r"^some/file: expected a model, but it cannot be read: "
    with pytest.raises(ValueError, match=expected) as caught, reading("some/file", "a model"):
        raise error
    assert "\n" not in str(caught.value)


def test_an_error_that_names_the_file_stays(tmp_path):
    with pytest.raises(FileNotFoundError), reading(tmp_path / "none", "a model"):
        open(tmp_path / "none")  # noqa: SIM115
    with pytest.raises(ValueError, match=r"^some/file: twice$"), reading("some/file", "a model"):
        raise ValueError("some/file: twice")


def test_what_cannot_be_printed_is_escaped_and_what_is_long_is_cut():
    assert shown("a\x1b[31m\x7f\u2028b\ud83d猫") == "a\\x1b[31m\\x7f\\u2028b\\ud83d猫"
    assert shown("x" * 1000, 10) == "xxxxxxxxxx ... (1,000 characters)"
