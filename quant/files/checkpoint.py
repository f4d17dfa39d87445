"""A file of low-bit layers: one protocol for every program's format, and Nibble's own format.

A quantized model of Nibble's is a safetensors file that holds, for each quantized linear X, the
tensors named in `FORMATS` and `X.comfy_quant`, the layer's JSON; and in the metadata: format,
nibble_version, method, source, recipe, calibration, report, checksums. `writer.py` makes such
files. Other programs' formats are in `quant/interop`, behind the same `QuantizedFile`.
"""

import functools
import json
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from .architectures import family_name
from .errors import FileRefused
from .safetensors import Header, SafetensorsFile, TensorSpec, checksum, read_header

FORMAT_VERSION = 1
METHODS = ("svdquant", "vq")
# The tensors that a quantized linear must have (N outputs, K inputs, G = K/64 groups, R rank; C
# codewords of D weights, P = K/D indices of log2(C) bits in bytes) and the options that its JSON
# may hold.
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
# rows share the codebook's, without factors it has no low-rank branch.
OPTIONAL = {
    "awq_w4a16": {"weight_zeros": "G,N", "weight_proj_down": "K,R", "weight_proj_up": "N,R"},
    "vq": {"weight_scale": "N", "weight_proj_down": "K,R", "weight_proj_up": "N,R"},
}
_WEIGHT_DTYPES = {"vq": torch.uint8}  # of X.weight; int8 else
# powers of two, so that every index that a file can hold is one of the codebook
CODEWORDS = tuple(1 << bits for bits in range(1, 17))


