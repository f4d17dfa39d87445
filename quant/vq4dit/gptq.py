"""Codes that make up for one another's errors: GPTQ on sub-vectors, and the best scale and codebook
for given codes.

The layer's squared output error is tr (W - Q) H (W - Q)^T, H = E[x x^T]. With U the upper Cholesky
factor of H^-1 and b the columns of one sub-vector, the error of choosing the codeword c for the
(already corrected) sub-vector v is |(v - c) U_bb^-1|^2: a plain nearest neighbour after turning
both by U_bb^-1. The columns not yet coded then take over (v - c) U_bb^-1 U_b,later. (GPTQ: Frantar
et al., 2022, arXiv:2210.17323; on vectors: GPTVQ, van Baalen et al., 2024, arXiv:2402.15319, which
uses the diagonal of U_bb alone.) Sub-vectors are coded in the order of their energy. Hessians are
block diagonal, all blocks at once.
"""

import torch
from torch import Tensor

from ..calibration.hessian import inverse_factor
from .codebook import smallest

CG_STEPS = 12
_CACHED, _SPARED = 1 << 18, 1 << 27  # scores held at once, on a CPU and on a GPU


def times(matrix: Tensor, hessian: Tensor) -> Tensor:
    """matrix (N, K) . block-diagonal H (K/B, B, B) → (N, K)."""
    n, k = matrix.shape
    return (
        torch.bmm(matrix.reshape(n, *hessian.shape[:2]).transpose(0, 1), hessian)
        .transpose(0, 1)
        .reshape(n, k)
    )


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr D H D^T of a difference D (N, K) of weights."""
    return (times(difference, hessian) * difference).sum().item()


def assign(weight: Tensor, hessian: Tensor, codebook: Tensor) -> Tensor:
    """Codes int64 (N, K/D) for a weight (N, K) in the codebook's units; hessian (K/B, B, B),
    positive definite once damped.
    """
    (n, k), (blocks, b), (c, d) = weight.shape, hessian.shape[:2], codebook.shape
    order = _order(hessian.diagonal(dim1=1, dim2=2), d)
    rows = torch.arange(blocks, device=order.device)[:, None]
    factor = inverse_factor(hessian[rows[..., None], order[:, :, None], order[:, None, :]])
    flat = (order + rows * b).flatten()
    codes = torch.empty(k // d, n, dtype=torch.int64, device=weight.device)
    step = max(16, (_CACHED if weight.device.type == "cpu" else _SPARED) // (blocks * c))
    for start in range(0, n, step):
        part = weight[start : start + step].T[flat].reshape(blocks, b, -1)
        codes[flat[::d] // d, start : start + step] = _assign_columns(
            part, factor, codebook
        ).flatten(0, 1)
    return codes.T.contiguous()


def _order(diagonal: Tensor, d: int) -> Tensor:
    """Diagonal of the Hessian (K/B, B) → order of columns (K/B, B): whole sub-vectors by falling
    energy.
    """
    energy = diagonal.unflatten(1, (-1, d)).sum(-1)
    first = energy.argsort(dim=-1, descending=True, stable=True) * d
    return (first[..., None] + torch.arange(d, device=first.device)).flatten(1)


def _assign_columns(w: Tensor, factor: Tensor, codebook: Tensor) -> Tensor:
    """w (blocks, B, n) in coding order, changed in place → codes (blocks, B/D, n)."""
    blocks, b, n = w.shape
    d = codebook.shape[1]
    codes = torch.empty(blocks, b // d, n, dtype=torch.int64, device=w.device)
    eye = torch.eye(d, device=w.device).expand(blocks, d, d)
    ones = w.new_ones(blocks, len(codebook), 1)
    for j in range(b // d):
        block = slice(d * j, d * j + d)
        later = slice(d * j + d, b)
        turn = torch.linalg.solve_triangular(factor[:, block, block], eye, upper=True)
        turned = codebook @ turn
        v = w[:, block].mT @ turn
        chosen, _ = smallest(
            torch.cat([v, v.new_ones(blocks, n, 1), v.square().sum(-1, keepdim=True)], -1)
            @ torch.cat([turned * -2, turned.square().sum(-1, keepdim=True), ones], -1).mT
        )
        codes[:, j] = chosen
        missed = v - turned.gather(1, chosen[..., None].expand(-1, -1, d))
        w[:, later].baddbmm_(factor[:, block, later].mT, missed.mT, alpha=-1)
    return codes


def best_scale(weight: Tensor, chosen: Tensor, hessian: Tensor) -> Tensor:
    """The scale of each row for which scale * chosen is nearest to the weight in the metric H: (N,
    K), (N, K) → (N,).
    """
    turned = times(chosen, hessian)
    return (turned * weight).sum(1) / (turned * chosen).sum(1).clamp_min(1e-30)


def best_codebook(
    weight: Tensor,
    codes: Tensor,
    codebook: Tensor,
    scale: Tensor,
    hessian: Tensor,
    steps: int = CG_STEPS,
) -> Tensor:
    """The codebook with the least output error for given codes and scales, by conjugate gradients
    from the one there is.

    Shapes: weight (N, K) · codes (N, K/D) · codebook (C, D) · scale (N,) · hessian (K/B, B, B) →
        (C, D)
    """
    flat, rows = codes.flatten(), scale[:, None]

    def spread(words: Tensor) -> Tensor:
        return words.index_select(0, flat).reshape(weight.shape) * rows

    def gather(matrix: Tensor) -> Tensor:
        return torch.zeros_like(codebook).index_add_(
            0, flat, (times(matrix, hessian) * rows).reshape(-1, codebook.shape[1])
        )

    words, residual = codebook.clone(), gather(weight - spread(codebook))
    direction, size = residual.clone(), residual.square().sum()
    for _ in range(steps):
        turned = gather(spread(direction))
        step = size / (direction * turned).sum().clamp_min(1e-30)
        words += step * direction
        residual -= step * turned
        direction = residual + residual.square().sum() / size.clamp_min(1e-30) * direction
        size = residual.square().sum()
    return words
