"""Rounding weights to a grid of 4-bit codes: to nearest, or in GPTQ's order.

GPTQ (Frantar et al., 2022, arXiv:2210.17323, algorithm 1) rounds one column after another and moves
each column's error to the columns not yet rounded, along the inverse Hessian. Here on
block-diagonal Hessians, all blocks at once; groups are rounded in the order of their energy, and so
are the columns inside a group, while groups stay neighbouring columns on disk.

Columns that were rounded first never learn how later ones came out. So they are gone over once
more: with all others as they are, a column's best value is q + [H (w - q)] / H_jj, rounded
(coordinate descent: QuantEase, Behdin et al., 2023, arXiv:2309.01885, eq. 12). Scales stay.

Working layout: (groups or blocks, columns, N), so that a column of the weight is contiguous.
"""

import itertools

import torch
from torch import Tensor

from ..calibration.hessian import inverse_factor
from .grid import EvenGrid, Grid, Rounded

TILE_ROWS = 2048  # of a weight that is rounded to nearest: a column of them is one long loop


def _chunk(columns: int, device: torch.device, cpu: int) -> int:
    """Rows, or groups, of a weight worked on at once: what a CPU's cache holds (cpu weights), or
    what a GPU's memory spares.
    """
    return max(1, (cpu if device.type == "cpu" else 2**26) // columns)


def round_to_nearest(weight: Tensor, importance: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """weight (N, K), importance (K,) → codes int8 (N, K), scale float32 (K/64, N)."""
    found = nearest_on(EvenGrid(search), weight, importance)
    return found.codes, found.scale


def nearest_on(
    grid: Grid, weight: Tensor, importance: Tensor, near: Tensor | None = None
) -> Rounded:
    """weight (N, K) with each group at its own best scale; importance (K,) of the columns; near
    (K/g, N): scales of a weight close to this one.
    """
    (n, k), g = weight.shape, grid.group
    weigh = importance.reshape(k // g, g, 1)
    codes = torch.empty(k // g, g, n, dtype=torch.int8, device=weight.device)
    scale = torch.empty(k // g, 1, n, device=weight.device)
    rows = min(n, TILE_ROWS)
    several = _chunk(g * rows, weight.device, 2**17)
    for start, first in itertools.product(range(0, n, rows), range(0, k // g, several)):
        part, some = slice(start, start + rows), slice(first, first + several)
        columns = weight[part, first * g : (first + several) * g]
        groups, on = columns.T.reshape(-1, g, len(columns)), grid.rows(part)
        if near is None:
            found = on.scales(groups, weigh[some])
        else:
            found = on.scales_near(groups, weigh[some], near[some, None, part])
        scale[some, :, part] = found
        codes[some, :, part] = on.codes(groups, found)
    return Rounded(codes.reshape(k, n).T.contiguous(), scale[:, 0], grid)


def rounding_order(diagonal: Tensor, group: int = 64) -> Tensor:
    """Diagonal of the Hessian (K/B, B) → order of columns (K/B, B): groups by energy, columns by
    energy inside their group.
    """
    groups = diagonal.unflatten(1, (-1, group))
    inside = groups.argsort(dim=-1, descending=True, stable=True)
    outside = groups.sum(-1).argsort(dim=-1, descending=True, stable=True)
    picked = inside.gather(1, outside[..., None].expand_as(inside)) + outside[..., None] * group
    return picked.flatten(1)


def gptq(weight: Tensor, hessian: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """weight (N, K), hessian (K/B, B, B) positive definite → codes int8 (N, K), scale float32
    (K/64, N).
    """
    found = gptq_on(EvenGrid(search), weight, hessian)
    return found.codes, found.scale


def gptq_on(grid: Grid, weight: Tensor, hessian: Tensor, twice: bool = True) -> Rounded:
    """weight (N, K) on a grid, by a Hessian (K/B, B, B), positive definite. twice: every column is
    gone over once more, which brings 0.2 to 0.5 dB (demo) where the inputs' own error is small, and
    nothing where they have 4 bits.
    """
    (n, k), (blocks, b), g = weight.shape, hessian.shape[:2], grid.group
    order = rounding_order(hessian.diagonal(dim1=1, dim2=2), g)
    rows = torch.arange(blocks, device=order.device)[:, None]
    factor = inverse_factor(hessian[rows[..., None], order[:, :, None], order[:, None, :]])
    flat = (order + rows * b).flatten()
    codes = torch.empty(k, n, dtype=torch.int8, device=weight.device)
    scale = torch.empty(k // g, n, device=weight.device)
    step = _chunk(k, weight.device, 2**20)
    for start in range(0, n, step):
        part = slice(start, start + step)
        columns = weight[part].T[flat].reshape(blocks, b, -1)
        part_codes, part_scale = _gptq_columns(columns, factor, grid.rows(part))
        codes[flat, part] = part_codes.flatten(0, 1)
        scale[flat[::g] // g, part] = part_scale.flatten(0, 1)
        if twice:
            wanted, found = weight[part].T.reshape(blocks, b, -1), (codes[:, part], scale[:, part])
            codes[:, part] = _once_more(wanted, *found, hessian, grid.rows(part))
    return Rounded(codes.T.contiguous(), scale, grid)


def _once_more(w: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor, grid: Grid) -> Tensor:
    """w (blocks, B, n), codes int8 (K, n) and scale (K/g, n) as on disk → codes (K, n), of no
    larger error.
    """
    (blocks, b, n), size = w.shape, grid.group
    codes = codes.reshape(blocks, b, n).clone()
    scales = scale.reshape(blocks, b // size, 1, n)
    values = grid.dense(codes.reshape(-1, n).T, scale).T.reshape(blocks, b, n)
    pull = hessian @ (w - values)
    pivots = hessian.diagonal(dim1=1, dim2=2)[..., None]
    for g in range(b // size):
        here = slice(size * g, size * g + size)
        group, near = pull[:, here].clone(), hessian[:, here, here]
        moved = torch.empty_like(group)
        for j in range(size):
            column = slice(size * g + j, size * g + j + 1)
            best = values[:, column] + group[:, j : j + 1] / pivots[:, column]
            code = grid.codes(best, scales[:, g])
            moved[:, j : j + 1] = grid.values(code, scales[:, g]) - values[:, column]
            group.baddbmm_(near[:, :, j : j + 1], moved[:, j : j + 1], alpha=-1)
            codes[:, column] = code.to(torch.int8)
        pull.baddbmm_(hessian[:, :, here], moved, alpha=-1)
    return codes.reshape(-1, n)


def _gptq_columns(w: Tensor, factor: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """w (blocks, B, n) in rounding order, changed in place → codes int8 (blocks, B, n), scale
    (blocks, B/g, n).
    """
    (blocks, b, n), size = w.shape, grid.group
    codes = torch.empty(blocks, b, n, dtype=torch.int8, device=w.device)
    scales = torch.empty(blocks, b // size, n, device=w.device)
    pivots = factor.diagonal(dim1=1, dim2=2)
    for g in range(b // size):
        here, later = slice(size * g, size * g + size), slice(size * g + size, b)
        group, u = w[:, here], factor[:, here, here]
        scale = grid.scales(group, pivots[:, here, None] ** -2)
        errors = torch.empty_like(group)
        for j in range(size):
            code = grid.codes(group[:, j : j + 1], scale)
            missed = group[:, j : j + 1] - grid.values(code, scale)
            errors[:, j : j + 1] = missed / u[:, j : j + 1, j : j + 1]
            group[:, j + 1 :].baddbmm_(u[:, j : j + 1, j + 1 :].mT, errors[:, j : j + 1], alpha=-1)
            codes[:, size * g + j] = code[:, 0]
        w[:, later].baddbmm_(factor[:, here, later].mT, errors, alpha=-1)
        scales[:, g] = scale[:, 0]
    return codes, scales
