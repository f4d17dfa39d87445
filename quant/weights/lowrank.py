"""Low-rank factors of a matrix by randomized SVD (Halko, Martinsson, Tropp, 2011, arXiv:0909.4061).

    A (N, K)  ≈  Q Qᵀ A,   Q = orth((A Aᵀ)^q A Ω)        Ω random (K, R + oversampling)

Three questions, one range finder (algorithms 4.4 and 5.1): the best approximation of a rank
(`svd_lowrank`), the largest components (`leading_components`), and the smallest rank that loses no
more than rounding does (`factors_of_lowest_rank`, where Q grows as in algorithm 4.2). All start
from a fixed seed, so that the same matrix has the same factors.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

# share of a change's energy that its factors may lack: below the rounding of 16-bit factors
RESIDUAL = 1e-6
OVERSAMPLE = 8  # columns of a range beyond the rank that is wanted
# error of float32 arithmetic on a whole weight, relative to its norm: a smaller change is none
ROUNDING = 4e-7
FIRST_RANK = 32  # ranks that are tried double from the first
MOST = 4  # factors of more than min(N, K) / MOST columns cost more than the dense matrix saves


class Product(Protocol):
    """A matrix (N, K) as far as randomized SVD needs it: what it does to thin matrices."""

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype

    @property
    def T(self) -> "Product": ...  # noqa: N802  (a tensor's)

    def __matmul__(self, thin: Tensor) -> Tensor: ...


def _range_finder(matrix: Tensor | Product, probe: Tensor, power: int) -> Tensor:
    """Q (N, width), orthonormal, that spans the range of matrix (N, K) best, of a random probe (K,
    width).
    """
    basis = torch.linalg.qr(matrix @ probe).Q
    for _ in range(power):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis


def svd_lowrank(
    matrix: Tensor | Product,
    rank: int,
    generator: torch.Generator,
    power: int = 2,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """matrix (N, K) → up (N, R), down (K, R) with up . down^T its best rank-R approximation,
    singular values shared evenly.

    The generator is a CPU one, so that every device draws the same numbers. Ranks above min(N, K)
    are filled with zeros. start (N, r): the `up` of a matrix close to this one; from there one
    power does what two do from random numbers, in half the passes over the matrix.
    """
    n, k = matrix.shape
    width = min(rank + OVERSAMPLE, n, k)
    if start is None:
        probe = torch.randn(k, width, generator=generator).to(matrix.device, matrix.dtype)
        basis = _range_finder(matrix, probe, power)
    else:
        more = torch.randn(n, width, generator=generator).to(start)
        known = torch.linalg.qr(torch.cat([start, more], 1)[:, :width]).Q
        basis = _range_finder(matrix, torch.linalg.qr(matrix.T @ known).Q, power=0)
    # basis^T matrix = small^T right^T: the SVD is of width x width only
    right, small = torch.linalg.qr(matrix.T @ basis)
    u, s, vh = torch.linalg.svd(small.T)
    least = min(rank, width)
    root = s[:least].sqrt()
    up, down = (basis @ u[:, :least]) * root, (right @ vh[:least].T) * root
    pad = (0, rank - least)
    return torch.nn.functional.pad(up, pad), torch.nn.functional.pad(down, pad)


def leading_components(
    matrix: Tensor, rank: int, oversample: int = 16, power: int = 4
) -> tuple[Tensor, Tensor]:
    """The largest components of a matrix (N, K): up (N, R), down (R, K), from a fixed start on the
    matrix's device. R: at most min(N, K).
    """
    generator = torch.Generator(matrix.device).manual_seed(0)
    width = min(rank + oversample, *matrix.shape)
    probe = torch.randn(matrix.shape[1], width, generator=generator, device=matrix.device)
    basis = _range_finder(matrix, probe, power)
    u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return basis @ (u[:, :rank] * root), root[:, None] * v[:rank]


def factors_of_lowest_rank(matrix: Tensor, negligible: float) -> tuple[Tensor, Tensor] | None:
    """matrix float32 (N, K) → (down (K, R), up (N, R)) with up . down^T ≈ matrix, or None where no
    low rank is enough.

    negligible: the squared error that rounding excuses; beyond it, RESIDUAL of the energy may be
        missing.
    """
    energy = matrix.square().sum().item()
    allowed = max(negligible, RESIDUAL * energy)
    generator = torch.Generator(matrix.device).manual_seed(0)
    basis, left = matrix.new_zeros(matrix.shape[0], 0), energy
    rank = FIRST_RANK
    while left > allowed:
        if rank > min(matrix.shape) // MOST:
            return None
        probe = torch.randn(
            matrix.shape[1], rank - basis.shape[1], generator=generator, device=matrix.device
        )
        sketch = matrix @ probe
        # twice: where the sketch holds nothing new, the first pass leaves rounding errors along the
        # old basis
        for _ in range(2):
            sketch = torch.linalg.qr(sketch - basis @ (basis.T @ sketch)).Q
        basis = torch.cat([basis, sketch], dim=1)
        rows = basis.T @ matrix
        left = (matrix - basis @ rows).square().sum().item()
        rank *= 2
    return _truncate(basis, basis.T @ matrix, allowed - left)


def _truncate(basis: Tensor, rows: Tensor, spare: float) -> tuple[Tensor, Tensor]:
    """basis (N, r) . rows (r, K) → balanced factors (K, R), (N, R) of the smallest rank that loses
    at most `spare` energy.
    """
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    lost = s.square().flip(0).cumsum(0).flip(0)
    rank = int((lost > spare).sum())
    root = s[:rank].sqrt()
    return v[:rank].T * root, (basis @ u[:, :rank]) * root


def balanced(up: Tensor, down: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Other factors of up . down whose r components are alike in size, so that integers lose least;
    optionally of a smaller rank.

    up (N, r), down (r, K) → float32, same product. SVD of the thin product, then an orthonormal
    Hartley matrix across the components.
    """
    qu, ru = torch.linalg.qr(up.double())
    qd, rd = torch.linalg.qr(down.double().T)
    u, s, vh = torch.linalg.svd(ru @ rd.T)
    kept = min(rank or len(s), len(s))
    angle = torch.outer(torch.arange(kept), torch.arange(kept)).to(u) * (2 * math.pi / kept)
    hartley = (angle.cos() + angle.sin()) / math.sqrt(kept)
    root = s[:kept].sqrt()[:, None] * hartley
    return (qu @ (u[:, :kept] @ root)).float(), (root.T @ vh[:kept] @ qd.T).float()


def thin_norm(terms: list[tuple[Tensor, Tensor, float]], smooth: Tensor | None = None) -> float:
    """Frobenius norm of the sum of sign * up . (down * smooth)^T over (up (N, r), down (K, r),
    sign), without the dense sum.
    """
    up = torch.cat([u.double() * sign for u, _, sign in terms], 1)
    down = torch.cat(
        [
            d.double() if smooth is None else d.double() * smooth.double()[:, None]
            for _, d, _ in terms
        ],
        1,
    )
    return ((up.T @ up) * (down.T @ down)).sum().clamp_min(0).sqrt().item()
