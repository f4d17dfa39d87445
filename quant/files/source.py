"""The model to be quantized: its matrices as float32, whatever they are stored as.

Understood are 16- and 32-bit weights, plain fp8, fp8 with a scale (`X.scale_weight` of older files,
`X.weight_scale`), every per-layer format that ComfyUI writes (source_layouts.py) and those of GGUF,
in one file or several (source_files.py). A prefix such as "model.diffusion_model." is removed, so
that names are those of ComfyUI's own modules; what else a checkpoint holds is left out, but for
what ComfyUI needs to build the model (read_when_built.py).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import read_when_built
from .errors import FORMS, FileRefused, reader, reading
from .integrity import is_finite
from .safetensors import DTYPE_NAMES, tensor_bytes
from .source_files import open_stored
from .source_layouts import ACCESSORIES, LayerFormats
from .stored_tensors import SafetensorsFiles, StoredTensor, StoredTensors
from .text_encoders import family_of

# In the order in which they are tried: ComfyUI's model_detection.unet_prefix_from_state_dict, and
# LoRA trainers' own.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# bytes of a source's own metadata that are passed on
_PASSED_ON = 65536
_THUMBNAIL = 1 << 20  # bytes of a picture among them
_SAMPLE = 4096  # bytes read at the start, middle and end of a tensor for the fingerprint


def passed_on(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a file made of a model keeps of the model's own metadata: whatever is short, and does
    not tell how its tensors are stored. ComfyUI builds LTX and other video models by "config".
    """
    return {
        key: value
        for key, value in metadata.items()
        if key != "_quantization_metadata"
        and len(value) <= (_THUMBNAIL if key == "modelspec.thumbnail" else _PASSED_ON)
    }


