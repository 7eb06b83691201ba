"""What strangers' files and prompts hold instead of what belongs there."""

from __future__ import annotations

from typing import Any

DEEP, HUGE, DIGITS = "@@deep@@", "@@1e999@@", "@@digits@@"
"""Stand in a JSON tree for what Python's writer cannot write."""

TEXTS = [
    "", "a", "nan", "-1", "\x00", "\x1b[31mred", "<img src=x onerror=alert(1)>", "A" * 100_000, "../../../etc/passwd",
    "//host/share/x", "/dev/zero", "C:\\x", "e\u0301", "\u2028", "\ud83d", "1" * 5000, "x{0..99999999999}.tar",
    "/" * 9999, "hf:a/b", "U16", "F8_E4M3", "F4", "v_prediction", "flow", "true", "%s%n{0}", "\n\r\t", "demo",
]  # fmt: skip
NUMBERS = [
    0, -1, 1, 2, 255, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 1e308, -1e308, 5e-324, 0.5,
    float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
SHAPES = [
    None, True, False, [], {}, [[]], [None], {"a": None}, ["a"] * 1000, [2**40, 2**40], [-1], [0], DEEP, HUGE, DIGITS,
]  # fmt: skip

OTHER_KINDS = [
    b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n", b"<!DOCTYPE html><html>404</html>",
    b"PK\x03\x04" + bytes(60), b"\x80\x04\x95" + bytes(60), b"\xff\xfe" + "a cat".encode("utf-16-le"), bytes(4096),
    b"\xef\xbb\xbf", b"GIF89a\xff\xff\xff\xff\0\0\0;", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    b"BM" + bytes(200), b"II*\x00" + b"\xff" * 64, b'{"a": 1}', b"[[[[", b"\x1f\x8b\x08" + bytes(30), b"PAR1PAR1",
]  # fmt: skip
"""Whole files."""

LINES = [
    b"", b"\x00", b"\xff\xfe", b"\xed\xa0\x80", "\u2028".encode(), b"\x0c", b"\x85", b'"', b'"""', b"'", b",,,,,,",
    b"A" * 200_000, b"\r", b"\r\n\r\n", b"\x1b[2J", b"null", b"[]", b"{}", b'{"prompt": null}', b'{"prompt": ["a"]}',
    b'{"prompt": "\\ud83d"}', b"\xef\xbb\xbf", b"a\tb", b"[" * 50_000, b'{"file_name": "../x.png", "text": "a"}',
    b'{"file_name": "/dev/zero", "text": "a"}', b'{"file_name": "", "text": "a"}',
    b'{"file_name": "\\u0000", "text": "a"}', b'{"file_name": "a.png", "text": "a"}',
]  # fmt: skip
TOML = [
    "[" * 20_000, "inf", "-nan", "1979-05-27", '"\\u0000"', "9" * 5000, "{a = 1}", "[[[]]]", '"""', "0x1", "1e400",
    '"' + "A" * 100_000 + '"', "[1, 'a']", "''", '"\\ud800"', "1_000", "-0", "{a = " * 2000, '"/dev/zero"', "true",
    '"\\u001b[31m"',
]  # fmt: skip
NAMES = [
    "x.txt", "y.png", "\x1b[31m.txt", "a\nb.txt", "é.txt", "z.TXT", ".hidden.txt", "n" * 200 + ".txt", "w.jpg",
    "v.json",
]  # fmt: skip
"""Of files that are added to a folder."""

VALUES: list[Any] = [
    *TEXTS, *NUMBERS, None, True, False, [], {}, [[]], {"a": 1}, [1], ["1"], ["1", -1], ["1", 99], ["1", "x"],
    ["1", None], ["99", 0], [None, 0], ["1", 0, 0], [1, 0], "/" * 100_000, "a/" * 50_000, "x{0..99999999999}.tar",
    "{0..9}" * 40, "x{00000..99999}{0..99999}.tar", "{1..0}", "\\\\host\\share\\a.txt", "//host/share", "../" * 50,
    "file:///etc/passwd", "a" * 5_000_000, "a\n" * 200_000, "hf:" + "a" * 9999, "\x00.txt", "~/x", "CON", "nul.txt",
    "a:b", "name/../../x", "..", ".", "9 8 7 6 5 4 3 2 1", "1e3", "999 " * 9999, "625, 468", "1_000", "٣", "9" * 5000,
    "/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc", "keep", "nag", "<script>alert(1)</script>", "\x1b]0;x\x07",
    "$(id)", "`id`", "%n", "' ; rm -rf x ; '",
]  # fmt: skip
"""Inputs of nodes."""
