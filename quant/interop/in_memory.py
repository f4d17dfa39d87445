"""A low-bit model whose tensors are in memory already, as another program read them: ComfyUI's own
loaders hand over a state dict, without the file's name and metadata.

Each layer's `comfy_quant` says what it is, as in a file, so the reader is the same (`kitchen.py`).
Tensors in natural order are handed on as they are, memory maps among them.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ..files.safetensors import Header, SafetensorsFile, TensorInfo
from .kitchen import KitchenFile

NAME = "The model"  # in place of a file's name in refusals


class TensorsInMemory(SafetensorsFile):
    """Tensors by name, read as those of a file are."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        infos = {
            name: TensorInfo(tensor.dtype, tuple(tensor.shape), 0, tensor.nbytes)
            for name, tensor in tensors.items()
        }
        super().__init__(NAME, Header(Path(NAME), infos, {}, 0, 0, b""))
        self._tensors = tensors

    def __enter__(self) -> "TensorsInMemory":
        return self

    def __exit__(self, *_) -> None:
        pass

    def is_current(self) -> bool:
        return True

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def read_bytes(
        self, names: Iterable[str], largest: int = 2**16, in_all: int = 2**24
    ) -> dict[str, bytes]:
        return {name: self._tensors[name].cpu().numpy().tobytes() for name in names}


class StateDictModel(KitchenFile):
    """An opened state dict; see QuantizedFile. tensors: under ComfyUI's names, without a prefix.

    Any model is taken, of known family or not: whoever has read it has recognised it. Nibble's
    writers put each layer's rank into its JSON, and what they leave out there is off; a layer
    without a rank is comfy-kitchen's.
    """

    kind = "low-bit model"
    remedy = "copy or download its file again, or quantize the 16-bit model again"

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(TensorsInMemory(tensors))

    @property
    def family(self) -> str:
        return ""

    def _guesses_unsigned(self, name: str) -> bool:
        return "rank" not in self._json[name] and super()._guesses_unsigned(name)
