"""Writing a quantized model layer by layer, so that nothing is ever half done: atomic, resumable,
exclusive.

Shapes are known before the work starts, so the whole file is laid out first: `<target>.partial`
gets its final size at once (a full disk is found now, not in an hour) and each layer's tensors go
to their final places. `<target>.partial.journal` has one line per finished layer, with the
checksums of its tensors and its report; after a crash the finished layers are checked against it
and only the others are done again. At the end the header is written, the file synced and renamed
over the target. Bytes depend on contents alone, never on time or order of the work, so an
interrupted run ends in the same file as an uninterrupted one. A failure that would come again
takes what is unfinished with it (`comes_again`).
"""

import contextlib
import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from . import atomic
from .errors import DiskRefused, FileRefused
from .integrity import seal
from .safetensors import DTYPE_NAMES, TensorSpec, checksum, read_header, tensor_bytes

log = logging.getLogger("nibble")


def check_path(
    source: str | os.PathLike | None, target: str | os.PathLike, kind: str = "nibble"
) -> None:
    """Refuses a target that is the source (by whatever name), or in a place that cannot be
    written; opens nothing.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise FileRefused(
            f"{target.name} does not end in .safetensors, so ComfyUI would not list it; add the"
            " ending."
        )
    if target.is_dir():
        raise FileRefused(f"{target.name} is a folder; choose another name.")
    if not target.parent.is_dir():
        raise FileRefused(
            f"The folder {target.parent} does not exist; create it or choose another one."
        )
    same = source is not None and os.path.realpath(source) == os.path.realpath(target)
    if same or (source is not None and target.exists() and os.path.samefile(source, target)):
        raise FileRefused(
            f"{target.name} is the file that would be read; choose another name for the"
            f" {'4-bit file' if kind == 'nibble' else 'new file'}."
        )


def check_target(
    source: str | os.PathLike | None, target: str | os.PathLike, kind: str = "nibble"
) -> None:
    """The same, and refuses a file of another kind ('format' in its metadata)."""
    check_path(source, target, kind)
    target = Path(target)
    if target.exists():
        try:
            ours = read_header(target).metadata.get("format") == kind
        except FileRefused:
            ours = False
        if not ours:
            other = "is another kind of file"
            if kind == "nibble":
                other = "was not made by Nibble's quantizers"
            raise FileRefused(f"{target.name} exists and {other}; choose another name.")


def metadata_room(metadata: Mapping[str, str]) -> int:
    """Bytes that metadata take in the header (JSON within JSON: every quote is escaped); the writer
    adds the checksums itself.
    """
    return len(json.dumps(dict(metadata)).encode())


def order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Their order in the file: those of whole 8 bytes first, so that they stay aligned to 8, and of
    these the layers' JSON before all others (one read finds it all); at the end the odd ones by
    falling size of an element, so that each stays aligned to its own.
    """

    def place(spec: TensorSpec) -> tuple[int, int]:
        if spec.nbytes % 8:
            return 2, -spec.dtype.itemsize
        return (0 if spec.name.endswith(".comfy_quant") else 1), 0

    return sorted(specs, key=place)


def header_bytes(metadata: Mapping[str, str], specs: Iterable[TensorSpec]) -> bytes:
    """The header's JSON of tensors that lie one behind the other in this order; equal metadata give
    equal bytes.
    """
    table: dict[str, dict] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for spec in specs:
        start, end = end, end + spec.nbytes
        table[spec.name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    return json.dumps(table, separators=(",", ":")).encode()


def comes_again(error: BaseException | None) -> bool:
    """Whether a failed run would fail again: not one that was stopped, or that lacked disk or
    memory, or whose GPU failed it.
    """
    if isinstance(error, RuntimeError):
        # torch has no one class for them
        return not any(word in str(error) for word in ("memory", "CUDA", "cusolver", "cublas"))
    builtin = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, AssertionError)
    return isinstance(error, builtin) and not isinstance(error, DiskRefused)


