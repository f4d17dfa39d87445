"""Linears of 4-bit floats through compiled kernels: tensors into pointers.

Weights and scales are read as they lie in the file. For GPUs of compute capability 12.0 and 12.1
(RTX 50, RTX PRO 6000, DGX Spark); not yet measured.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..params import NVFP4Params
from ..reference.nvfp4 import COLUMNS
from . import native, nvfp4
from .native import DTYPES, dense, dense_as, dense_rows, optional_as, row_stride


@functools.lru_cache(maxsize=16)
def tried(device: torch.device) -> tuple[bool, str]:
    """Whether the kernels give the reference's numbers on a GPU, and why (not); for whoever has
    asked `native.serves`.
    """
    linear = functools.partial(linear_nvfp4, torch.bfloat16)
    right, why = nvfp4.tried(linear, device, "the compiled product")
    return right, f"{why}; {native.serving(device)[1]}" if right else why


def operands(p: NVFP4Params, dtype: torch.dtype) -> NVFP4Params:
    """Dense and of one dtype; the same tensors where they are so already."""
    return p._replace(
        weight=dense(p.weight),
        weight_scale=dense(p.weight_scale),
        weight_scale_2=dense_as(p.weight_scale_2, torch.float32),
        smooth_factor=dense_as(p.smooth_factor, dtype),
        proj_down=dense_as(p.proj_down, dtype),
        proj_up=dense_as(p.proj_up, dtype),
        bias=optional_as(p.bias, dtype),
    )


def linear_nvfp4(dtype: torch.dtype, x: Tensor, p: NVFP4Params, rows: int = 0) -> Tensor:
    """x (M, K) -> (M, N) in x.dtype. dtype: what the parameters are brought to first. rows: tokens
    of a tile where it is not left to the GPU, on cubins alone.
    """
    p, x, (m, k), device = operands(p, dtype), dense_rows(x), x.shape, x.device
    (n, rank), extension = p.proj_up.shape, native.on(x.device)
    shared = {"M": m, "K": k, "R": rank, "param_dtype": DTYPES[dtype]}
    # `owner` is read nowhere: it keeps the scratch memory alive until the calls have returned.
    owner, (q, ascales, h) = native.scratch(device, m * k // 2, m * k // COLUMNS, m * rank * 4)
    shared |= {"q": q, "ascales": ascales, "h": h}
    extension.quantize_nvfp4_down(
        **native.place(device),
        **shared,
        x=x.data_ptr(),
        x_stride=row_stride(x),
        x_dtype=DTYPES[x.dtype],
        smooth=p.smooth_factor.data_ptr(),
        proj_down=p.proj_down.data_ptr(),
        rounded=p.rounded,
    )
    out = torch.empty((m, n), dtype=x.dtype, device=device)
    extension.gemm_nvfp4_up(
        **native.place(device, rows),
        **shared,
        N=n,
        weight=p.weight.data_ptr(),
        weight_scale=p.weight_scale.data_ptr(),
        weight_scale_2=p.weight_scale_2.data_ptr(),
        proj_up=p.proj_up.data_ptr(),
        bias=native.address(p.bias),
        out=out.data_ptr(),
        out_dtype=DTYPES[x.dtype],
    )
    return out
