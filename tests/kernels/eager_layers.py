"""Layers for the tests of eager calls."""

import torch

from cases import Case, make_vq, make_w4a4, make_w4a8, make_w4a16
from nibble.kernels.ops import vq, w4a4, w4a8, w4a16

CASE = Case("eager", 3, 128, 192, R=16)
OPS = ("linear_w4a4", "linear_w4a8", "linear_w4a16", "linear_vq")
EAGER = {
    "linear_w4a4": w4a4._eager_linear,
    "linear_w4a8": w4a8._eager_linear,
    "linear_w4a16": w4a16._eager_linear,
    "linear_vq": vq._eager_linear,
}
CODES = dict.fromkeys(OPS, "weight") | {"linear_vq": "indices"}


def make(op: str, dtype: torch.dtype = torch.float32) -> dict:
    if op == "linear_w4a4":
        return make_w4a4(CASE, dtype)
    if op == "linear_w4a8":
        return make_w4a8(CASE, dtype)
    if op == "linear_w4a16":
        return make_w4a16(CASE, dtype)
    return make_vq(CASE, 8, 4, dtype) | {"proj_down": None, "proj_up": None}


def through_dispatcher(op: str, x, parameters: dict):
    return getattr(torch.ops.nibble, op)(x, **parameters)
