"""The emulated kernels of 4-bit floats as functions of torch tensors: see `emulated`."""

from __future__ import annotations

import torch
from torch import Tensor

from nibble.kernels.backends.cubins.structs import GemmNvfp4Up, QuantizeNvfp4Down
from nibble.kernels.params import NVFP4Params

from .emulated import DTYPES, _at, _call, _unset

CAPABILITY = 120


def quantize_nvfp4_down(
    x: Tensor, p: NVFP4Params, capability: int = CAPABILITY
) -> tuple[Tensor, Tensor, Tensor]:
    """(q int8 (M, K/2), ascales e4m3 (M, K/16), h (M, R)). Rows of x may lie apart."""
    (m, k), r = x.shape, p.proj_down.shape[1]
    q, ascales = _unset(m, k // 2, dtype=torch.int8), _unset(m, k // 16, dtype=torch.int8)
    h = _unset(m, r, dtype=torch.float32)
    op = QuantizeNvfp4Down(
        m, k, r, _at(x), x.stride(0), DTYPES[x.dtype], _at(p.smooth_factor), _at(p.proj_down),
        DTYPES[p.proj_down.dtype], p.rounded, _at(q), _at(ascales), _at(h),
    )  # fmt: skip
    _call("quantize_nvfp4_down", op, capability)
    return q, ascales.view(torch.float8_e4m3fn), h


def gemm_nvfp4_up(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    p: NVFP4Params,
    out_dtype: torch.dtype,
    capability: int = CAPABILITY,
) -> Tensor:
    """(M, N) in `out_dtype`."""
    m, (n, half), r = len(q), p.weight.shape, p.proj_up.shape[1]
    out = _unset(m, n, dtype=out_dtype)
    op = GemmNvfp4Up(
        m, n, 2 * half, r, _at(q), _at(ascales), _at(h), _at(p.weight), _at(p.weight_scale),
        _at(p.weight_scale_2), _at(p.proj_up), _at(p.bias), DTYPES[p.proj_up.dtype], _at(out),
        DTYPES[out_dtype],
    )  # fmt: skip
    _call("gemm_nvfp4_up", op, capability)
    return out
