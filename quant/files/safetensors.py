"""Safetensors files, read with care; knows no model.

A safetensors file is 8 bytes of header length, a JSON header (name, dtype, shape, byte range of
each tensor; a flat dictionary of strings as metadata) and the tensors' bytes without gaps
(https://github.com/huggingface/safetensors#format). Everything is checked against the file's size
before a single tensor is read.
"""

import json
import math
import os
import threading
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import FORMS, FileRefused, reading
from .header_limits import (
    LARGEST_HEADER,
    MOST_DIMENSIONS,
    MOST_TENSORS,
    check_text,
    is_too_long,
    unique,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", torch.uint8),
}
DTYPE_NAMES = {dtype: name for name, dtype in reversed(DTYPES.items())}
_WRONG_STARTS = {
    b"GGUF": (
        "is a GGUF file; let its name end in .gguf to quantize it, or choose the .safetensors file"
        " of the same model"
    ),
    b"PK\x03\x04": (
        "is a PyTorch pickle (.pt, .ckpt), which can run code when it is opened; convert it to"
        " .safetensors first"
    ),
    b"\x80": (
        "is a PyTorch pickle (.pt, .ckpt), which can run code when it is opened; convert it to"
        " .safetensors first"
    ),
    b"<": "is a web page and not a model: the download went wrong; download it again",
    b"version https://git-lfs": (
        "is only the pointer to a large file; download the file itself (git lfs pull)"
    ),
}
_NO_SAFETENSORS = "is not a safetensors file; choose a .safetensors file of a diffusion model"


class TensorInfo(NamedTuple):
    """Where a tensor lies: torch dtype, shape, and its absolute byte range in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.stop - self.start


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is read or written: its name, torch dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """A safetensors header that was checked against its file. size: of the whole file in bytes;
    mtime_ns: when it was last written; text: the header's JSON.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    mtime_ns: int
    text: bytes


class SafetensorsFile:
    """One safetensors file: its header, and its tensors read through one handle.

        with SafetensorsFile(path) as stored:
            stored.header, stored.read(name), …

    Inside `with` the file is open, and only there: it can be replaced at any other time, on Windows
    too. Blocks may be nested and entered again; a read outside opens the file for itself. The
    header is read and checked when the file is opened first, and kept.

    header          of an earlier reading, in place of reading it again
    largest_header  bytes; a file with a longer one is refused
    Raises FileRefused, on opening and reading, for what is not a whole safetensors file.
    """

    header: Header

    def __init__(
        self,
        path: str | os.PathLike,
        header: Header | None = None,
        largest_header: int = LARGEST_HEADER,
    ):
        self.path = Path(path)
        self._largest_header = largest_header
        if header is not None:
            self.header = header
        self._lock = threading.RLock()
        self._blocks = 0  # `with` blocks that are entered
        self._handle: FileIO | None = None

    def __enter__(self) -> "SafetensorsFile":
        with self._lock:
            if self._handle is None:
                self._handle = _open(self.path)
            self._blocks += 1
            if not hasattr(self, "header"):
                try:
                    self.header = _read_header(self.path, self._handle, self._largest_header)
                except BaseException:
                    self.__exit__()
                    raise
        return self

    def __exit__(self, *_) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0 and self._handle is not None:
                self._handle.close()
                self._handle = None

    def is_current(self) -> bool:
        """Whether the path still names the file whose header was read, by its modification time
        and size.
        """
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        return (found.st_mtime_ns, found.st_size) == (self.header.mtime_ns, self.header.size)

    def read(self, name: str) -> Tensor:
        """One tensor, in memory of its own (a memory map would count every page that was ever
        read). Raises FileRefused at a short read.
        """
        info = self.header.tensors[name]
        if info.nbytes == 0:
            return torch.empty(info.shape, dtype=info.dtype)
        try:
            buffer = torch.empty(info.nbytes, dtype=torch.uint8)
        except RuntimeError:
            raise FileRefused(
                f"{self.path.name} needs {info.nbytes / 1e9:,.1f} GB of memory for {name}, more"
                " than there is; close other programs, or choose a smaller file."
            ) from None
        self._fill(buffer.numpy().data, info.start)
        return buffer.view(info.dtype).reshape(info.shape)

    def read_bytes(
        self, names: Iterable[str], largest: int = 2**16, in_all: int = 2**24
    ) -> dict[str, bytes]:
        """Several small tensors' bytes; those that lie side by side come in one read. Raises
        FileRefused where one has more bytes than `largest`, or all more than `in_all`.
        """
        places = sorted((self.header.tensors[name][2:], name) for name in names)
        left = in_all
        for (start, stop), name in places:
            left -= stop - start
            if stop - start > largest or left < 0:
                raise FileRefused(
                    f"{self.path.name} is damaged: {name} has {stop - start:,} bytes, more than its"
                    " kind ever has; download or copy it again."
                )
        contents: dict[str, bytes] = {}
        first = 0
        with self:
            for last, ((_, stop), _) in enumerate(places, 1):
                if last == len(places) or places[last][0][0] != stop:
                    start = places[first][0][0]
                    run = bytearray(stop - start)
                    self._fill(memoryview(run), start)
                    for (begin, end), name in places[first:last]:
                        contents[name] = bytes(run[begin - start : end - start])
                    first = last
        return contents

    def _fill(self, view: memoryview, start: int) -> None:
        with self, self._lock:
            assert self._handle is not None
            if _read_into(self._handle, view, start) < len(view):
                raise FileRefused(
                    f"{self.path.name} became shorter while it was read; copy it again."
                )


