"""Smoothing that was fused upstream, taken out again.

Where deepcompressor finds attention's output smoothed by s, it may divide the rows that make the
values (V) by s and multiply the output linear's columns, so that no smoothing is left to do at run
time: `smooth` is then all ones, and s stands in `smooth_orig`. Such a file computes the right
thing, but a LoRA made for the original layers would meet values and columns of another size. So s
goes back to where it came from:

    output linear   smooth = s,  proj_down / s             values   scale * s,  proj_up * s,  bias *
      s

Codes and s stay as they are; scales, factors and biases that meet s are computed again and rounded
once more in their own dtype: such a weight is up to 2^-9 of its size (bfloat16) away from the
published one. float32 would keep them, but a file's parameters are in 16 bits, and so are those
that GPU kernels take (`kernels/backends/native.py`).
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..weights.svdquant_w4a4 import SVDQuantWeight
from . import swizzle
from .names import Family


def find_fused(
    family: Family, modules: set[str], read: Callable[[str], Tensor], stored: Callable[[str], bool]
) -> dict[str, Tensor]:
    """Module (an output linear, or the one with the values before it) → s (K,), for every module of
    `modules` whose smoothing was fused.
    """
    found: dict[str, Tensor] = {}
    for module in sorted(modules):
        pattern, number = family.numbered(module)
        if pattern not in family.fused or not stored(f"{module}.smooth_factor_orig"):
            continue
        smooth, original = (
            swizzle.vector_from_nunchaku(read(f"{module}.{suffix}"))
            for suffix in ("smooth_factor", "smooth_factor_orig")
        )
        values = [name.replace("#", number) for name in family.fused[pattern]]
        if (
            smooth.eq(1).all()
            and not original.eq(1).all()
            and original.ne(0).all()
            and modules >= set(values)
        ):
            found |= dict.fromkeys([module, *values], original)
    return found


def unfused(weight: SVDQuantWeight, s: Tensor) -> SVDQuantWeight:
    """A linear as it was before its smoothing s (K,) was fused: as an output linear where it reads
    K inputs as wide as it is high, else as the one that makes q, k and v, of which the last third
    of rows is the values.
    """
    n, k = weight.shape
    if n == k == len(s):
        return replace(
            weight,
            smooth_factor=s.clone(),
            proj_down=(weight.proj_down.float() / s.float()[:, None]).to(weight.proj_down.dtype),
        )
    factor = torch.cat([torch.ones(n - len(s), dtype=torch.float32), s.float()])

    def scaled(tensor: Tensor) -> Tensor:
        return (
            tensor.float()
            * (factor[:, None] if tensor.shape[0] == n and tensor.dim() == 2 else factor)
        ).to(tensor.dtype)

    return replace(
        weight,
        scale=scaled(weight.scale.t()).t().contiguous(),
        proj_up=scaled(weight.proj_up),
        bias=None if weight.bias is None else scaled(weight.bias),
    )
