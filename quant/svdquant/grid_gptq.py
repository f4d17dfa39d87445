"""GPTQ (Frantar et al., 2022, arXiv:2210.17323, algorithm 1) on any grid of `grids.py`, in groups
of 16 columns. The int4 of groups of 64 has its own, `gptq.py`, where layout and order are told.
"""

import torch
from torch import Tensor

from ..calibration.hessian import inverse_factor
from .grids import GROUP, Grid

_CPU_WEIGHTS, _GPU_WEIGHTS = 2**19, 2**25  # worked on at once


def _rows(columns: int, device: torch.device) -> int:
    return max(16, (_CPU_WEIGHTS if device.type == "cpu" else _GPU_WEIGHTS) // columns)


def round_to_nearest(weight: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """weight (N, K), importance (K,) of its columns → codes int64 (N, K), scale float32 (K/16,
    N).
    """
    n, k = weight.shape
    weigh = importance.reshape(k // GROUP, GROUP, 1)
    codes = torch.empty(k, n, dtype=torch.int64, device=weight.device)
    scale = torch.empty(k // GROUP, n, device=weight.device)
    step = _rows(k, weight.device)
    for start in range(0, n, step):
        rows = grid.part(start, start + step)
        part = weight[start : start + step].T.reshape(k // GROUP, GROUP, -1)
        found = rows.group_scale(part, weigh)
        codes[:, start : start + step] = rows.codes(part, found).flatten(0, 1)
        scale[:, start : start + step] = found[:, 0]
    return codes.T.contiguous(), scale


def gptq(weight: Tensor, hessian: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """weight (N, K), hessian (K/B, B, B) positive definite → codes int64 (N, K), scale float32
    (K/16, N).
    """
    (n, k), (blocks, b) = weight.shape, hessian.shape[:2]
    order = _order(hessian.diagonal(dim1=1, dim2=2))
    row = torch.arange(blocks, device=order.device)[:, None]
    factor = inverse_factor(hessian[row[..., None], order[:, :, None], order[:, None, :]])
    flat = (order + row * b).flatten()
    codes = torch.empty(k, n, dtype=torch.int64, device=weight.device)
    scale = torch.empty(k // GROUP, n, device=weight.device)
    step = _rows(k, weight.device)
    for start in range(0, n, step):
        part = weight[start : start + step].T[flat].reshape(blocks, b, -1)
        found, scales = _columns(part, factor, grid.part(start, start + step))
        codes[flat, start : start + step] = found.flatten(0, 1)
        scale[flat[::GROUP] // GROUP, start : start + step] = scales.flatten(0, 1)
    return codes.T.contiguous(), scale


def _order(diagonal: Tensor) -> Tensor:
    """Diagonal of the Hessian (K/B, B) → order of columns: groups by energy, columns by energy
    inside their group.
    """
    groups = diagonal.unflatten(1, (-1, GROUP))
    inside = groups.argsort(dim=-1, descending=True, stable=True)
    outside = groups.sum(-1).argsort(dim=-1, descending=True, stable=True)
    picked = inside.gather(1, outside[..., None].expand_as(inside)) + outside[..., None] * GROUP
    return picked.flatten(1)


def _columns(w: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """w (blocks, B, n) in rounding order, changed in place → codes (blocks, B, n), scale (blocks,
    B/16, n).
    """
    blocks, b, n = w.shape
    codes = torch.empty(blocks, b, n, dtype=torch.int64, device=w.device)
    scales = torch.empty(blocks, b // GROUP, n, device=w.device)
    pivots = factor.diagonal(dim1=1, dim2=2)
    for g in range(b // GROUP):
        here, later = slice(GROUP * g, GROUP * g + GROUP), slice(GROUP * g + GROUP, b)
        group, u = w[:, here], factor[:, here, here]
        scale = grid.group_scale(group, pivots[:, here, None] ** -2)
        errors = torch.empty_like(group)
        for j in range(GROUP):
            code = grid.codes(group[:, j : j + 1], scale)
            value = grid.values(code, scale)
            errors[:, j : j + 1] = (group[:, j : j + 1] - value) / u[:, j : j + 1, j : j + 1]
            group[:, j + 1 :].baddbmm_(u[:, j : j + 1, j + 1 :].mT, errors[:, j : j + 1], alpha=-1)
            codes[:, GROUP * g + j] = code[:, 0]
        w[:, later].baddbmm_(factor[:, here, later].mT, errors, alpha=-1)
        scales[:, g] = scale[:, 0]
    return codes, scales
