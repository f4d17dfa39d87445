"""Compiled code behind one interface: an op's arguments by name become the bytes of a `Call` of
csrc/calls.h, and the door that it was opened through takes them.

A door is the Python module `nibble_kernels` or the C library of `cpu_library`. Bytes are laid out
as the compiler lays out structs, each number checked for its range; what the numbers say is checked
behind the door (csrc/check.h).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from operator import itemgetter
from typing import Any

from .cubins import structs

_FORMATS = {structs.SIZE: "q", structs.POINTER: "P", structs.INT: "i", structs.BOOL: "?"}
_PLACE = ("device", "stream", "zero", "threads", "isa", "zero")
"""Target of nibble.h; its capability and whether it waits are set by the compiled code itself."""
_ALIGNED = "0q"

_LINEAR = structs.struct(
    "LinearW4A4",
    "M:i N:i K:i R:i x:p x_stride:i x_dtype:e smooth:p proj_down:p weight:p weight_scale:p"
    " proj_up:p bias:p param_dtype:e act_unsigned:b rotate:b unsigned_from:i codes:e out:p"
    " scratch:p",
)


def _names(struct_type: Any, **renamed: str) -> list[str]:
    return [renamed.get(field[0], field[0]) for field in struct_type._fields_]


_FUSED = [
    *_names(structs.GemmW4A4Up, out="zero", out_dtype="mid_dtype", workspace="zero"),
    *_names(structs.GemmW4A4UpGeluQuantizeDown)[1:],
]
_WORKSPACE = {"workspace": 0, "workspace_size": 0}
_SCRATCH = {"scratch": 0, "scratch_size": 0}
_CALLS: dict[str, tuple[Any, list[str], dict[str, int]]] = {
    "quantize_down": (structs.QuantizeDown, _names(structs.QuantizeDown), {}),
    "gemm_w4a4_up": (structs.GemmW4A4Up, _names(structs.GemmW4A4Up), _WORKSPACE),
    "gemm_w4a4_up_gelu_quantize_down": (structs.GemmW4A4UpGeluQuantizeDown, _FUSED, _WORKSPACE),
    "linear_w4a4": (_LINEAR, _names(_LINEAR), _SCRATCH),
    "gemv_w4a16": (structs.W4A16, _names(structs.W4A16), {}),
    "gemm_w4a16": (structs.W4A16, _names(structs.W4A16), {}),
    "gemm_vq": (structs.GemmVQ, _names(structs.GemmVQ), {}),
    "linear_w4a8": (structs.LinearW4A8, _names(structs.LinearW4A8), _SCRATCH),
    "quantize_nvfp4_down": (structs.QuantizeNvfp4Down, _names(structs.QuantizeNvfp4Down), {}),
    "gemm_nvfp4_up": (structs.GemmNvfp4Up, _names(structs.GemmNvfp4Up), {}),
}
"""Of each op: its struct, the names by which Python gives the fields, and what may be left out."""


def _format(struct_type: Any) -> str:
    """A ctypes struct as the `struct` module writes it; one that lies in another is aligned."""
    parts = []
    for _, kind in struct_type._fields_:
        nested = hasattr(kind, "_fields_")
        parts.append(_ALIGNED + _format(kind) + _ALIGNED if nested else _FORMATS[kind])
    return "".join(parts)


def _caller(op: str, door: Callable[[bytes], None]) -> Callable[..., None]:
    """The op as a function of keywords. Raises TypeError for a name or number that does not fit."""
    struct_type, fields, optional = _CALLS[op]
    size = next((name for name in optional if name.endswith("_size")), "zero")
    names = (*_PLACE, *fields, size)
    layout = struct.Struct("@iPiii?" + _ALIGNED + _format(struct_type) + _ALIGNED + "q")
    pack, pick = layout.pack, itemgetter(*names)
    left_out = {"zero": 0, **optional}
    known = len(set(names))

    def call(**arguments: Any) -> None:
        given = {**left_out, **arguments}
        try:
            packed = pack(*pick(given))
        except KeyError as error:
            raise TypeError(f"{op}: {error.args[0]} is missing") from error
        except struct.error as error:
            raise TypeError(f"{op}: {error}, in {arguments}") from error
        if len(given) > known:
            raise TypeError(f"{op}: no such arguments: {sorted(given.keys() - set(names))}")
        door(packed)

    return call


class Compiled:
    """The interface of native.py's docstring over a door.

    kind: "extension" or "library"; name: the same in words.
    """

    def __init__(self, door: Any, kind: str, name: str):
        self.kind, self.name = kind, name
        self.ABI, self.__version__ = door.ABI, door.__version__
        self.DEVICES, self.__file__ = door.DEVICES, door.__file__
        for op in _CALLS:
            setattr(self, op, _caller(op, getattr(door, op)))
        for question in ("capability", "codes", "route", "workspace_bytes", "linear_w4a4_bytes"):
            setattr(self, question, getattr(door, question))
        self.cpu_isas, self.build_info = door.cpu_isas, door.build_info
