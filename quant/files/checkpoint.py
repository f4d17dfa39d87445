"""Reading safetensors files with care, and the file format of a quantized model on top of them.

A safetensors file is 8 bytes of header length, a JSON header (name, dtype, shape, byte range of
each tensor; a flat dictionary of strings as metadata) and the tensors' bytes without gaps. A
quantized model adds, for each quantized linear X, the tensors named in `FORMATS` and
`X.comfy_quant`, a layer's JSON; and in the metadata: format, nibble_version, method, source,
recipe, calibration, report, checksums. Everything is checked against the file's size before a
single tensor is read. `writer.py` makes such files.
"""

import json
import math
import os
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

FORMAT_VERSION = 1
METHODS = ("svdquant", "vq")
# The tensors that a quantized linear must have (N outputs, K inputs, G = K/64 groups, R rank; C
# codewords of D weights, P = K/D indices of
# log2(C) bits in bytes) and the options that its JSON may hold.
FORMATS = {
    "svdquant_w4a4": (
        {
            "weight": "N,K/2",
            "weight_scale": "G,N",
            "weight_proj_down": "K,R",
            "weight_proj_up": "N,R",
            "weight_smooth_factor": "K",
        },
        {"format", "rank", "act_unsigned", "rotation", "unsigned_from", "smooth_rows"},
    ),
    "awq_w4a16": ({"weight": "N,K/2", "weight_scale": "G,N"}, {"format", "rank"}),
    "vq": (
        {"weight": "N,P", "weight_codebook": "C,D"},
        {"format", "codewords", "vector", "rotation", "rank"},
    ),
}
# Tensors that a layer may have besides: without zero points it is symmetric, without a scale its
# rows share the codebook's, without factors
# it has no low-rank branch.
OPTIONAL = {
    "awq_w4a16": {"weight_zeros": "G,N", "weight_proj_down": "K,R", "weight_proj_up": "N,R"},
    "vq": {"weight_scale": "N", "weight_proj_down": "K,R", "weight_proj_up": "N,R"},
}
_WEIGHT_DTYPES = {"vq": torch.uint8}  # of X.weight; int8 else
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
# powers of two, so that every index that a file can hold is one of the codebook
CODEWORDS = tuple(1 << bits for bits in range(1, 17))
_LARGEST_HEADER = 100_000_000  # safetensors' own limit
_WRONG_STARTS = {
    b"GGUF": (
        "is a GGUF file, which is quantized already; choose the 16-bit or fp8 .safetensors file of"
        " the same model"
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


class FileRefused(ValueError):
    """A file that cannot be used: the message is one sentence that names the file, what is wrong
    and what to do.
    """


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


@dataclass(frozen=True)
class Header:
    """A safetensors header that was checked against its file."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    text: bytes


def read_header(path: str | os.PathLike) -> Header:
    """Reads and checks the header only. Raises FileRefused for anything that is not a whole
    safetensors file.
    """
    path = Path(path)
    text, size = _header_text(path)
    try:
        table = json.loads(text)
        metadata = table.pop("__metadata__", {})
        tensors = {
            name: _tensor_info(path, name, entry, 8 + len(text)) for name, entry in table.items()
        }
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
    except FileRefused:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileRefused(
            f"{path.name} has a damaged header; download or copy it again."
        ) from error
    _check_ranges(path, tensors, 8 + len(text), size)
    return Header(path, tensors, metadata, size, text)


def _header_text(path: Path) -> tuple[bytes, int]:
    try:
        with open(path, "rb") as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(32)
            wrong = next(
                (what for magic, what in _WRONG_STARTS.items() if start.startswith(magic)), None
            )
            length = int.from_bytes(start[:8], "little")
            # A small safetensors header may begin with any of the magic bytes; the brace after its
            # length tells.
            if len(start) < 10 or start[8:9] != b"{" or length > _LARGEST_HEADER:
                wrong = wrong or (
                    "is not a safetensors file; choose a .safetensors file of a diffusion model"
                )
                raise FileRefused(f"{path.name} {wrong}.")
            if 8 + length > size:
                raise FileRefused(
                    f"{path.name} is cut off inside its header ({size} bytes); download or copy it"
                    " again."
                )
            file.seek(8)
            return file.read(length), size
    except FileNotFoundError:
        raise FileRefused(f"{path.name} does not exist in {path.parent}; check the name.") from None
    except IsADirectoryError:
        raise FileRefused(f"{path.name} is a folder; choose a .safetensors file.") from None
    except PermissionError:
        raise FileRefused(
            f"{path.name} may not be read; change its permissions or choose another file."
        ) from None


def _tensor_info(path: Path, name: str, entry: dict, data: int) -> TensorInfo:
    if entry["dtype"] not in DTYPES:
        raise FileRefused(
            f"{path.name} stores {name} as {entry['dtype']}, which is not supported; choose the"
            " 16-bit or fp8 file."
        )
    dtype, shape, (start, stop) = (
        DTYPES[entry["dtype"]],
        tuple(entry["shape"]),
        entry["data_offsets"],
    )
    numbers = (*shape, start, stop)
    if (
        not all(type(number) is int and number >= 0 for number in numbers)
        or stop - start != math.prod(shape) * dtype.itemsize
    ):
        raise ValueError(f"{name}: {entry}")
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


def read_tensor(header: Header, name: str) -> Tensor:
    """One tensor, in memory of its own (a memory map would count every page that was ever read).
    Raises FileRefused at a short read.
    """
    info = header.tensors[name]
    if info.nbytes == 0:
        return torch.empty(info.shape, dtype=info.dtype)
    buffer = torch.empty(info.nbytes, dtype=torch.uint8)
    view, done = memoryview(buffer.numpy()), 0
    with open(header.path, "rb", buffering=0) as file:
        file.seek(info.start)
        while done < info.nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise FileRefused(
                    f"{header.path.name} became shorter while it was read; copy it again."
                )
            done += count
    return buffer.view(info.dtype).reshape(info.shape)


def checksum(tensor: Tensor) -> str:
    """crc32 of a tensor's bytes, as 8 hex digits."""
    return f"{zlib.crc32(memoryview(tensor_bytes(tensor))):08x}"


def tensor_bytes(tensor: Tensor):
    """A tensor's bytes in row-major order, as a numpy uint8 array."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def is_quantized(path: str | os.PathLike) -> bool:
    """Whether a file is a quantized model of ours, from its header alone; False for anything that
    cannot be read.
    """
    try:
        return read_header(path).metadata.get("format") == "nibble"
    except (FileRefused, OSError):
        return False


@dataclass(frozen=True)
class QuantizedFile:
    """An opened quantized model: `layers` holds each quantized linear's JSON, `metadata` what the
    writer recorded.
    """

    header: Header
    layers: dict[str, dict]
    kind = "Nibble"

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.header.size

    @property
    def path(self) -> Path:
        """The file."""
        return self.header.path

    @property
    def metadata(self) -> dict[str, str]:
        """All metadata, as text."""
        return self.header.metadata

    def fact(self, key: str) -> dict:
        """A JSON entry of the metadata: 'source', 'recipe', 'calibration', 'report' or 'checksums';
        {} when absent.
        """
        return json.loads(self.metadata.get(key, "{}"))

    def read(self, name: str) -> Tensor:
        """One tensor by its name in the file."""
        return read_tensor(self.header, name)

    def layer(self, name: str) -> dict[str, Tensor]:
        """All tensors of one quantized linear, under their names in the file."""
        kind = self.layers[name]["format"]
        suffixes = [*FORMATS[kind][0], *OPTIONAL.get(kind, ()), "bias", "comfy_quant"]
        return {
            key: self.read(key)
            for key in (f"{name}.{suffix}" for suffix in suffixes)
            if key in self.header.tensors
        }

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """(name, tensor) of everything in the file, one at a time."""
        return ((name, self.read(name)) for name in self.header.tensors)

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Compares every tensor with its checksum. Raises FileRefused naming the first that
        differs.
        """
        sums = self.fact("checksums")
        for done, name in enumerate(self.header.tensors):
            if progress:
                progress(done, len(self.header.tensors), name)
            if sums.get(name) != checksum(self.read(name)):
                raise FileRefused(
                    f"{self.path.name} is damaged: {name} does not match its checksum; copy it"
                    " again or quantize again."
                )


def open_quantized(path: str | os.PathLike) -> QuantizedFile:
    """Opens and checks a quantized model; reads its header and the layers' JSON, no weights. Raises
    FileRefused with the reason.
    """
    header = read_header(path)
    _check_version(header)
    layers = {}
    for key in header.tensors:
        if key.endswith(".comfy_quant"):
            name = key.removesuffix(".comfy_quant")
            layers[name] = _layer_json(header, name)
            _check_layer(header, name, layers[name])
    return QuantizedFile(header, layers)


def _check_version(header: Header) -> None:
    name, version = header.path.name, header.metadata.get("nibble_version", "")
    if header.metadata.get("format") != "nibble":
        raise FileRefused(
            f"{name} was not made by Nibble; make a quantized file of it with `SVDQuant Quantize"
            " Checkpoint` or `VQ Quantize Checkpoint` first."
        )
    if not version.isdigit() or int(version) > FORMAT_VERSION:
        raise FileRefused(
            f"{name} has the format version {version!r} and this Nibble reads up to"
            f" {FORMAT_VERSION}; update Nibble."
        )
    if header.metadata.get("method") not in METHODS:
        method = header.metadata.get("method")
        raise FileRefused(
            f"{name} was made with the method {method!r}, which this Nibble does not know; update"
            " Nibble."
        )
    for key in ("source", "recipe", "calibration", "report", "checksums"):
        try:
            json.loads(header.metadata.get(key, "{}"))
        except ValueError:
            raise FileRefused(
                f"{name} has damaged metadata ({key}); copy it again or quantize again."
            ) from None


def _layer_json(header: Header, name: str) -> dict:
    try:
        facts = json.loads(bytes(tensor_bytes(read_tensor(header, f"{name}.comfy_quant"))))
        known = FORMATS[facts["format"]][1]
    except (ValueError, KeyError, TypeError) as error:
        raise FileRefused(
            f"{header.path.name} has a layer of an unknown format, {name}; update Nibble or"
            " quantize again."
        ) from error
    if facts.keys() - known:
        raise FileRefused(
            f"{header.path.name} uses {', '.join(sorted(facts.keys() - known))} in {name}, which"
            " this Nibble does not know; update Nibble."
        )
    return facts


def _check_layer(header: Header, name: str, facts: dict) -> None:
    optional = {
        suffix: rule
        for suffix, rule in OPTIONAL.get(facts["format"], {}).items()
        if f"{name}.{suffix}" in header.tensors or ("R" in rule.split(",") and "rank" in facts)
    }
    several = {"weight_smooth_factor": "P,K"} if facts.get("smooth_rows") else {}
    rules = FORMATS[facts["format"]][0] | optional | several
    shapes = {
        suffix: header.tensors[f"{name}.{suffix}"].shape
        for suffix in rules
        if f"{name}.{suffix}" in header.tensors
    }
    sizes = _sizes(facts, *(*shapes.get("weight", ()), 0, 0)[:2])
    for suffix, rule in rules.items():
        if sizes is None or shapes.get(suffix) != tuple(
            sizes[letter] for letter in rule.split(",")
        ):
            raise FileRefused(
                f"{header.path.name} has a damaged layer: {name}.{suffix} is missing or has the"
                f" shape {shapes.get(suffix)}; copy the file again or quantize again."
            )
    dtype = _WEIGHT_DTYPES.get(facts["format"], torch.int8)
    if header.tensors[f"{name}.weight"].dtype != dtype:
        raise FileRefused(
            f"{header.path.name} has a damaged layer: {name}.weight is not"
            f" {str(dtype).removeprefix('torch.')}; copy the file again or quantize again."
        )


def _sizes(facts: dict, n: int, width: int) -> dict[str, int] | None:
    """What the letters of `FORMATS` stand for in a layer whose weight has the shape (n, width);
    None where no layer can be so.
    """
    if facts["format"] != "vq":
        runs = len(facts.get("smooth_rows", ()))
        return (
            {
                "N": n,
                "K/2": width,
                "K": 2 * width,
                "G": 2 * width // 64,
                "R": facts.get("rank", 0),
                "P": runs,
            }
            if width % 32 == 0
            else None
        )
    c, d, r = facts.get("codewords"), facts.get("vector"), facts.get("rank", 0)
    if (
        not all(type(number) is int for number in (c, d, r))
        or c not in CODEWORDS
        or d < 1
        or r < 0
        or width * 8 % (c.bit_length() - 1)
    ):
        return None
    return {"N": n, "P": width, "K": width * 8 // (c.bit_length() - 1) * d, "C": c, "D": d, "R": r}
