"""Files that are whole or not there, and that one run at a time writes.

A file is written to a temporary name beside its target, synced, and renamed over it: a crash at any
moment leaves the old file or the new one. The lock of a job is a file of its own beside the target,
held by the operating system (`filelock`), so it ends with the process that holds it. Whoever writes
a target holds its lock from before it looks at what is there; temporary names are the holder's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import DiskRefused, TargetBusy

PARTIAL = ".partial"  # ending of a file that is not finished yet
JOURNAL = ".journal"  # behind it: what of an unfinished file is done (writer.py)
NEW = ".new"  # behind that: a journal that is being written anew
log = logging.getLogger("nibble")
# some network drives have no locks
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM)
_TRIES = 100  # of a lock whose file its last holder removed meanwhile
_ours: set[Path] = set()  # lock files that this process holds


class Held:
    """A target whose lock is held: stands for its path wherever one is taken, and whoever would
    lock it goes on under that lock. Made by `exclusive` alone.
    """

    def __init__(self, path: Path):
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def replace(path: Path, content: bytes) -> None:
    """Writes a file, all of it or nothing. Raises OSError; the path is then as it was."""
    partial = path.with_name(path.name + PARTIAL)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # Stop, too
        partial.unlink(missing_ok=True)
        raise


def write(path: Path, content: bytes) -> None:
    """`replace` that raises FileRefused in words."""
    try:
        replace(path, content)
    except OSError as error:
        raise refusal(path, error, len(content)) from error


def reserve(path: Path, size: int) -> None:
    """Refuses a file, or what a run will write beside it, of `size` bytes that the disk or a quota
    has no room for: the room is taken and given back. Call under the lock of `path`. Raises
    FileRefused.
    """
    probe = path.with_name(path.name + PARTIAL)
    try:
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with open(probe, "wb") as file:
            if hasattr(os, "posix_fallocate") and size:
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        raise refusal(path, error, size) from error
    finally:
        probe.unlink(missing_ok=True)


def refusal(path: Path, error: OSError, size: int = 0) -> DiskRefused:
    """Why a file could not be written, and what to do. size: bytes that it needs, or 0."""
    folder = path.parent
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free
        need = f" needs {size / 1e9:.2f} GB" if size else " does not fit"
        return DiskRefused(
            f"The disk of {folder} is full: {path.name}{need} and {free / 1e9:.2f} GB are free;"
            " free some space or choose another folder."
        )
    # Windows replaces no file that is mapped into memory, as a loaded model's is
    if error.errno in _NOT_ALLOWED and path.exists() and os.access(folder, os.W_OK):
        return DiskRefused(
            f"{path.name} may not be replaced ({error.strerror}): it is in use, or not yours to"
            " change; unload the model that was loaded from it, or choose another name."
        )
    if error.errno in (*_NOT_ALLOWED, errno.EROFS):
        return DiskRefused(
            f"The folder {folder} is read-only; choose another one or change its permissions."
        )
    return DiskRefused(
        f"{path.name} could not be written ({error.strerror}); check the disk or choose another"
        " folder."
    )


@contextlib.contextmanager
def exclusive(target: str | os.PathLike) -> Iterator[Held]:
    """Held by one run at a time, in this process or any other, over the whole of a job that ends in
    `target`, a file or a folder; a `Held` target is held already.

    Leaves no lock behind, nor anything of an unfinished file that no run can go on from. Raises
    TargetBusy where another run holds it, FileRefused where its file cannot be made.
    """
    if isinstance(target, Held):
        yield target
        return
    target = Path(target)
    path = _lock_of(target)
    try:
        lock = _acquired(path, target.name)
    except OSError as error:
        raise refusal(target, error) from error
    _ours.add(path)
    try:
        yield Held(target)
    finally:
        _sweep(target)
        _ours.discard(path)
        if os.name != "nt":  # Windows' lock removes its own file, and no file that is open
            path.unlink(missing_ok=True)
        lock.release()


def _lock_of(target: Path) -> Path:
    return Path(os.path.abspath(target.with_name(f"{target.name}{PARTIAL}.lock")))


def held_since(target: Path) -> float | None:
    """When the run that holds a target's lock took it, in seconds since 1970; None where none does.
    Takes nothing away.
    """
    path = _lock_of(target)
    try:
        since = os.stat(path).st_mtime
        with FileLock(path).acquire(timeout=0):
            return None
    except FileNotFoundError:
        return None
    except Timeout:
        _touch(path, since)
        return since
    except (OSError, NotImplementedError):  # a drive without locks, or somebody else's file
        return None


def _acquired(path: Path, name: str) -> FileLock:
    """A lock of the file that goes by this name now: one that its last holder removed between our
    opening and our locking it excludes nobody.
    """
    for _ in range(_TRIES):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        lock, before = FileLock(path), _file_number(path)
        since = _changed(path)
        try:
            lock.acquire(timeout=0)
            _touch(path, time.time())  # tells others since when it is held
        except Timeout:
            _touch(path, since)
            break
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
                raise
            log.warning(
                "this drive cannot lock files (%s): do not write one target from two programs",
                error,
            )
            return lock
        if os.name == "nt" or (before is not None and _file_number(path) == before):
            return lock
        lock.release()
    whose = "this" if path in _ours else "another"
    raise TargetBusy(
        f"{name} is being written by another run (of {whose} program, since"
        f" {time.strftime('%H:%M', time.localtime(since))}); wait for it or choose another name."
    )


def _changed(path: Path) -> float:
    """Modification time of a file, in seconds since 1970; of one that has gone: now."""
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return time.time()


def _touch(path: Path, when: float) -> None:
    """Sets the time of a lock's file, which trying to lock it changes; not of one that has gone
    or is another user's.
    """
    with contextlib.suppress(OSError):
        os.utime(path, (when, when))


def _file_number(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


def _sweep(target: Path) -> None:
    """Removes what a kill leaves and no run can use: a partial file without its journal, a journal
    without its file (killed after the renaming), a journal half rewritten.
    """
    partial = target.with_name(target.name + PARTIAL)
    journal = partial.with_name(partial.name + JOURNAL)
    journal.with_name(journal.name + NEW).unlink(missing_ok=True)
    if not (partial.exists() and journal.exists()):
        partial.unlink(missing_ok=True)
        journal.unlink(missing_ok=True)
