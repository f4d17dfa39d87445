"""Second moments of a layer's inputs, as the Hessian of its squared output error: blocks on the
diagonal, (K/B, B, B).

GPTQ (Frantar et al., 2022, arXiv:2210.17323) moves each rounding error to columns that are not
rounded yet, along the inverse Hessian; `inverse_factor` is its Cholesky factor.
"""

import torch
from torch import Tensor

from .statistics import InputStats

DAMPING = 0.01  # of the Hessian's mean diagonal, added to its diagonal (GPTQ's value)
ROUNDED_INPUT = 1e-5  # squared relative error of a bf16 value: (2^-8)^2 / 12, rounded up


def covariance(stats: InputStats, centred: bool, device: torch.device) -> Tensor:
    """Blocks (K/B, B, B) of E[x x^T], or of the covariance when a bias takes up the mean, so that
    only deviations from it matter.
    """
    mean, square = stats.mean.to(device), stats.mean_square.to(device)
    blocks = diagonal_blocks(square) if stats.hessian is None else stats.hessian.to(device)
    rows = mean.reshape(blocks.shape[0], -1)
    if centred and stats.hessian is None:
        blocks = blocks - torch.diag_embed(rows.square())
    elif centred:
        blocks = blocks - rows[:, :, None] * rows[:, None, :]
    # 16-bit inputs are rounded themselves; without that floor, constant inputs would leave nothing
    # but cancellation
    return blocks + torch.diag_embed(ROUNDED_INPUT * square.reshape(rows.shape))


def diagonal_blocks(diagonal: Tensor) -> Tensor:
    """A diagonal (K,) as blocks (K/64, 64, 64)."""
    return torch.diag_embed(diagonal.reshape(-1, 64))


def inverse_factor(hessian: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse, (K/B, B, B), in float64 where the device has it; damped
    until it exists.

    Raises ValueError for a Hessian that holds NaN or is far from positive definite.
    """
    wide = hessian if hessian.device.type == "mps" else hessian.double()
    mean = wide.diagonal(dim1=1, dim2=2).mean(1)
    for damping in (0, 0.01, 0.1, 1.0):
        damped = wide + torch.diag_embed((damping * mean)[:, None].expand(wide.shape[:2]))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()
    raise ValueError(
        "the Hessian of the recorded inputs is not positive definite; record the inputs again"
    )
