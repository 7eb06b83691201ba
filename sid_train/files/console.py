"""Output to a terminal or a pipe that may go away while a run goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def discard(stream: Any) -> None:
    """Sends what is written to the file of ``stream`` nowhere, also what is buffered: Python would fail again to write
    that when it ends.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


class _Stream:
    """A stream that nobody may read any more: from the first failure on, what is written goes nowhere."""

    def __init__(self, stream: Any):
        # There is none where a daemon was started with closed streams.
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:  # a closed pipe, a lost terminal, a full disk under a redirection
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        with suppress(OSError, ValueError):  # it may have no file
            discard(self._stream)
        self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def unbreakable_output() -> Iterator[None]:
    """Inside, a print never fails: reporting must not cost a run."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Stream(sys.stdout), _Stream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