def read_header(path: str | os.PathLike) -> Header:
    """Reads and checks the header only. Raises FileRefused for anything that is not a whole
    safetensors file.
    """
    with SafetensorsFile(path) as stored:
        return stored.header


def read_tensor(header: Header, name: str) -> Tensor:
    """One tensor of a file whose header is known; see `SafetensorsFile.read`. Opens the file: for
    many tensors, use that class.
    """
    return SafetensorsFile(header.path, header).read(name)


def checksum(tensor: Tensor) -> str:
    """crc32 of a tensor's bytes, as 8 hex digits."""
    return f"{zlib.crc32(tensor_bytes(tensor)):08x}"


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _open(path: Path) -> FileIO:
    try:
        return open(path, "rb", buffering=0)
    except FileNotFoundError:
        raise FileRefused(f"{path.name} does not exist in {path.parent}; check the name.") from None
    except IsADirectoryError:
        raise FileRefused(f"{path.name} is a folder; choose a .safetensors file.") from None
    except PermissionError:
        raise FileRefused(
            f"{path.name} may not be read; change its permissions or choose another file."
        ) from None
    except (OSError, ValueError) as error:  # a broken drive, too long a name, a NUL within
        raise FileRefused(f"{path.name!r} cannot be opened ({error}); check the name.") from error


def _read_into(handle: FileIO, view: memoryview, start: int) -> int:
    """Fills a buffer from the file's byte `start` on; returns how many bytes there were."""
    done = 0
    handle.seek(start)
    while done < len(view):
        count = handle.readinto(view[done:])
        if not count:
            break
        done += count
    return done


def _read_header(path: Path, handle: FileIO, largest: int) -> Header:
    found = os.fstat(handle.fileno())
    with reading(path):
        text = _header_text(path, handle, found.st_size, largest)
    metadata, tensors = _parsed(path, text)
    _check_ranges(path, tensors, 8 + len(text), found.st_size)
    return Header(
        path=path,
        tensors=tensors,
        metadata=metadata,
        size=found.st_size,
        mtime_ns=found.st_mtime_ns,
        text=text,
    )


def _parsed(path: Path, text: bytes) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """(metadata, tensors) of a header's JSON."""
    if is_too_long(text):
        raise FileRefused(
            f"{path.name} has more than {MOST_TENSORS:,} entries in its header, more than any"
            " model; download or copy it again."
        )
    try:
        table = json.loads(text, object_pairs_hook=unique)
        metadata = table.pop("__metadata__", {})
        tensors = {
            name: _tensor_info(path, name, entry, 8 + len(text)) for name, entry in table.items()
        }
        check_text([*tensors, *metadata, *metadata.values()])
    except FileRefused:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileRefused(
            f"{path.name} has a damaged header; download or copy it again."
        ) from error
    return metadata, tensors


def _header_text(path: Path, handle: FileIO, size: int, largest: int) -> bytes:
    buffer = bytearray(32)
    count = _read_into(handle, memoryview(buffer), 0)
    start = bytes(buffer[:count])
    length = int.from_bytes(start[:8], "little")
    if not start:
        raise FileRefused(f"{path.name} is empty: the download went wrong; download it again.")
    # A small safetensors header may begin with any of the magic bytes; the brace after its
    # length tells.
    if len(start) < 10 or start[8:9] != b"{" or length > LARGEST_HEADER:
        wrong = [what for magic, what in _WRONG_STARTS.items() if start.startswith(magic)]
        raise FileRefused(f"{path.name} {wrong[0] if wrong else _NO_SAFETENSORS}.")
    if 8 + length > size:
        raise FileRefused(
            f"{path.name} is cut off inside its header ({size} bytes); download or copy it again."
        )
    if length > largest:
        raise FileRefused(
            f"{path.name} has a header of {length:,} bytes, more than the {largest:,} of any"
            " quantized model; download or copy it again."
        )
    text = bytearray(length)
    _read_into(handle, memoryview(text), 8)
    return bytes(text)


def _tensor_info(path: Path, name: str, entry: dict, data: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise FileRefused(
            f"{path.name} stores {name} as {entry['dtype']}, which is not supported; choose the"
            f" same model in {FORMS}."
        )
    dtype = DTYPES[entry["dtype"]]
    shape = tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    numbers = (*shape, start, stop)
    if (
        len(shape) > MOST_DIMENSIONS
        or not all(type(number) is int and number >= 0 for number in numbers)
        or stop - start != math.prod(shape) * dtype.itemsize
    ):
        raise ValueError(f"{name}: not {dtype} of this shape in these bytes")
    return TensorInfo(dtype, shape, data + start, data + stop)


def _check_ranges(path: Path, tensors: dict[str, TensorInfo], data: int, size: int) -> None:
    """Tensors must lie one behind the other without gaps, and the file must end with the
    last one.
    """
    end = data
    for info in sorted(tensors.values(), key=lambda info: (info.start, info.stop)):
        if info.start != end:
            raise FileRefused(
                f"{path.name} has a damaged header (its tensors overlap or leave gaps); download or"
                " copy it again."
            )
        end = info.stop
    if end > size:
        raise FileRefused(
            f"{path.name} is cut off: it has {size:,} of {end:,} bytes; download or copy it again."
        )
    if end < size:
        raise FileRefused(
            f"{path.name} has {size - end:,} bytes behind its last tensor; download or copy it"
            " again."
        )
