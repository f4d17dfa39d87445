"""Files that are whole or not there, and that one run at a time writes.

A file is written to a temporary name beside its target, synced, and renamed over it: a crash at any
moment leaves the old file or the new one. The lock of a long write is a file of its own beside the
target, held by the operating system (`filelock`), so it ends with the process that holds it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import FileRefused

PARTIAL = ".partial"  # ending of a file that is not finished yet
log = logging.getLogger("nibble")
# some network drives have no locks
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def replace(path: Path, content: bytes) -> None:
    """Writes a file, all of it or nothing. Raises OSError; the path is then as it was."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write(path: Path, content: bytes) -> None:
    """`replace` that raises FileRefused in words."""
    try:
        replace(path, content)
    except OSError as error:
        raise refusal(path, error) from error


def refusal(path: Path, error: OSError) -> FileRefused:
    """Why a file could not be written, and what to do."""
    return FileRefused(
        f"{path.name} could not be written ({error.strerror}); check the disk or choose another"
        " folder."
    )


@contextlib.contextmanager
def exclusive(target: Path) -> Iterator[None]:
    """Held by one run at a time, in this process or any other; leaves nothing behind. Raises
    FileRefused where another run holds it, and OSError where its file cannot be made.
    """
    path = target.with_name(f"{target.name}{PARTIAL}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileRefused(
            f"{target.name} is being written by another run; wait for it or choose another name."
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise
        log.warning(
            "this drive cannot lock files (%s): do not write one target from two programs", error
        )
    try:
        yield
    finally:
        if os.name != "nt":  # Windows' lock removes its own file, and no file that is open
            path.unlink(missing_ok=True)
        lock.release()
