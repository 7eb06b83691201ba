"""Writing files and folders that are either whole and on the disk, or not there."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HOST = re.sub(r"[^\w-]", "-", socket.gethostname())[:40] or "host"
_LEFTOVER = re.compile(r"\.(?P<host>[\w-]+)\.(?P<pid>\d+)\.[0-9a-f]{8}\.tmp$")
_OLD_LEFTOVER = re.compile(r"^\.(.+\.)?\d+\.tmp$")  # as earlier versions named them
_LOCKED_FOR = 5.0
"""Seconds to wait for a file that a virus scanner or a viewer has open, on Windows."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place on success, when it is on the disk, and vanishes on
    failure.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        os.chmod(temporary, 0o666 & ~_umask())  # safetensors writes files that only their owner can read
        _sync(temporary)
        _patiently(lambda: os.replace(temporary, path))
        sync_folder(path.parent)
    except OSError as error:
        if error.filename is None:  # such as a full disk, which tells the writer, not the user, what was written
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """As ``replacing``, for a new folder: it exists and is empty inside the block. A folder at ``path`` is removed when
    the new one has its name and is on the disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        put_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_folder(temporary: Path, path: Path) -> None:
    """Gives a folder that was written the name ``path`` when everything in it is on the disk."""
    for folder, _, files in os.walk(temporary):
        for name in files:
            _sync(Path(folder, name))
        sync_folder(Path(folder))
    old = path.with_name(f"{path.name}.replaced")  # no leftover to remove: for a moment it is all there is
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        _patiently(lambda: os.rename(temporary, path))
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed left half written in ``folder``. To be called by whoever holds the lock
    of the folder: only what has no lock, such as an export, may be writing into it.
    """
    for path in folder.glob(".*.tmp"):
        made = _LEFTOVER.search(path.name)
        # An export into the folder may be under way, which holds no lock.
        if made and made["host"] == _HOST and _is_another(int(made["pid"])):
            continue
        if made or _OLD_LEFTOVER.search(path.name):
            _remove(path)


def temporary_path(path: Path) -> Path:
    """A name that no other process takes, be it in another container with the same process numbers. What earlier
    processes of this machine left half written for the same path is removed.
    """
    for old in path.parent.glob(f".{_escaped(path.name)}.*.tmp"):
        made = _LEFTOVER.search(old.name)
        if made and made["host"] == _HOST and not _is_alive(int(made["pid"])):
            _remove(old)
    return path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.{secrets.randbelow(10**8):08d}.tmp")


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_another(pid: int) -> bool:
    """Whether it is a process that runs, and not this one."""
    return pid != os.getpid() and _is_alive(pid)


def _is_alive(pid: int) -> bool:
    if sys.platform == "win32":  # os.kill would end it; a file that is being written cannot be removed there
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on the disk."""
    if sys.platform == "win32":  # its folders cannot be opened
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:
        pass  # a file system that knows no such thing, such as some network mounts
    finally:
        os.close(folder)


def _patiently(act: Callable[[], None]) -> None:
    """Windows refuses to replace a file that somebody reads; most let go of it in a moment."""
    until = time.monotonic() + (_LOCKED_FOR if sys.platform == "win32" else 0)
    while True:
        try:
            return act()
        except PermissionError:
            if time.monotonic() >= until:
                raise
            time.sleep(0.1)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
