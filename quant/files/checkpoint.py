"""A file of low-bit layers: one protocol for every program's format, and Nibble's own format.

A quantized model of Nibble's is a safetensors file that holds, for each quantized linear X, the
tensors named in `layer_formats.py` and `X.comfy_quant`, the layer's JSON; and in the metadata:
format, nibble_version, method, source, recipe, calibration, report, checksums, header_checksum.
`writer.py` makes such files. Other programs' formats are in `quant/interop`, behind the same
`QuantizedFile`.
"""

import functools
import json
import math
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from .architectures import family_name
from .errors import FileRefused, reader, reading
from .header_limits import LISTED_HEADER
from .integrity import SUMS, check_header
from .layer_formats import FORMATS, OPTIONAL, check_layer, layer_json
from .metadata import json_object, version_of
from .safetensors import Header, SafetensorsFile, TensorSpec, checksum

FORMAT_VERSION = 1
METHODS = ("svdquant", "vq")


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
        for stored in self.files:
            check_header(stored.header, "copy it again or make it anew")
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

    @property
    def built_by(self) -> dict[str, str]:
        """The metadata by which ComfyUI builds LTX and other video models: "config"."""
        return {key: value for key, value in self.metadata.items() if key == "config"}

    def is_current(self) -> bool:
        """Whether its files are still those that were opened, by modification time and size."""
        return all(stored.is_current() for stored in self.files)

    @property
    @abstractmethod
    def units(self) -> Iterable[str]:
        """Names of what is read at once: a quantized linear, or whatever was left in 16 bit."""

    @property
    def patched(self) -> Sequence[str]:
        """The layers that ComfyUI saved with a patch beside their own tensors (`SIDE`), in which
        case `unit` gives these, too.
        """
        return ()

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

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuses NaN and infinity in a layer's scales and all that is float beside its codes: a
        picture of it is black, whatever the checksums say.
        """
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.numel():
                # propagates NaN, at forty times the speed of isfinite
                low, high = torch.aminmax(tensor.detach())
                if not (math.isfinite(low) and math.isfinite(high)):
                    raise self.refusal(f"holds NaN or infinity in {name}; {self.remedy}")

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Reads and `check`s every tensor, where the format has checksums; the others' sizes were
        checked when they were opened.
        """
        names = [(stored, name) for stored in self.files for name in stored.header.tensors]
        with self:
            for done, (stored, name) in enumerate(names):
                if progress:
                    progress(done, len(names), name)
                if SUMS in stored.header.metadata:
                    self._compare(stored.header, name, checksum(stored.read(name)))

    @functools.cached_property
    def _sums(self) -> dict[Path, dict]:
        return {stored.path: json_object(stored.header, SUMS) for stored in self.files}

    def _compare(self, header: Header, name: str, found: str) -> None:
        """Refuses a tensor whose checksum in the file is not the one that was found."""
        if self._sums[header.path].get(name) != found:
            raise self.refusal(
                f"is damaged: {name} does not match its checksum; copy it again or quantize again"
            )

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
            check_header(stored.header, "copy it again or quantize again")
            texts = [name for name in stored.header.tensors if name.endswith(".comfy_quant")]
            # kept: what was understood as a layer's JSON is what is verified
            self._texts = stored.read_bytes(texts)
        self.layers = {}
        for key in texts:
            name = key.removesuffix(".comfy_quant")
            self.layers[name] = layer_json(self.header, name, self._texts[key])
            check_layer(self.header, name, self.layers[name])

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

    @reader
    def unit(self, name: str) -> dict[str, Tensor]:
        if name not in self.layers:
            return {name: self.read(name)}
        kind = self.layers[name]["format"]
        suffixes = [*FORMATS[kind][0], *OPTIONAL.get(kind, ()), "bias", "comfy_quant"]
        keys = [f"{name}.{suffix}" for suffix in suffixes]
        with self:
            return {key: self.read(key) for key in keys if key in self.header.tensors}

    @reader
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

    @reader
    def fact(self, key: str) -> dict:
        return json.loads(self.metadata.get(key, "{}"))

    def check(self, name: str, tensor: Tensor) -> None:
        if name in self._texts:
            found = f"{zlib.crc32(self._texts[name]):08x}"
        else:
            found = checksum(tensor)
        self._compare(self.header, name, found)

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        for name, tensor in self.tensors(progress):
            self.check(name, tensor)


def open_quantized(path: str | os.PathLike) -> NibbleFile:
    """Opens and checks a quantized model of Nibble's own; see NibbleFile."""
    with reading(path):
        return NibbleFile(SafetensorsFile(path))


def is_quantized(path: str | os.PathLike) -> bool:
    """Whether a file is a quantized model of ours, from its header alone; False for anything that
    cannot be read.
    """
    try:
        with SafetensorsFile(path, largest_header=LISTED_HEADER) as stored:
            return stored.header.metadata.get("format") == "nibble"
    except FileRefused:
        return False


def _check_version(header: Header) -> None:
    name, version = header.path.name, header.metadata.get("nibble_version", "")
    if header.metadata.get("format") != "nibble":
        raise FileRefused(
            f"{name} was not made by Nibble's quantizers; make a quantized file of it with"
            " `SVDQuant Quantize Checkpoint` or `VQ Quantize Checkpoint` first."
        )
    if not 0 <= version_of(version) <= FORMAT_VERSION:
        raise FileRefused(
            f"{name} has the format version {version[:20]!r} and this Nibble reads up to"
            f" {FORMAT_VERSION}; update Nibble."
        )
    if header.metadata.get("method") not in METHODS:
        method = header.metadata.get("method")
        raise FileRefused(
            f"{name} was made with the method {str(method)[:40]!r}, which this Nibble does not"
            " know; update Nibble."
        )
    for key in ("source", "recipe", "calibration", "report", "checksums"):
        json_object(header, key)
