"""One process at a time in a folder."""

from __future__ import annotations

import errno
from pathlib import Path

from filelock import FileLock, Timeout


def lock_folder(path: Path, who: str) -> FileLock:
    """A lock on a folder that is there, held until it is released or the process ends. ValueError while another process
    holds it; ``who`` says what that does.
    """
    lock = FileLock(path / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{path}: {who}: wait until it ends, or choose another --out") from None
    except NotImplementedError:  # a file system without locks: nobody can hold one there
        pass
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise ValueError(f"{path}: cannot be written into ({error.strerror}): choose another --out") from None
    return lock
