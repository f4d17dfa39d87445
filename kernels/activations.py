"""How many bits the activations of a W4A4 layer get on a device that may choose: 4, or 8 where
products of 8-bit codes cost no more than those of 4-bit ones.

The layer does not change: its smoothed values get codes -127..127 instead of -7..7. What that costs
is a matter of the matrix units. Where int4 products run at twice the rate of int8 (Turing, Ampere,
Ada), the product takes up to twice as long; where codes are widened to 8 bits anyway (Blackwell,
AMD, Intel, CPU), it takes as long and reads twice the bytes of activations. Hopper multiplies
either by wgmma; 8-bit ones take up to a tenth longer, by count. Rates are the vendors'; whole
layers are not yet measured on any GPU. On a CPU with AVX2 both take the same time
(kernels/README.md).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .backends import native, triton
from .backends.choose import NAMES, choose


class ActBits(NamedTuple):
    """bits: 4 or 8; why: in words, for whoever loads a model."""

    bits: int
    why: str


INT4_UNITS = ActBits(4, "int4 products are up to twice as fast as int8 ones here")
WIDENED = ActBits(8, "codes of 4 bits are multiplied as 8-bit ones here anyway")
ON_HOPPER = ActBits(8, "products of 8-bit codes take little longer here")
IN_BFLOAT16 = ActBits(8, "codes of either width are multiplied in bfloat16 here")
FIRST_WIDENED = 90
"""Compute capability from which on NVIDIA's GPUs have no int4 products: Hopper."""


def by_architecture(device: torch.device) -> ActBits:
    """What a device's matrix units are made for, whatever is compiled for it."""
    if device.type != "cuda" or torch.version.hip:
        return WIDENED
    capability = triton.gpu(device).capability
    if capability in native.WITHOUT_INT8:
        return IN_BFLOAT16
    if capability < FIRST_WIDENED:
        return INT4_UNITS
    return ON_HOPPER if capability < 100 else WIDENED


def act_bits(
    device: torch.device | str, dtype: torch.dtype = torch.bfloat16, fitted: int = 4
) -> ActBits:
    """What a layer that may run with either gets on a device, for activations and parameters of
    `dtype`. fitted: the width that it was made for, which decides where both run in plain torch.

    8 never where 4 would go a faster way.
    """
    device = torch.device(device)
    best = by_architecture(device)
    if best.bits == 4:
        return best
    ways = {width: choose("linear_w4a4", device, dtype, (dtype,), width) for width in (4, 8)}
    if ways[8].backend != "reference":
        return best
    if ways[4].backend == "reference":
        return ActBits(fitted, f"either width runs in {NAMES['reference']} here")
    return ActBits(4, f"8 bits would run in {NAMES['reference']} here, 4 faster")
