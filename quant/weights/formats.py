"""Every format of a low-bit layer by its name, and a layer of a file as its dataclass."""

from typing import TypeVar

from ..files.checkpoint import QuantizedFile
from ..files.errors import reading
from .awq_w4a16 import W4A16Weight
from .svdquant_w4a4 import SVDQuantWeight
from .vq import VQWeight

FourBitWeight = TypeVar("FourBitWeight", SVDQuantWeight, W4A16Weight)
Weight = SVDQuantWeight | W4A16Weight | VQWeight
FORMATS: dict[str, type[Weight]] = {
    SVDQuantWeight.FORMAT: SVDQuantWeight,
    W4A16Weight.FORMAT: W4A16Weight,
    VQWeight.FORMAT: VQWeight,
}


def weight_of(file: QuantizedFile, name: str) -> Weight:
    """A quantized linear of a file. Raises FileRefused where its tensors do not fit together or are
    not finite.
    """
    with reading(file.path, file.remedy):
        tensors = file.layer(name)
        file.check_finite(tensors)
        return FORMATS[file.layers[name]["format"]].from_tensors(tensors, name)
