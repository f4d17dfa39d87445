"""The emulated linear of weights that are read as int8 as a function of torch tensors: see
`emulated`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nibble.kernels.backends.cubins.structs import LinearW4A8
from nibble.kernels.params import W4A8Params

from .emulated import DTYPES, _at, _call, _unset, _workspace

INT8 = 2


def linear_w4a8(x: Tensor, p: W4A8Params, capability: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out (M, N), codes int8 (M, K), scales (M,) and h (M, R). Rows of x may lie apart."""
    (m, k), n = x.shape, len(p.weight)
    rank = 0 if p.proj_down is None else p.proj_down.shape[1]
    scratch = _workspace("linear_w4a8", capability, m, n, k, rank, INT8)
    out = _unset(m, n, dtype=x.dtype)
    op = LinearW4A8(
        m, n, k, rank, k // len(p.weight_scale), _at(x), x.stride(0), DTYPES[x.dtype],
        _at(p.smooth_factor), _at(p.proj_down), _at(p.weight), _at(p.weight_scale),
        _at(p.weight_channel_scale), _at(p.weight_table), _at(p.proj_up), _at(p.bias),
        DTYPES[p.smooth_factor.dtype], p.rotation != 0, _at(out), _at(scratch),
    )  # fmt: skip
    _call("linear_w4a8", op, capability)
    scales = -(-m * k // 256) * 256
    h = scales + -(-4 * m // 256) * 256
    return (
        out,
        scratch[: m * k].view(m, k),
        scratch[scales : scales + 4 * m].view(torch.float32),
        scratch[h : h + 4 * m * rank].view(torch.float32).view(m, rank),
    )