class _Model:
    """What files and a live model share: `name`, `path`, `metadata`, `notes`, `shapes` (logical, by
    ComfyUI's names), `bytes`, as stored, and `stored_as`, what the matrices are.
    """

    left_out = ""

    def __init__(self, stored: StoredTensors):
        self.name, self.path, self.metadata = stored.name, stored.path, dict(stored.metadata)
        self.notes: list[str] = []
        self._tensors = stored
        self.prefix = _prefix(stored.tensors)
        self._stored = {
            key.removeprefix(self.prefix): info
            for key, info in stored.tensors.items()
            if key.startswith(self.prefix)
        }
        self._beside = {
            key: stored.tensors[key]
            for key in read_when_built.names(stored.tensors)
            if key not in self._stored
        }
        self._stored |= self._beside
        if len(self._stored) < len(stored.tensors):
            self.left_out = (
                f"{len(stored.tensors) - len(self._stored)} other tensors (VAE, text encoders)"
            )
            self.notes.append(
                f"took the diffusion model alone; {self.left_out} were left out, and Load"
                " Checkpoint still reads them from the source"
            )
        self._decoded = {
            key.removeprefix(self.prefix): kind for key, kind in stored.decoded.items()
        }
        self._formats = LayerFormats(
            self.name,
            self.metadata.get("_quantization_metadata", "{}"),
            self.prefix,
            self._stored,
            self._raw,
        )
        self._check_matrices()
        self.shapes = {
            key: self._logical(key) for key in self._stored if not self._is_accessory(key)
        }
        self.bytes = sum(info.nbytes for info in self._stored.values())
        sizes: Counter[str] = Counter()
        for key in self.shapes:
            if key.endswith(".weight") and len(self.shapes[key]) >= 2:
                sizes[DTYPE_NAMES[self._stored[key].dtype]] += self._stored[key].nbytes
        self.stored_as = sizes.most_common(1)[0][0] if sizes else "no matrices"
        few = {key: kind for key in self.shapes if (kind := self._few_bits(key))}
        self._note_few_bits(
            set(few.values()),
            sum(self.nbytes(key.removesuffix(".weight"), bias=False) for key in few),
            sum(math.prod(self.shapes[key]) for key in few),
        )

    def _note_few_bits(self, kinds: set[str], nbytes: int, weights: int) -> None:
        """Notes that matrices are in 16 bit no more: their formats, bytes and number of weights."""
        if kinds:
            self.stored_as = f"{8 * nbytes / weights:.3g} bits ({', '.join(sorted(kinds))})"
            self.notes.append(
                f"started from weights of {self.stored_as}, and what they lost stays lost"
            )

    def _few_bits(self, key: str) -> str | None:
        """The format of a matrix of less than 16 bits; None for any other tensor."""
        if not key.endswith(".weight") or len(self.shapes[key]) < 2:
            return None
        if key in self._decoded:
            return self._decoded[key]
        dtype = self._stored[key].dtype
        plain = str(dtype).removeprefix("torch.") if dtype in _FP8 else None
        return self._formats.kind(key.removesuffix(".weight")) or plain

    def read(self, name: str) -> Tensor:
        """A tensor that will not be quantized: as stored; fp8 and quantized ones in bf16. Raises
        FileRefused for NaN and infinity.
        """
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and (
            module in self._formats.of or self._stored[name].dtype in _FP8
        ):
            return self.weight(module).bfloat16()
        # patches of a live model may have made it float32
        tensor = self._raw(name).to(self.kept_dtype(name))
        return self._finite(name, tensor) if tensor.is_floating_point() else tensor

    def kept_dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives, without reading."""
        dtype = self._stored[name].dtype
        quantized = name.endswith(".weight") and name.removesuffix(".weight") in self._formats.of
        few = quantized or dtype in _FP8 or name in self._decoded
        return torch.bfloat16 if few else dtype

    def weight(self, module: str) -> Tensor:
        """A linear's matrix, float32 (N, K), dequantized. Raises FileRefused for NaN and infinity,
        naming the tensor.
        """
        name = f"{module}.weight"
        if self._formats.is_packed(module):
            matrix = self._formats.matrix(module)
        else:
            matrix = self._raw(name).float()
            for scale in (f"{module}.weight_scale", f"{module}.scale_weight"):
                if scale in self._stored:
                    factors = self._raw(scale).float()  # one, or one per row
                    matrix *= (
                        factors.reshape(-1, *[1] * (matrix.dim() - 1))
                        if factors.numel() > 1
                        else factors.reshape(())
                    )
        smoothing = f"{module}.pre_quant_scale"  # ModelOpt's: inputs are multiplied by it
        if smoothing in self._stored:
            matrix = matrix * self._raw(smoothing).float()
        return self._finite(name, matrix)

    def bias(self, module: str) -> Tensor | None:
        """A linear's bias, float32 (N,), or None."""
        name = f"{module}.bias"
        return self._finite(name, self._raw(name).float()) if name in self._stored else None

    def nbytes(self, module: str, bias: bool = True) -> int:
        """Bytes that a linear occupies as stored: matrix, scales and bias."""
        suffixes = ("weight", *ACCESSORIES, *(("bias",) if bias else ()))
        keys = [f"{module}.{suffix}" for suffix in suffixes]
        return sum(self._stored[key].nbytes for key in keys if key in self._stored)

    def check(self) -> None:
        """Raises FileRefused for a format that nothing installed here can decode, and for a model
        that ComfyUI could not build.
        """
        read_when_built.check(self.shapes, self.name)
        for module in self._formats.of:
            if self._formats.is_packed(module):
                self._formats.layout(module)

    @property
    def loaded_bytes(self) -> int:
        """Bytes of the model as ComfyUI holds it to be measured."""
        return self.bytes

    @property
    def fingerprint(self) -> str:
        """sha256 of all names, dtypes and shapes and of 3 x 4 KiB of each tensor: tells models
        apart in a second, where all bytes take minutes.
        """
        return self._digest(self._stored)

    def stamp(self, modules: Iterable[str]) -> str:
        """The same of all names, dtypes and shapes and of these modules' tensors alone: tells
        models apart for whoever reads no others.
        """
        read = set(modules)
        return self._digest({name for name in self._stored if name.rpartition(".")[0] in read})

    def _digest(self, sampled: Container[str]) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._stored):
            info = self._stored[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            if name not in sampled:
                continue
            # of what is stored in blocks, the bytes are the elements
            size = 1 if name in self._decoded else info.dtype.itemsize
            length = info.nbytes if name in self._decoded else math.prod(info.shape)
            count = max(1, _SAMPLE // size)
            for start in sorted({0, max(0, (length - count) // 2), max(0, length - count)}):
                bytes_ = min(count, length) * size
                digest.update(self._tensors.sample(self._key(name), start * size, bytes_))
        return digest.hexdigest()

    def _raw(self, name: str) -> Tensor:
        """A tensor as stored."""
        return self._tensors.read(self._key(name))

    def _key(self, name: str) -> str:
        """The name that a tensor is stored under."""
        return name if name in self._beside else self.prefix + name

    def _logical(self, key: str) -> tuple[int, ...]:
        module = key.removesuffix(".weight")
        if key.endswith(".weight") and self._formats.is_packed(module):
            return self._formats.shape(module)
        return self._stored[key].shape

    def _is_accessory(self, key: str) -> bool:
        module, _, suffix = key.rpartition(".")
        return key in ("scaled_fp8", "_quantization_metadata") or (
            suffix in ACCESSORIES and f"{module}.weight" in self._stored
        )

    def _check_matrices(self) -> None:
        for key, info in self._stored.items():
            if (
                key.endswith(".weight")
                and len(info.shape) == 2
                and key.removesuffix(".weight") not in self._formats.of
            ):
                if info.dtype not in (*_FLOATS, *_FP8):
                    raise FileRefused(
                        f"{self.name} stores {key} as {info.dtype} and does not say how to read it;"
                        f" choose the same model in {FORMS}."
                    )

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not is_finite(tensor):
            raise FileRefused(
                f"{self.name} holds NaN or infinity in {name}; the file is damaged or overflowed"
                " when it was saved: get another copy."
            )
        return tensor


class Source(_Model):
    """A diffusion model on disk, whatever its files are (see `source_files.open_stored`): `shapes`
    (logical, by ComfyUI's names), `read`, `weight`, `bias`, `fingerprint`. Raises FileRefused for
    files that cannot be read.
    """

    remedy = f"download it again, or choose the same model in {FORMS}"

    def __init__(self, path):
        self.path = Path(path)
        stored = open_stored(self.path)
        if stored.metadata.get("format") == "nibble":
            raise FileRefused(
                f"{stored.name} is quantized by Nibble already; choose the same model in {FORMS}."
            )
        with reading(self.path, self.remedy):
            super().__init__(stored)

    @property
    def files(self) -> int:
        """How many files the model is in."""
        return self._tensors.files

    @property
    def is_one_file(self) -> bool:
        """Whether ComfyUI loads the whole model from `path` itself: of an all-in-one checkpoint it
        loads the diffusion model without what lies beside it.
        """
        plain = isinstance(self._tensors, SafetensorsFiles) and self._tensors.is_plain
        return plain and not self._beside

    @property
    def loaded_bytes(self) -> int:
        if self.is_one_file:
            return self.bytes
        return sum(
            math.prod(shape) * self.kept_dtype(name).itemsize for name, shape in self.shapes.items()
        )

    @reader
    def read(self, name: str) -> Tensor:
        return super().read(name)

    @reader
    def weight(self, module: str) -> Tensor:
        return super().weight(module)

    @reader
    def bias(self, module: str) -> Tensor | None:
        return super().bias(module)


class _LiveTensors(StoredTensors):
    """A live model's state dict."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, metadata: Mapping[str, str]):
        self.path, self.name, self.metadata, self._live = None, name, metadata, tensors
        self.tensors = {
            key: StoredTensor(tensor.dtype, tuple(tensor.shape), tensor.nbytes)
            for key, tensor in tensors.items()
        }

    def read(self, name: str) -> Tensor:
        tensor = self._live[name].detach()
        return tensor.dequantize() if _is_quantized(tensor) else tensor

    def sample(self, name: str, start: int, count: int) -> bytes:
        flat, size = self.read(name).reshape(-1), self.tensors[name].dtype.itemsize
        return tensor_bytes(flat[start // size : (start + count) // size]).tobytes()


class StateDictSource(_Model):
    """The same for a live model's state dict: `tensors` maps names to tensors on any device,
    comfy-kitchen's quantized ones too; `metadata`: of the file that the model comes from.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        name: str = "The connected model",
        metadata: Mapping[str, str] | None = None,
    ):
        super().__init__(_LiveTensors(tensors, name, passed_on(metadata or {})))
        few: list[Any] = [tensor for _, tensor in tensors.items() if _is_quantized(tensor)]
        self._note_few_bits(
            {str(tensor._layout_cls).removesuffix("Layout") for tensor in few},
            sum(tensor._qdata.nbytes for tensor in few),
            sum(tensor.numel() for tensor in few),
        )


def _is_quantized(tensor: Any) -> bool:
    """Whether this is an instance of comfy-kitchen's QuantizedTensor; plain tensors have a method
    `dequantize`, too, for torch's own quantization.
    """
    return hasattr(tensor, "_qdata")


def _prefix(stored: Mapping[str, StoredTensor]) -> str:
    if family_of({name: info.shape for name, info in stored.items()}) is not None:
        return ""  # ComfyUI knows text encoders by their whole names
    for prefix in PREFIXES:
        if sum(key.startswith(prefix) for key in stored) > 5:
            return prefix
    return ""