class QuantizedFile(ABC):
    """A file of low-bit layers, whoever wrote it: its contents under ComfyUI's names, in natural
    order.

    kind      the format's name, for people
    remedy    what to do when it does not fit its model, for people
    layers    ComfyUI's name of each quantized linear → its JSON
    metadata  the header's, as text
    files     the safetensors files that it is made of: one, or the parts of a folder
    stock     whether its tensors lie on disk as `tensors` gives them, so that any reader of
      safetensors, ComfyUI's among them, finds the same

    It is a context manager that holds the files open; outside of it each call opens them for itself
    (see `SafetensorsFile`).
    """

    kind = ""
    remedy = "download it again"
    stock = False
    layers: dict[str, dict]

    def __init__(self, files: Sequence[SafetensorsFile], metadata: Mapping[str, str]):
        self.files = tuple(files)
        self.metadata = dict(metadata)
        self._open_blocks: list[ExitStack] = []

    def __enter__(self) -> "QuantizedFile":
        with ExitStack() as opened:
            for stored in self.files:
                opened.enter_context(stored)
            self._open_blocks.append(opened.pop_all())
        return self

    def __exit__(self, *_) -> None:
        self._open_blocks.pop().close()

    @property
    def path(self) -> Path:
        """The file (of a folder: that with the transformer blocks)."""
        return self.files[0].path

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(stored.header.size for stored in self.files)

    @property
    def header_checksum(self) -> int:
        """crc32 of the header's JSON, which tells apart files of one name and size."""
        return zlib.crc32(self.files[0].header.text)

    @functools.cached_property
    def family(self) -> str:
        """The model family's name, for people. Raises FileRefused for a model of none."""
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (0, 0) for name in self.layers}
        for unit in self.units:
            if unit not in self.layers:
                shapes |= {spec.name: spec.shape for spec in self.specs(unit)}
        return family_name(shapes, self.path.name)

    def is_current(self) -> bool:
        """Whether its files are still those that were opened, by modification time and size."""
        return all(stored.is_current() for stored in self.files)

    @property
    @abstractmethod
    def units(self) -> Iterable[str]:
        """Names of what is read at once: a quantized linear, or whatever was left in 16 bit."""

    @abstractmethod
    def unit(self, name: str) -> dict[str, Tensor]:
        """Its tensors, under ComfyUI's names. Raises FileRefused where they do not fit together."""

    @abstractmethod
    def specs(self, name: str) -> list[TensorSpec]:
        """Names, dtypes and shapes of what `unit` will give."""

    def layer(self, name: str) -> dict[str, Tensor]:
        """The tensors of one quantized linear, its `comfy_quant` among them."""
        return self.unit(name)

    def tensors(
        self, progress: Callable[[int, int, str], None] | None = None
    ) -> Iterable[tuple[str, Tensor]]:
        """(name, tensor) of everything, one unit in memory at a time."""
        units = list(self.units)
        with self:
            for done, name in enumerate(units):
                if progress:
                    progress(done, len(units), name)
                yield from self.unit(name).items()

    def fact(self, key: str) -> dict:
        """A JSON entry of the metadata that Nibble wrote; {} when absent, as in every file of
        another program.
        """
        return {}

    def check(self, name: str, tensor: Tensor) -> None:  # noqa: B027 (most formats have none)
        """Compares a tensor that was read from the file with its checksum, where the format has
        checksums. Raises FileRefused when it differs.
        """

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Reads and `check`s every tensor, where the format has checksums; the others' sizes were
        checked when they were opened.
        """
        if progress:
            progress(1, 1, self.path.name)

    def refusal(self, what: str) -> FileRefused:
        """A refusal that names this file."""
        return FileRefused(f"{self.path.name} {what}.")


class NibbleFile(QuantizedFile):
    """A quantized model of Nibble's own; see QuantizedFile. Reads the header and the layers' JSON,
    no weights. Raises FileRefused with the reason.

    `fact` has 'source', 'recipe', 'calibration', 'report', 'checksums', and 'config' or 'merged'
    where there are some.
    """

    kind = "Nibble"
    remedy = "quantize the model again with this version of ComfyUI"
    stock = True

    def __init__(self, stored: SafetensorsFile):
        with stored:
            super().__init__([stored], stored.header.metadata)
            _check_version(stored.header)
            texts = [name for name in stored.header.tensors if name.endswith(".comfy_quant")]
            # kept: what was understood as a layer's JSON is what is verified
            self._texts = stored.read_bytes(texts)
        self.layers = {}
        for key in texts:
            name = key.removesuffix(".comfy_quant")
            self.layers[name] = _layer_json(self.header, name, self._texts[key])
            _check_layer(self.header, name, self.layers[name])

    @property
    def header(self) -> Header:
        """The file's header."""
        return self.files[0].header

    @functools.cached_property
    def _modules(self) -> dict[str, list[str]]:
        """Module → the names of its tensors."""
        modules: dict[str, list[str]] = {}
        for key in self.header.tensors:
            modules.setdefault(key.rpartition(".")[0], []).append(key)
        return modules

    @property
    def units(self) -> list[str]:
        kept = (keys for module, keys in self._modules.items() if module not in self.layers)
        return [*(key for keys in kept for key in keys), *self.layers]

    def unit(self, name: str) -> dict[str, Tensor]:
        if name not in self.layers:
            return {name: self.read(name)}
        kind = self.layers[name]["format"]
        suffixes = [*FORMATS[kind][0], *OPTIONAL.get(kind, ()), "bias", "comfy_quant"]
        keys = [f"{name}.{suffix}" for suffix in suffixes]
        with self:
            return {key: self.read(key) for key in keys if key in self.header.tensors}

    def specs(self, name: str) -> list[TensorSpec]:
        keys = self._modules[name] if name in self.layers else [name]
        infos = self.header.tensors
        return [TensorSpec(key, infos[key].dtype, infos[key].shape) for key in keys]

    def read(self, name: str) -> Tensor:
        """One tensor by its name in the file."""
        if name in self._texts:
            info = self.header.tensors[name]
            buffer = torch.frombuffer(bytearray(self._texts[name]), dtype=torch.uint8)
            return buffer.view(info.dtype).reshape(info.shape)
        return self.files[0].read(name)

    def tensors(
        self, progress: Callable[[int, int, str], None] | None = None
    ) -> Iterable[tuple[str, Tensor]]:
        with self:
            for done, name in enumerate(self.header.tensors):
                if progress:
                    progress(done, len(self.header.tensors), name)
                yield name, self.read(name)

    def fact(self, key: str) -> dict:
        return json.loads(self.metadata.get(key, "{}"))

    @functools.cached_property
    def _checksums(self) -> dict[str, str]:
        return self.fact("checksums")

    def check(self, name: str, tensor: Tensor) -> None:
        if name in self._texts:
            found = f"{zlib.crc32(self._texts[name]):08x}"
        else:
            found = checksum(tensor)
        if self._checksums.get(name) != found:
            raise FileRefused(
                f"{self.path.name} is damaged: {name} does not match its checksum; copy it"
                " again or quantize again."
            )

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        for name, tensor in self.tensors(progress):
            self.check(name, tensor)


