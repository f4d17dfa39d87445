"""Small files of Nibble's own (adapters, states of trainings, couplings): the same content gives
the same bytes, and what is damaged is not read.

A safetensors file with the checksums of `integrity.py`, written whole or not at all; an index in
JSON with `checksum`, the SHA-256 of the rest. Readers refuse in one sentence that names the file
and the way out. What a format asks of its tensors beyond that is the format's own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import atomic
from .errors import FileRefused
from .integrity import HEADER_SUM, SUMS, check_header, check_tensor, seal
from .safetensors import SafetensorsFile, TensorSpec, checksum, read_header, tensor_bytes
from .writer import header_bytes, order

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
JSON_SUM = "checksum"  # of an object in JSON
# what a value of the wrong kind ends in, wherever it is used
WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with checksums. Equal names, tensors and metadata give equal bytes, in
    whatever order they come.
    """
    specs = order(
        TensorSpec(name, tensors[name].dtype, tuple(tensors[name].shape))
        for name in sorted(tensors)
    )
    sums = {spec.name: checksum(tensors[spec.name]) for spec in specs}
    header = header_bytes(seal(metadata, specs, sums), specs)
    header = header.ljust(-(-len(header) // 8) * 8)
    data = (tensor_bytes(tensors[spec.name]) for spec in specs)
    return b"".join([len(header).to_bytes(8, "little"), header, *data])


def write(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes such a file, all of it or nothing, under the lock of its path. Raises FileRefused
    where the disk does not take it, or another run writes it.
    """
    with atomic.exclusive(path) as held:
        atomic.write(held.path, to_bytes(tensors, metadata))


class SmallFile:
    """A small file that was opened: its header is whole, and its tensors are checked as they are
    read. Raises FileRefused for what is no safetensors file, or is damaged.

    again: what to do with a damaged one, for people.
    """

    def __init__(self, path: str | os.PathLike, again: str):
        self.again = again
        self._stored = SafetensorsFile(path)
        with self._stored:
            self.header = self._stored.header
        check_header(self.header, again)
        self._sums: dict[str, str] | None = None
        if (SUMS in self.metadata) != (HEADER_SUM in self.metadata):
            raise self.damaged("one of its checksums is missing")
        if SUMS in self.metadata:
            self._sums = self.json(SUMS)
            if not isinstance(self._sums, dict) or self._sums.keys() != self.header.tensors.keys():
                raise self.damaged("its checksums are of other tensors")

    @property
    def name(self) -> str:
        """The file's name."""
        return self.header.path.name

    @property
    def metadata(self) -> dict[str, str]:
        """The header's, as text."""
        return self.header.metadata

    def json(self, key: str) -> Any:
        """A JSON entry of the metadata."""
        try:
            return json.loads(self.metadata[key])
        except WRONG as error:
            raise self.damaged(f"its {key} cannot be read") from error

    def read(self, name: str) -> Tensor:
        """One tensor, checked."""
        if name not in self.header.tensors:
            raise self.damaged(f"{name} is missing")
        tensor = self._stored.read(name)
        wanted = None if self._sums is None else str(self._sums[name])
        check_tensor(self.header, name, tensor, wanted, self.again)
        return tensor

    def tensors(self, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Several tensors, or all, checked; the file is opened once."""
        with self._stored:
            return {name: self.read(name) for name in names or self.header.tensors}

    def damaged(self, why: str) -> FileRefused:
        """The refusal of this file."""
        return FileRefused(f"{self.name} is damaged: {why}; {self.again}.")


# ---- JSON


def json_bytes(content: dict) -> bytes:
    """An object as JSON with its checksum; equal objects give equal bytes."""
    return _text(content | {JSON_SUM: json_sum(content)})


def json_content(text: bytes) -> dict:
    """The object that `json_bytes` was given, or one that has no checksum. Raises ValueError for
    what is damaged.
    """
    try:
        content = json.loads(text)
        wanted = content.pop(JSON_SUM, None)
        whole = isinstance(content, dict) and wanted in (None, json_sum(content))
    except WRONG as error:
        raise ValueError(f"no JSON object ({type(error).__name__})") from error
    if not whole:
        raise ValueError("its content does not match its checksum")
    return content


def format_of(path: Path) -> str | None:
    """What a safetensors file says that it is; None for one that does not, or cannot be read."""
    try:
        return read_header(path).metadata.get("format")
    except (FileRefused, OSError):
        return None


def json_sum(content: dict) -> str:
    """SHA-256 of an object, in hexadecimal; equal objects have equal sums."""
    return hashlib.sha256(_text(content)).hexdigest()


def _text(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
