"""What a file is, whatever it is called."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hex. OSError where it cannot be read."""
    with open(path, "rb") as file:
        return rest_sha256(file)


def rest_sha256(file: BinaryIO, before: bytes = b"") -> str:
    """SHA-256 of ``before`` and of what ``file`` still holds, hex."""
    digest = hashlib.sha256(before)
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
