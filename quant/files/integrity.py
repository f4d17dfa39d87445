"""What tells that a file is damaged: a checksum of every tensor, and one of what the header says.

    checksums        {tensor: crc32 of its bytes}
    header_checksum  crc32 of the metadata (all but itself) and of every tensor's dtype and shape

Both are metadata of every safetensors file that Nibble writes. The second finds what the first
cannot: a dtype or a shape that reads the same bytes as other numbers, an option or a name that has
changed. It is of what the header says and not of its text, so that another program may write the
file again. Files of earlier versions have no `header_checksum`, some neither.
"""

import json
import zlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .errors import FileRefused
from .safetensors import DTYPE_NAMES, Header, TensorSpec, checksum

SUMS = "checksums"
HEADER_SUM = "header_checksum"


def seal(
    metadata: Mapping[str, str], specs: Iterable[TensorSpec], sums: Mapping[str, str]
) -> dict[str, str]:
    """The metadata with both checksums. sums: tensor → crc32 as 8 hex digits."""
    sealed = {**metadata, SUMS: json.dumps(dict(sums))}
    return {**sealed, HEADER_SUM: header_sum(sealed, specs)}


def header_sum(metadata: Mapping[str, str], specs: Iterable[TensorSpec]) -> str:
    """crc32 of what a header says, as 8 hex digits."""
    said = sorted(item for item in metadata.items() if item[0] != HEADER_SUM)
    tensors = sorted([name, DTYPE_NAMES[dtype], list(shape)] for name, dtype, shape in specs)
    return f"{zlib.crc32(json.dumps([said, tensors]).encode()):08x}"


def check_header(header: Header, again: str) -> None:
    """Raises FileRefused where the header does not say what was written; one without a checksum is
    of an earlier version. again: how to get the file anew, for people.
    """
    wanted = header.metadata.get(HEADER_SUM)
    if wanted is not None and wanted != header_sum(header.metadata, _specs(header)):
        raise FileRefused(
            f"{header.path.name} is damaged: its header does not match its checksum; {again}."
        )


def check_tensor(header: Header, name: str, tensor: Tensor, wanted: str | None, again: str) -> None:
    """Raises FileRefused for values that are not finite, and where `wanted`, a tensor's checksum in
    the file, is another.
    """
    if wanted is not None and wanted != checksum(tensor):
        raise FileRefused(
            f"{header.path.name} is damaged: {name} does not match its checksum; {again}."
        )
    if not is_finite(tensor):
        raise FileRefused(
            f"{header.path.name} is damaged: {name} holds values that are not finite; {again}."
        )


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype has neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    wide = (
        tensor if tensor.dtype.itemsize > 1 else tensor.to(torch.float32)
    )  # fp8 knows no isfinite
    return bool(wide.isfinite().all())


def _specs(header: Header) -> list[TensorSpec]:
    return [TensorSpec(name, info.dtype, info.shape) for name, info in header.tensors.items()]
