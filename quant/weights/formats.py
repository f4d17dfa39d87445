"""Every format of a low-bit layer by its name, and a layer of a file as its dataclass."""

from typing import TypeVar

from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused, reading
from .awq_w4a16 import W4A16Weight
from .svdquant_nvfp4 import NVFP4Weight
from .svdquant_w4a4 import SVDQuantWeight
from .svdquant_w4a8 import W4A8Weight
from .vq import VQWeight

FourBitWeight = TypeVar("FourBitWeight", SVDQuantWeight, NVFP4Weight, W4A16Weight)
AnyWeight = TypeVar("AnyWeight", SVDQuantWeight, W4A8Weight, NVFP4Weight, W4A16Weight, VQWeight)
Weight = SVDQuantWeight | W4A8Weight | NVFP4Weight | W4A16Weight | VQWeight
FORMATS: dict[str, type[Weight]] = {
    SVDQuantWeight.FORMAT: SVDQuantWeight,
    W4A8Weight.FORMAT: W4A8Weight,
    NVFP4Weight.FORMAT: NVFP4Weight,
    W4A16Weight.FORMAT: W4A16Weight,
    VQWeight.FORMAT: VQWeight,
}


def refuse_patched(file: QuantizedFile) -> None:
    """Raises FileRefused for a file whose layers have patches beside them: only a MODEL holds
    those.
    """
    if file.patched:
        raise FileRefused(
            f"{file.path.name} was saved with a LoRA beside {len(file.patched)} of its layers"
            f" ({file.patched[0]}), which only the loading nodes can read; use the file that it was"
            " made from, and Merge and Save for the LoRA."
        )


def weight_of(file: QuantizedFile, name: str) -> Weight:
    """A quantized linear of a file. Raises FileRefused where its tensors do not fit together or are
    not finite, and for one with a patch beside it, which a format has no place for.
    """
    refuse_patched(file)
    kind = file.layers[name]["format"]
    if kind not in FORMATS:
        raise FileRefused(
            f"{file.path.name} stores {name} as {kind}, as text encoders do, which are not"
            " converted or merged; use it in CLIPLoader or Load Quantized CLIP."
        )
    with reading(file.path, file.remedy):
        tensors = file.layer(name)
        file.check_finite(tensors)
        return FORMATS[kind].from_tensors(tensors, name)