def open_quantized(path: str | os.PathLike) -> NibbleFile:
    """Opens and checks a quantized model of Nibble's own; see NibbleFile."""
    return NibbleFile(SafetensorsFile(path))


def is_quantized(path: str | os.PathLike) -> bool:
    """Whether a file is a quantized model of ours, from its header alone; False for anything that
    cannot be read.
    """
    try:
        return read_header(path).metadata.get("format") == "nibble"
    except (FileRefused, OSError):
        return False


def _check_version(header: Header) -> None:
    name, version = header.path.name, header.metadata.get("nibble_version", "")
    if header.metadata.get("format") != "nibble":
        raise FileRefused(
            f"{name} was not made by Nibble's quantizers; make a quantized file of it with"
            " `SVDQuant Quantize Checkpoint` or `VQ Quantize Checkpoint` first."
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


def _layer_json(header: Header, name: str, text: bytes) -> dict:
    try:
        config = json.loads(text)
        known = FORMATS[config["format"]][1]
    except (ValueError, KeyError, TypeError) as error:
        raise FileRefused(
            f"{header.path.name} has a layer of an unknown format, {name}; update Nibble or"
            " quantize again."
        ) from error
    if config.keys() - known:
        raise FileRefused(
            f"{header.path.name} uses {', '.join(sorted(config.keys() - known))} in {name}, which"
            " this Nibble does not know; update Nibble."
        )
    return config


def _check_layer(header: Header, name: str, config: dict) -> None:
    optional = {
        suffix: rule
        for suffix, rule in OPTIONAL.get(config["format"], {}).items()
        if f"{name}.{suffix}" in header.tensors or ("R" in rule.split(",") and "rank" in config)
    }
    several = {"weight_smooth_factor": "P,K"} if config.get("smooth_rows") else {}
    rules = FORMATS[config["format"]][0] | optional | several
    shapes = {
        suffix: header.tensors[f"{name}.{suffix}"].shape
        for suffix in rules
        if f"{name}.{suffix}" in header.tensors
    }
    sizes = _sizes(config, *(*shapes.get("weight", ()), 0, 0)[:2])
    for suffix, rule in rules.items():
        if sizes is None or shapes.get(suffix) != tuple(
            sizes[letter] for letter in rule.split(",")
        ):
            raise FileRefused(
                f"{header.path.name} has a damaged layer: {name}.{suffix} is missing or has the"
                f" shape {shapes.get(suffix)}; copy the file again or quantize again."
            )
    dtype = _WEIGHT_DTYPES.get(config["format"], torch.int8)
    if header.tensors[f"{name}.weight"].dtype != dtype:
        raise FileRefused(
            f"{header.path.name} has a damaged layer: {name}.weight is not"
            f" {str(dtype).removeprefix('torch.')}; copy the file again or quantize again."
        )


def _sizes(config: dict, n: int, width: int) -> dict[str, int] | None:
    """What the letters of `FORMATS` stand for in a layer whose weight has the shape (n, width);
    None where no layer can be so.
    """
    if config["format"] != "vq":
        runs = len(config.get("smooth_rows", ()))
        return (
            {
                "N": n,
                "K/2": width,
                "K": 2 * width,
                "G": 2 * width // 64,
                "R": config.get("rank", 0),
                "P": runs,
            }
            if width % 32 == 0
            else None
        )
    c, d, r = config.get("codewords"), config.get("vector", 0), config.get("rank", 0)
    if (
        not all(type(number) is int for number in (c, d, r))
        or c not in CODEWORDS
        or d < 1
        or r < 0
        or width * 8 % (c.bit_length() - 1)
    ):
        return None
    return {"N": n, "P": width, "K": width * 8 // (c.bit_length() - 1) * d, "C": c, "D": d, "R": r}
