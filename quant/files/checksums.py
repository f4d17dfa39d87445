"""Checksums of a file that Nibble writes: one of each tensor's bytes ("checksums" in the metadata),
and one of all that its header says ("header_checksum"): names, dtypes, shapes and metadata.

The second covers what the first cannot: a dtype that was changed reads other numbers from the same
bytes. It does not depend on the order of the header or the places of tensors. Files of before it
was written lack it, and load.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence

import torch

from .errors import FileRefused
from .safetensors import DTYPE_NAMES, Header, SafetensorsFile, checksum

SUMS, HEADER = "checksums", "header_checksum"


def of_header(
    tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]
) -> str:
    """crc32 of tensors' dtypes and shapes and of the metadata but itself, as 8 hex digits."""
    said = {key: value for key, value in metadata.items() if key != HEADER}
    stored = {name: [DTYPE_NAMES[dtype], list(shape)] for name, (dtype, shape) in tensors.items()}
    return f"{zlib.crc32(json.dumps([stored, said], sort_keys=True).encode()):08x}"


def check_header(header: Header) -> None:
    """Raises FileRefused where a header is not what its checksum says; files without one pass."""
    if HEADER not in header.metadata:
        return
    tensors = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    if of_header(tensors, header.metadata) != header.metadata[HEADER]:
        raise FileRefused(
            f"{header.path.name} is damaged: its header does not match its checksum; copy it again"
            " or make it anew."
        )


def verify(
    stored: SafetensorsFile, progress: Callable[[int, int, str], None] | None = None
) -> None:
    """Compares every tensor of a file with its checksum. Raises FileRefused, naming the first that
    differs; a file without checksums passes.
    """
    with stored:
        header = stored.header
        if SUMS not in header.metadata:
            return
        sums = json_object(header, SUMS)
        for done, name in enumerate(header.tensors):
            if progress:
                progress(done, len(header.tensors), name)
            compare(header, sums, name, checksum(stored.read(name)))


def compare(header: Header, sums: Mapping[str, object], name: str, found: str) -> None:
    """Raises FileRefused where a tensor's checksum is not the one that was `found`."""
    if sums.get(name) != found:
        raise FileRefused(
            f"{header.path.name} is damaged: {name} does not match its checksum; copy it again or"
            " quantize again."
        )


def json_object(header: Header, key: str) -> dict:
    """A JSON object in the metadata, {} where there is none. Raises FileRefused for anything
    else.
    """
    try:
        value = json.loads(header.metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FileRefused(
            f"{header.path.name} has damaged metadata ({key}); copy it again or make it anew."
        )
    return value


def version_of(text: str) -> int:
    """A format's version as a number; -1 for what is none."""
    plain = text.isascii() and text.isdigit() and len(text) < 10
    return int(text) if plain else -1
