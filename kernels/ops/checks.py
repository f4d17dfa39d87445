"""What every op refuses, in words that name the argument, its shape and the rule: ValueError,
before anything is computed.

Compiled code takes bare pointers, so it is these checks that keep a wrong shape or a tensor of
another device from becoming a wrong memory access. They run in front of every backend, so that all
of them refuse alike. Here are the rules that the families share; each op's own check stands in its
family's file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import GROUP


def floats(x: Tensor) -> int:
    """K of a floating-point x (..., K)."""
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(
            f"x must be a floating-point tensor (..., K), not {x.dtype} {tuple(x.shape)}"
        )
    return x.shape[-1]


def features(x: Tensor) -> int:
    """K of a floating-point x (..., K) with K in whole groups."""
    k = floats(x)
    whole_groups("K", k)
    return k


def whole_groups(name: str, size: int) -> None:
    if size % GROUP:
        raise ValueError(f"{name}={size} is not a multiple of the group size {GROUP}")


def outputs(weight: Tensor, k: int, name: str = "weight") -> int:
    """N of packed 4-bit codes (N, K/2)."""
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ValueError(
            f"{name} must be packed int8 (N, K/2), not {weight.dtype} {tuple(weight.shape)}"
        )
    n, half = weight.shape
    if half * 2 != k:
        raise ValueError(f"{name} {tuple(weight.shape)} holds K={half * 2} columns and x has K={k}")
    return n


def rank(name: str, projection: Tensor) -> int:
    """R of a projection (K, R) or (N, R)."""
    if projection.dim() != 2:
        raise ValueError(f"{name} is {tuple(projection.shape)} and must have two dimensions")
    return projection.shape[1]


def shape(name: str, tensor: Tensor | None, rule: str, *wanted: int) -> None:
    if tensor is not None and tensor.shape != wanted:
        raise ValueError(f"{name} is {tuple(tensor.shape)} and must be {rule} = {tuple(wanted)}")


def same_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device} and the activations are on {device}")


def no_leading_shape(op: str, x: Tensor, instead: str = "") -> None:
    """An op of tokens takes a matrix of them; `instead` names the op that takes any shape."""
    if x.dim() != 2:
        hint = f"; {instead} takes any leading shape" if instead else ""
        raise ValueError(f"{op} takes x (M, K), not {tuple(x.shape)}{hint}")
