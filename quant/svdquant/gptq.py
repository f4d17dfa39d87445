"""Rounding weights to int4 in groups of 64: the scale of each group, and GPTQ's order of rounding.

GPTQ (Frantar et al., 2022, arXiv:2210.17323, algorithm 1) rounds one column after another and moves
each column's error to the columns not yet rounded, along the inverse Hessian. Here on
block-diagonal Hessians, all blocks at once; groups are rounded in the order of their energy, and so
are the columns inside a group, while groups stay 64 neighbouring columns on disk.

Working layout: (groups or blocks, columns, N), so that a column of the weight is contiguous.
"""

import torch
from torch import Tensor

from ..calibration.hessian import inverse_factor

SHRINK = (1.0, 0.93, 0.86, 0.79)  # searched range of a group, as a share of its absmax


def _chunk(columns: int, device: torch.device, cpu: int) -> int:
    """Rows of a weight worked on at once: what a CPU's cache holds (cpu weights), or what a GPU's
    memory spares.
    """
    return max(16, (cpu if device.type == "cpu" else 2**26) // columns)


def stored(scale: Tensor) -> Tensor:
    """A scale as the file holds it: through bf16, in float32."""
    return scale.bfloat16().float()


def round_codes(w: Tensor, scale: Tensor) -> Tensor:
    """w (…, 64, n) and scale (…, 1, n), possibly negative or zero → float codes -8..7."""
    return (w / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(-8, 7)


def group_scales(w: Tensor, importance: Tensor, search: bool) -> Tensor:
    """Scales (…, 1, n) of groups w (…, 64, n), bf16-exact; importance (…, 64, 1) weighs the
    columns' squared errors.

    Plain: absmax / 7. Searched: also clipped ranges, and negative scales, whose code -8 serves the
        largest positive weight; the best
    is refined by least squares for its codes.
    """
    largest = w.abs().amax(-2, keepdim=True)
    if not search:
        return stored(largest / 7)
    top, bottom = w.amax(-2, keepdim=True), w.amin(-2, keepdim=True)
    full = torch.where(top > -bottom, -top, -bottom) / 8  # the sign that lets -8 reach the extreme
    best = stored(largest / 7)
    error = _loss(w, best, importance)
    for candidate in [largest / 7 * r for r in SHRINK[1:]] + [full * r for r in SHRINK]:
        candidate = stored(candidate)
        loss = _loss(w, candidate, importance)
        best, error = torch.where(loss < error, candidate, best), torch.minimum(loss, error)
    codes = round_codes(w, best)
    weighted = codes * importance
    refined = stored(
        (weighted * w).sum(-2, keepdim=True)
        / weighted.mul_(codes).sum(-2, keepdim=True).clamp_min(1e-30)
    )
    return torch.where(_loss(w, refined, importance) < error, refined, best)


def _loss(w: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    return (
        round_codes(w, scale).mul_(scale).sub_(w).square_().mul_(importance).sum(-2, keepdim=True)
    )


def round_to_nearest(weight: Tensor, importance: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """weight (N, K), importance (K,) → codes int8 (N, K), scale float32 (K/64, N)."""
    n, k = weight.shape
    weigh = importance.reshape(k // 64, 64, 1)
    codes = torch.empty(k // 64, 64, n, dtype=torch.int8, device=weight.device)
    scale = torch.empty(k // 64, 1, n, device=weight.device)
    step = _chunk(k, weight.device, 2**18)
    for start in range(0, n, step):
        part = weight[start : start + step].T.reshape(k // 64, 64, -1)
        scale[..., start : start + step] = group_scales(part, weigh, search)
        codes[..., start : start + step] = round_codes(part, scale[..., start : start + step])
    return codes.reshape(k, n).T.contiguous(), scale[:, 0]


def rounding_order(diagonal: Tensor) -> Tensor:
    """Diagonal of the Hessian (K/B, B) → order of columns (K/B, B): groups by energy, columns by
    energy inside their group.
    """
    groups = diagonal.unflatten(1, (-1, 64))
    inside = groups.argsort(dim=-1, descending=True, stable=True)
    outside = groups.sum(-1).argsort(dim=-1, descending=True, stable=True)
    picked = inside.gather(1, outside[..., None].expand_as(inside)) + outside[..., None] * 64
    return picked.flatten(1)


def gptq(weight: Tensor, hessian: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """weight (N, K), hessian (K/B, B, B) positive definite → codes int8 (N, K), scale float32
    (K/64, N).
    """
    (n, k), (blocks, b) = weight.shape, hessian.shape[:2]
    order = rounding_order(hessian.diagonal(dim1=1, dim2=2))
    rows = torch.arange(blocks, device=order.device)[:, None]
    factor = inverse_factor(hessian[rows[..., None], order[:, :, None], order[:, None, :]])
    flat = (order + rows * b).flatten()
    codes = torch.empty(k, n, dtype=torch.int8, device=weight.device)
    scale = torch.empty(k // 64, n, device=weight.device)
    step = _chunk(k, weight.device, 2**20)
    for start in range(0, n, step):
        part = weight[start : start + step].T[flat].reshape(blocks, b, -1)
        part_codes, part_scale = _gptq_columns(part, factor, search)
        codes[flat, start : start + step] = part_codes.flatten(0, 1)
        scale[flat[::64] // 64, start : start + step] = part_scale.flatten(0, 1)
    return codes.T.contiguous(), scale


def _gptq_columns(w: Tensor, factor: Tensor, search: bool) -> tuple[Tensor, Tensor]:
    """w (blocks, B, n) in rounding order, changed in place → codes int8 (blocks, B, n), scale
    (blocks, B/64, n).
    """
    blocks, b, n = w.shape
    codes = torch.empty(blocks, b, n, dtype=torch.int8, device=w.device)
    scales = torch.empty(blocks, b // 64, n, device=w.device)
    pivots = factor.diagonal(dim1=1, dim2=2)
    for g in range(b // 64):
        here, later = slice(64 * g, 64 * g + 64), slice(64 * g + 64, b)
        group, u = w[:, here], factor[:, here, here]
        scale = group_scales(group, pivots[:, here, None] ** -2, search)
        errors = torch.empty_like(group)
        for j in range(64):
            code = round_codes(group[:, j : j + 1], scale)
            errors[:, j : j + 1] = (group[:, j : j + 1] - code * scale) / u[:, j : j + 1, j : j + 1]
            group[:, j + 1 :].baddbmm_(u[:, j : j + 1, j + 1 :].mT, errors[:, j : j + 1], alpha=-1)
            codes[:, 64 * g + j] = code[:, 0]
        w[:, later].baddbmm_(factor[:, here, later].mT, errors, alpha=-1)
        scales[:, g] = scale[:, 0]
    return codes, scales
