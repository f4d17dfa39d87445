"""A GGUF file as a source: the package `gguf` says what lies where and decodes it
(`gguf.quants.dequantize`, the reference of every GGML format).

Image models keep ComfyUI's own names in it, and in `comfy.gguf.orig_shape.X` the shape of a tensor
that had to be stored in another one (city96/ComfyUI-GGUF). Tensors are read one by one; a memory
map would count every page that was ever read.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...kernels.optional import optional
from .errors import FileRefused
from .stored_tensors import StoredTensor, StoredTensors

_PLAIN = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
}
# `general.architecture` of what is no diffusion model; gguf_encoders.py reads some of them
_ENCODERS = ("t5", "t5encoder", "llama", "qwen", "gemma", "mistral", "phi", "bert", "gpt", "clip")
_ORIGINAL = "comfy.gguf.orig_shape."


class _Place(NamedTuple):
    kind: Any  # gguf's GGMLQuantizationType
    start: int
    nbytes: int
    rows: tuple[int, ...]  # the shape as bytes


class GgufFile(StoredTensors):
    """An opened file. architecture: `general.architecture`; heads: of a language model's attention,
    those of the queries and of the keys, 1 where it does not say. Raises FileRefused where `gguf`
    is not installed, and for files that are parts of one.
    """

    def __init__(self, path: Path):
        self.path: Path = path
        self.name, self.metadata = path.name, {}
        gguf, why = optional("gguf")
        if gguf is None:
            raise FileRefused(
                f"{path.name} is a GGUF file, which the package gguf reads, and {why}; install it"
                " into ComfyUI's Python (pip install gguf)."
            )
        self._gguf: Any = gguf
        reader = gguf.GGUFReader(path)
        self._refuse_parts(reader)
        self.architecture = str(_field(reader, "general.architecture") or "")
        queries = int(_field(reader, f"{self.architecture}.attention.head_count") or 1)
        keys = _field(reader, f"{self.architecture}.attention.head_count_kv")
        self.heads = (queries, int(keys or queries))
        self._places: dict[str, _Place] = {}
        self._kinds: dict[str, str] = {}
        self._infos: dict[str, StoredTensor] = {}
        for tensor in reader.tensors:
            self._add(reader, tensor)
        self.tensors, self.decoded = self._infos, self._kinds

    def _add(self, reader: Any, tensor: Any) -> None:
        kind, name = tensor.tensor_type, str(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        rows = shape
        if kind.name not in _PLAIN:
            self._kinds[name] = kind.name
            block, size = self._gguf.GGML_QUANT_SIZES[kind]
            rows = (*shape[:-1], shape[-1] // block * size)
        original = reader.get_field(_ORIGINAL + name)
        if original is not None:
            shape = tuple(int(original.parts[part][0]) for part in original.data)
        dtype = _PLAIN.get(kind.name, torch.float32)
        place = _Place(kind, int(tensor.data_offset), int(tensor.n_bytes), rows)
        self._places[name] = place
        self._infos[name] = StoredTensor(dtype, shape, place.nbytes)

    @property
    def is_encoder(self) -> bool:
        """Whether it says that it is a language model or its like."""
        return self.architecture.startswith(_ENCODERS)

    def _refuse_parts(self, reader: Any) -> None:
        if int(_field(reader, "split.count") or 0) > 1:
            raise FileRefused(
                f"{self.name} is one of several parts of a model; join them first"
                " (llama-gguf-split --merge)."
            )

    def read(self, name: str) -> Tensor:
        place, info = self._places[name], self.tensors[name]
        buffer = torch.empty(place.nbytes, dtype=torch.uint8)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(place.start)
            view, done = buffer.numpy().data, 0
            while done < place.nbytes and (count := file.readinto(view[done:])):
                done += count
        if done < place.nbytes:
            raise FileRefused(f"{self.name} is cut off inside {name}; download or copy it again.")
        if name not in self.decoded:
            return buffer.view(info.dtype).reshape(info.shape)
        packed = buffer.numpy().reshape(place.rows)
        try:
            values = self._gguf.quants.dequantize(packed, place.kind)
        except NotImplementedError as error:
            raise FileRefused(
                f"{self.name} holds {name} in the format {self.decoded[name]}, which the installed"
                " package gguf cannot decode; update it (pip install --upgrade gguf)."
            ) from error
        return torch.from_numpy(values).float().reshape(info.shape)

    def sample(self, name: str, start: int, count: int) -> bytes:
        place = self._places[name]
        with open(self.path, "rb", buffering=0) as file:
            file.seek(place.start + start)
            return file.read(min(count, place.nbytes - start))


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
