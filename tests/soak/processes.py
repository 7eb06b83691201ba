"""``sid_train`` in processes of its own that can be killed at a file operation.

They are forked from this one, which has imported the command line but computed nothing (``common.prepare``). So a
command starts in a hundredth of a second, and still is a process: it gets SIGKILL and leaves what a killed process
leaves.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")
"""Of ``sys.audit``."""


@dataclass
class Child:
    """A command in a process of its own. ``events`` gets a byte for each file operation below its folder."""

    pid: int
    log: Path
    events: int
    code: int | None = None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def seen(self, seconds: float) -> int:
        """How many file operations were begun in this time, at most; 0 also when it ended."""
        ready, _, _ = select.select([self.events], [], [], max(0.0, seconds))
        return len(os.read(self.events, 1)) if ready else 0

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                os.close(self.events)
        return self.code is not None

    def wait(self, seconds: float = 600) -> int:
        """Its exit code; it is killed, and said to have hung, after this time."""
        end = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"{self.log}: not ended after {seconds:.0f} s")
            time.sleep(0.005)
        return self.code or 0

    def kill(self, number: int = signal.SIGKILL) -> None:
        if not self.ended():
            os.kill(self.pid, number)
            if number == signal.SIGKILL:
                self.wait()


def start(arguments: list, log: Path, watched: Path, die_at: int = 0) -> Child:
    """``python -m sid_train`` with ``arguments``. ``die_at``: it gets SIGKILL before that file operation in
    ``watched`` (a folder), counted from 1.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(pid, log, reader)
    code = 1
    try:
        os.close(reader)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.stdout.reconfigure(line_buffering=True)  # what was printed is known even of a process that was killed
        sys.argv = ["sid_train", *map(str, arguments)]
        _watch(str(watched), writer, die_at)
        code = sys.modules["sid_train.cli"].main([str(a) for a in arguments])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _watch(folder: str, writer: int, die_at: int) -> None:
    """Tells of every operation that changes a file below ``folder``, and dies before one of them."""
    count = 0
    os.set_blocking(writer, False)

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in FILE_EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if not os.fsdecode(arguments[0]).startswith(folder):
            return
        if event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        count += 1
        if count == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with contextlib.suppress(OSError):
            os.write(writer, b".")

    sys.addaudithook(hook)


@dataclass
class Ended:
    """A command that ended: its code, what it printed, its seconds and file operations."""

    code: int
    output: str
    seconds: float
    operations: int


def run(arguments: list, log: Path, watched: Path, seconds: float = 600) -> Ended:
    begun, count = time.monotonic(), 0
    child = start(arguments, log, watched)
    while not child.ended() and time.monotonic() < begun + seconds:
        count += child.seen(0.02)
    code = child.wait(max(0.0, begun + seconds - time.monotonic()))
    return Ended(code, child.output(), time.monotonic() - begun, count)
