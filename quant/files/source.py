"""The model to be quantized: its matrices as float32, whatever they are stored as.

Understood are 16- and 32-bit weights, plain fp8, fp8 with a scale (`X.scale_weight` of older files,
`X.weight_scale`), and every per-layer format that ComfyUI writes (`X.comfy_quant`, or
`_quantization_metadata` in the header), the last through comfy-kitchen's layouts. A prefix such as
"model.diffusion_model." is removed, so that names are those of ComfyUI's own modules; what else a
checkpoint holds is left out.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.optional import optional
from .errors import FileRefused, reader, reading
from .integrity import is_finite
from .safetensors import Header, read_header, read_tensor, tensor_bytes
from .source_layouts import ACCESSORIES, LAYOUTS, PACKED, VIEWS
from .text_encoders import family_of

# In the order in which they are tried: ComfyUI's model_detection.unet_prefix_from_state_dict, and
# LoRA trainers' own.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.model.", "net.", "model.")
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_LARGEST_JSON = 65536  # bytes of a layer's
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


class _Stored(NamedTuple):
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class _Model(ABC):
    """What a file and a live model share. Subclasses set `name`, `notes`, `bytes`, and read stored
    tensors by their name in the file.
    """

    name = "model"
    metadata: dict[str, str] = {}

    def __init__(self, stored: Mapping[str, _Stored]):
        self.notes: list[str] = []
        self.prefix = _prefix(stored)
        if self.prefix:
            left_out = [key for key in stored if not key.startswith(self.prefix)]
            if left_out:
                self.notes.append(
                    f"took the diffusion model alone; {len(left_out)} other tensors (VAE, text"
                    " encoders) were left out"
                )
            stored = {
                key.removeprefix(self.prefix): info
                for key, info in stored.items()
                if key.startswith(self.prefix)
            }
        self._stored = stored
        self._formats = self._layer_formats()
        self.shapes = {key: self._logical(key) for key in stored if not self._is_accessory(key)}
        self.bytes = sum(info.nbytes for info in stored.values())

    def read(self, name: str) -> Tensor:
        """A tensor that will not be quantized: as stored; fp8 and quantized ones in bf16. Raises
        FileRefused for NaN and infinity.
        """
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and (
            module in self._formats or self._stored[name].dtype in _FP8
        ):
            return self.weight(module).bfloat16()
        # patches of a live model may have made it float32
        tensor = self._raw(name).to(self.kept_dtype(name))
        return self._finite(name, tensor) if tensor.is_floating_point() else tensor

    def kept_dtype(self, name: str) -> torch.dtype:
        """The dtype that `read` gives, without reading."""
        dtype = self._stored[name].dtype
        quantized = name.endswith(".weight") and name.removesuffix(".weight") in self._formats
        return torch.bfloat16 if quantized or dtype in _FP8 else dtype

    def weight(self, module: str) -> Tensor:
        """A linear's matrix, float32 (N, K), dequantized. Raises FileRefused for NaN and infinity,
        naming the tensor.
        """
        name = f"{module}.weight"
        facts = self._formats.get(module, {})
        kind = facts.get("format")
        if kind in LAYOUTS:
            matrix = self._dequantized(module, facts)
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
        return self._finite(name, matrix)

    def bias(self, module: str) -> Tensor | None:
        """A linear's bias, float32 (N,), or None."""
        name = f"{module}.bias"
        return self._finite(name, self._raw(name).float()) if name in self._stored else None

    def nbytes(self, module: str) -> int:
        """Bytes that a linear occupies as stored: matrix, bias and scales."""
        keys = [f"{module}.{suffix}" for suffix in ("weight", "bias", *ACCESSORIES)]
        return sum(self._stored[key].nbytes for key in keys if key in self._stored)

    @property
    def fingerprint(self) -> str:
        """sha256 of all names, dtypes and shapes and of 3 x 4 KiB of each tensor: tells models
        apart in a second, where all bytes take minutes.
        """
        digest = hashlib.sha256()
        for name in sorted(self._stored):
            info = self._stored[name]
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            length, count = math.prod(info.shape), max(1, _SAMPLE // info.dtype.itemsize)
            for start in sorted({0, max(0, (length - count) // 2), max(0, length - count)}):
                digest.update(self._sample(name, start, min(count, length)))
        return digest.hexdigest()

    @abstractmethod
    def _raw(self, name: str) -> Tensor:
        """A tensor as stored."""

    @abstractmethod
    def _sample(self, name: str, start: int, count: int) -> bytes:
        """Bytes of `count` elements from the one numbered `start`."""

    def _logical(self, key: str) -> tuple[int, ...]:
        shape = self._stored[key].shape
        facts = (
            self._formats.get(key.removesuffix(".weight"), {}) if key.endswith(".weight") else {}
        )
        if facts.get("format") not in LAYOUTS:
            return shape
        rows = self._stored.get(key.removesuffix("weight") + "bias")
        # nvfp4 and mxfp8 pad their rows; the bias has as many entries as the linear has outputs.
        n = min(shape[0], rows.shape[0]) if rows else shape[0]
        return (n, shape[1] * 2 if facts["format"] in PACKED else shape[1])

    def _is_accessory(self, key: str) -> bool:
        module, _, suffix = key.rpartition(".")
        return key in ("scaled_fp8", "_quantization_metadata") or (
            suffix in ACCESSORIES and f"{module}.weight" in self._stored
        )

    def _layer_formats(self) -> dict[str, dict]:
        said = "_quantization_metadata"
        listed = self._json(said, self.metadata.get(said, "{}")).get("layers", {})
        if not isinstance(listed, dict):
            raise self._no_json(said)
        formats = {key.removeprefix(self.prefix): facts for key, facts in listed.items()}
        for key, info in self._stored.items():
            if key.endswith(".comfy_quant"):
                if info.nbytes > _LARGEST_JSON:
                    raise self._no_json(key)
                text = bytes(tensor_bytes(self._raw(key)))
                formats[key.removesuffix(".comfy_quant")] = self._json(key, text)
        for module, facts in formats.items():
            if not isinstance(facts, dict) or not isinstance(facts.get("params") or {}, dict):
                raise self._no_json(module)
        formats = {
            module: {**facts, **(facts.get("params") or {})}
            for module, facts in formats.items()
            if f"{module}.weight" in self._stored
        }
        for module, facts in formats.items():
            if facts.get("format") == "svdquant_w4a4":
                raise FileRefused(
                    f"{self.name} is quantized by SVDQuant already; choose the 16-bit or fp8 file"
                    " that it was made from."
                )
            if str(facts.get("format")) not in (*LAYOUTS, "float8_e4m3fn", "float8_e5m2"):
                raise FileRefused(
                    f"{self.name} stores {module} in the format {facts.get('format')!r}, which"
                    " Nibble cannot read; choose the 16-bit file."
                )
        self._check_matrices(formats)
        return formats

    def _json(self, where: str, text: str | bytes) -> dict:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._no_json(where) from error
        if not isinstance(value, dict):
            raise self._no_json(where)
        return value

    def _no_json(self, where: str) -> FileRefused:
        return FileRefused(
            f"{self.name} says in {where} how it is quantized, and that is no JSON that can be"
            " read; download it again, or choose the 16-bit file."
        )

    def _check_matrices(self, formats: Mapping[str, dict]) -> None:
        for key, info in self._stored.items():
            if (
                key.endswith(".weight")
                and len(info.shape) == 2
                and key.removesuffix(".weight") not in formats
            ):
                if info.dtype not in (*_FLOATS, *_FP8):
                    raise FileRefused(
                        f"{self.name} stores {key} as {info.dtype} and does not say how to read it;"
                        " choose the 16-bit or fp8 file."
                    )

    def _dequantized(self, module: str, facts: dict) -> Tensor:
        """Through comfy-kitchen's layout of this format, as ComfyUI's comfy/ops.py
        (_load_quantized_module) sets it up.
        """
        layout_name, fields, options = LAYOUTS[facts["format"]]
        layout = getattr(optional("comfy_kitchen.tensor")[0], layout_name, None)
        if layout is None:
            raise FileRefused(
                f"{self.name} is in ComfyUI's format {facts['format']}, which needs the package"
                " comfy-kitchen (a newer one, if it is installed); install it, or choose the"
                " 16-bit file."
            )
        tensors = {
            field: self._part(module, facts["format"], suffix) for field, suffix in fields.items()
        }
        packed, shape = self._raw(f"{module}.weight"), self._logical(f"{module}.weight")
        tensors |= {key: facts.get(key, value) for key, value in options.items()}
        params = layout.Params(
            orig_dtype=torch.float32, orig_shape=(packed.shape[0], shape[1]), **tensors
        )
        return layout.dequantize(packed, params)[: shape[0], : shape[1]].float()

    def _part(self, module: str, kind: str, suffix: str) -> Tensor | None:
        name, view = f"{module}.{suffix}", VIEWS.get((kind, suffix))
        if name not in self._stored:
            if suffix == "weight_codebook":
                return None
            raise FileRefused(f"{self.name} lacks {name}; the file is damaged: download it again.")
        tensor = self._raw(name)
        # ComfyUI stores fp8 scales as fp8 or as the same bytes in uint8
        return tensor.view(getattr(torch, view)) if view and tensor.dtype == torch.uint8 else tensor

    def _finite(self, name: str, tensor: Tensor) -> Tensor:
        if not is_finite(tensor):
            raise FileRefused(
                f"{self.name} holds NaN or infinity in {name}; the file is damaged or overflowed"
                " when it was saved: get another copy."
            )
        return tensor


class Source(_Model):
    """A safetensors file with a diffusion model: `shapes` (logical, by ComfyUI's names), `read`,
    `weight`, `bias`, `fingerprint`. Raises FileRefused for files that cannot be read.
    """

    remedy = "download it again, or choose the 16-bit file"

    def __init__(self, path):
        self.path = Path(path)
        self.header: Header = read_header(self.path)
        self.name, self.metadata = self.path.name, self.header.metadata
        if self.metadata.get("format") == "nibble":
            raise FileRefused(
                f"{self.name} is quantized by Nibble already; choose the 16-bit or fp8 file that it"
                " was made from."
            )
        stored = {
            name: _Stored(info.dtype, info.shape, info.nbytes)
            for name, info in self.header.tensors.items()
        }
        with reading(self.path, self.remedy):
            super().__init__(stored)

    @reader
    def read(self, name: str) -> Tensor:
        return super().read(name)

    @reader
    def weight(self, module: str) -> Tensor:
        return super().weight(module)

    @reader
    def bias(self, module: str) -> Tensor | None:
        return super().bias(module)

    def _sample(self, name: str, start: int, count: int) -> bytes:
        info = self.header.tensors[self.prefix + name]
        with reading(self.path), open(self.path, "rb", buffering=0) as file:
            file.seek(info.start + start * info.dtype.itemsize)
            return file.read(count * info.dtype.itemsize)

    def _raw(self, name: str) -> Tensor:
        return read_tensor(self.header, self.prefix + name)


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
        self.name, self.path, self._tensors = name, None, tensors
        self.metadata = passed_on(metadata or {})
        super().__init__(
            {
                key: _Stored(tensor.dtype, tuple(tensor.shape), tensor.nbytes)
                for key, tensor in tensors.items()
            }
        )

    def _sample(self, name: str, start: int, count: int) -> bytes:
        return tensor_bytes(self._raw(name).reshape(-1)[start : start + count]).tobytes()

    def _raw(self, name: str) -> Tensor:
        tensor = self._tensors[self.prefix + name].detach()
        # an instance of comfy-kitchen's QuantizedTensor; plain tensors have a method of that name,
        # for torch's own quantization
        return tensor.dequantize() if hasattr(tensor, "_qdata") else tensor


def _prefix(stored: Mapping[str, _Stored]) -> str:
    if family_of({name: info.shape for name, info in stored.items()}) is not None:
        return ""  # ComfyUI knows text encoders by their whole names
    for prefix in PREFIXES:
        if sum(key.startswith(prefix) for key in stored) > 5:
            return prefix
    return ""