class Writer:
    """Writes one file; a context manager that holds the lock. Leaving it without `finish` keeps
    what is done for the next run, unless the failure would come again.

    target    final path, or that of a lock that is held (`atomic.exclusive`); check it with
      `check_target` first
    specs     every tensor of the file
    identity  text that tells whether an unfinished file is of this very run (source, recipe,
      calibration); None for one that is not worth resuming
    room      bytes to reserve for metadata, besides the checksums: see `metadata_room`
    Raises FileRefused when the disk is full, the folder read-only, or another run writes the same
    target.
    """

    def __init__(
        self,
        target: str | os.PathLike,
        specs: Iterable[TensorSpec],
        identity: str | None,
        room: int,
    ):
        self._to_lock = target
        self.target = Path(target)
        self.partial = self.target.with_name(self.target.name + atomic.PARTIAL)
        self.journal = self.partial.with_name(self.partial.name + atomic.JOURNAL)
        self._specs, self._places, end = {}, {}, 0
        for spec in order(specs):
            self._specs[spec.name], self._places[spec.name], end = spec, end, end + spec.nbytes
        unknown = seal({}, self._specs.values(), dict.fromkeys(self._specs, "0" * 8))
        self._data = -(-(len(self._header(unknown)) + room) // 8) * 8 + 8
        self.size = self._data + end
        self._resumable = identity is not None
        self._identity = json.dumps([identity, self.size, list(map(str, self._specs.values()))])
        self.finished: dict[str, dict] = {}
        self._sums: dict[str, str] = {}
        self.seconds_before = 0.0
        """That earlier runs worked on the file, up to the last unit that they finished."""

    def __enter__(self) -> "Writer":
        with contextlib.ExitStack() as opened:
            with self._disk_errors():
                opened.enter_context(atomic.exclusive(self._to_lock))
                self._file = opened.enter_context(self._open())
            self._resume()
            self._began = time.monotonic()
            self._log = opened.enter_context(open(self.journal, "a", encoding="utf-8"))
            self._opened = opened.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, *_) -> None:
        with self._opened:
            if not self._resumable or comes_again(error):
                self.discard()

    def write(self, unit: str, tensors: Mapping[str, Tensor], row: dict) -> None:
        """Writes a layer's tensors and notes it as finished, with its report row (anything
        JSON).
        """
        sums = {}
        for name, tensor in tensors.items():
            spec = self._specs[name]
            if (tensor.dtype, tuple(tensor.shape)) != (spec.dtype, tuple(spec.shape)):
                raise ValueError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}; {spec.dtype}"
                    f" {tuple(spec.shape)} was planned"
                )
            self._put(self._data + self._places[name], tensor_bytes(tensor))
            sums[name] = checksum(tensor)
        with self._disk_errors():
            seconds = round(self.seconds_before + time.monotonic() - self._began, 3)
            line = {"unit": unit, "row": row, "sums": sums, "seconds": seconds}
            self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        self.finished[unit], self._sums = row, self._sums | sums

    def is_begun(self) -> bool:
        """Whether an unfinished file of this very run is there to go on from. Call under the
        lock, or to be told again by `finished` inside the context.
        """
        lines = self._journal_lines()
        if not (self._resumable and lines and lines[0] == {"identity": self._identity}):
            return False
        return self.partial.exists() and self.partial.stat().st_size == self.size

    def read(self, name: str) -> Tensor:
        """A tensor that is written already, in this run or an earlier one."""
        spec = self._specs[name]
        stored = self._stored(name)
        assert stored is not None  # the file has its final size from the start
        return stored.view(spec.dtype).reshape(spec.shape)

    def names(self, unit: str) -> list[str]:
        """The tensors of the linear called unit, by the layout."""
        return [name for name in self._specs if name.rpartition(".")[0] == unit]

    def finish(self, choices: Iterable[Mapping[str, str]]) -> None:
        """Writes the header with the first of the metadata choices that fits, and puts the file in
        its place.
        """
        missing = self._specs.keys() - self._sums.keys()
        if missing:
            raise ValueError(f"{len(missing)} tensors were never written, {min(missing)} first")
        sums = {name: self._sums[name] for name in self._specs}
        headers = (self._header(seal(metadata, self._specs.values(), sums)) for metadata in choices)
        header = next((h for h in headers if len(h) <= self._data - 8), None)
        if header is None:
            raise ValueError("the metadata does not fit into the room that was reserved for it")
        self._put(
            0, memoryview((self._data - 8).to_bytes(8, "little") + header.ljust(self._data - 8))
        )
        with self._disk_errors():
            os.fsync(self._file.fileno())
            self._log.close()
            # Windows renames no open file
            if os.name == "nt":
                self._file.close()
            os.replace(self.partial, self.target)
        self._sync_folder()
        self.journal.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes the unfinished file, if there is one: for a run that can never finish. Call
        inside the context.
        """
        self._log.close()
        self.journal.unlink(missing_ok=True)
        if os.name == "nt":
            self._file.close()
        self.partial.unlink(missing_ok=True)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        return header_bytes(metadata, self._specs.values())

    def _open(self) -> FileIO:
        """The partial file, made where there is none, and not cut where there is one."""
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        return os.fdopen(os.open(self.partial, flags, 0o666), "r+b", buffering=0)

    def _resume(self) -> None:
        lines = self._journal_lines() if self.is_begun() else []
        if lines:
            for line in lines[1:]:
                if all(self._stored_sum(name) == value for name, value in line["sums"].items()):
                    self.finished[line["unit"]], self._sums = line["row"], self._sums | line["sums"]
            # none in journals of versions that did not note it
            self.seconds_before = lines[-1].get("seconds", 0.0)
            log.info("%s: resuming, %d parts are finished", self.target.name, len(self.finished))
        else:
            self._reserve()
        with self._disk_errors():  # rewritten whole: what a crash left of the last line is gone
            fresh = self.journal.with_name(self.journal.name + atomic.NEW)
            kept = [line for line in lines[1:] if line["unit"] in self.finished]
            fresh.write_text(
                "".join(json.dumps(line) + "\n" for line in [{"identity": self._identity}, *kept]),
                encoding="utf-8",
            )
            os.replace(fresh, self.journal)

    def _journal_lines(self) -> list[dict]:
        lines = []
        if self.journal.exists():
            for text in self.journal.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    break
        return lines

    def _stored_sum(self, name: str) -> str | None:
        stored = self._stored(name) if name in self._specs else None
        return None if stored is None else checksum(stored)

    def _stored(self, name: str) -> Tensor | None:
        """The bytes of a tensor in the unfinished file; None where it is cut off."""
        buffer = torch.empty(self._specs[name].nbytes, dtype=torch.uint8)
        self._file.seek(self._data + self._places[name])
        view, done = buffer.numpy().data, 0
        while done < len(view) and (count := self._file.readinto(view[done:])):
            done += count
        return buffer if done == len(view) else None

    def _reserve(self) -> None:
        """Gives the file its final size, on disk and not only in name where the system can."""
        try:
            self._file.truncate(0)
            free = shutil.disk_usage(self.target.parent).free
            if free < self.size:
                raise OSError(errno.ENOSPC, "full")
            with self._disk_errors():
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(self._file.fileno(), 0, self.size)
                self._file.truncate(self.size)
        except (OSError, FileRefused) as error:
            self.partial.unlink(missing_ok=True)
            self.journal.unlink(missing_ok=True)
            raise self._refusal(error) if isinstance(error, OSError) else error from None

    def _put(self, offset: int, view: memoryview) -> None:
        with self._disk_errors():
            self._file.seek(offset)
            done = 0
            while done < len(view):
                done += self._file.write(view[done:])

    @contextlib.contextmanager
    def _disk_errors(self):
        try:
            yield
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> DiskRefused:
        return atomic.refusal(self.target, error, self.size)

    def _sync_folder(self) -> None:
        if hasattr(os, "O_DIRECTORY"):
            handle = os.open(self.target.parent, os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
