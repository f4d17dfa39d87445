"""What can be wrong with one 4-bit linear of Nunchaku's, from its tensors' shapes and dtypes.

The shapes of both kinds are in `nunchaku_read.py`. N and K are multiples of 128 there, R of 16; AWQ
pads the rows of its scales.
"""

from collections.abc import Mapping

import torch

from ..files.safetensors import TensorInfo
from . import swizzle

_W4A4 = ("qweight", "wscales", "smooth_factor", "proj_down", "proj_up")
_W4A16 = ("qweight", "wscales", "wzeros")
SUFFIXES_OF_LAYERS = tuple(dict.fromkeys([*_W4A4, *_W4A16]))
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
Shapes = Mapping[str, tuple[int, ...]]


def fault_of(module: str, infos: Mapping[str, TensorInfo], other_file: str) -> str | None:
    """What to refuse a module for, as the rest of a sentence; None for a sound one.

    infos       suffix → where the tensor lies
    other_file  what to download instead, for a format that Nibble cannot read
    """
    awq = "wzeros" in infos
    wanted = _W4A16 if awq else _W4A4
    missing = [suffix for suffix in wanted if suffix not in infos]
    if not awq and {"proj_down", "proj_up"} & set(missing):
        return (
            f"has no low-rank branch (rank 0) in {module}, so it is no SVDQuant file; choose"
            " another"
        )
    if missing:
        return f"lacks {module}.{missing[0]}; the file is damaged: download it again"
    shapes = {suffix: infos[suffix].shape for suffix in wanted}
    expected = _w4a16_shapes(shapes) if awq else _w4a4_shapes(shapes)
    if shapes != expected:
        return (
            f"has a layer of unknown shape, {module} ({shapes}); it was damaged, or written by"
            " a program that differs"
        )
    floats = [*wanted[1:], *(["bias"] if "bias" in infos else [])]
    if "bias" in infos and infos["bias"].shape != shapes["wscales"][1:]:
        return (
            f"has a bias of unknown shape, {module} ({infos['bias'].shape}); it was damaged:"
            " download it again"
        )
    bad = [suffix for suffix in floats if infos[suffix].dtype not in _FLOATS]
    if infos["qweight"].dtype != (torch.int32 if awq else torch.int8):
        bad.append("qweight")
    if bad:
        return f"stores {module}.{bad[0]} in a way that Nibble cannot read; {other_file}"
    return None


def _w4a4_shapes(shapes: Shapes) -> Shapes | None:
    """The shapes that fit the codes and the rank; None where none do."""
    if len(shapes["qweight"]) != 2:
        return None
    n, k = shapes["qweight"][0], shapes["qweight"][1] * 2
    rank = (*shapes["proj_down"], 0, 0)[1]
    if n % 128 or k % 128 or rank % 16 or rank <= 0:
        return None
    return {
        "qweight": (n, k // 2),
        "wscales": (k // 64, n),
        "smooth_factor": (k,),
        "proj_down": (k, rank),
        "proj_up": (n, rank),
    }


def _w4a16_shapes(shapes: Shapes) -> Shapes | None:
    """The shapes that fit the codes; None where none do."""
    if len(shapes["qweight"]) != 2:
        return None
    n, k = shapes["qweight"][0] * 4, shapes["qweight"][1] * 2
    groups = shapes["wscales"][0]
    if k % 64 or groups not in (k // 64, swizzle.awq_groups(k)):
        return None
    return {"qweight": (n // 4, k // 2), "wscales": (groups, n), "wzeros": (groups, n)}
