"""The 16-bit branch: the best rank-R matrix in the metric of the inputs.

    argmin_L  tr (W - L) M (W - L)^T  =  SVD_R(W M^1/2) M^-1/2          M block diagonal, symmetric,
      positive

With M = identity it is SVDQuant's eq. 6.
"""

import torch
from torch import Tensor

from ..weights.lowrank import svd_lowrank

# eigenvalues below this share of a metric's largest are raised to it: nothing is learned from them
FLOOR = 1e-6


def times_blocks(matrix: Tensor, blocks: Tensor) -> Tensor:
    """matrix (N, K) times a block-diagonal (K/B, B, B) → (N, K)."""
    n = matrix.shape[0]
    split = matrix.reshape(n, *blocks.shape[:2]).transpose(0, 1)
    return torch.bmm(split, blocks).transpose(0, 1).reshape(n, -1)


class Metric:
    """A block-diagonal metric's square root and its inverse, (K/B, B, B) each."""

    def __init__(self, blocks: Tensor):
        values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)
        roots = values.clamp_min(max(values.max().item() * FLOOR, 1e-30)).sqrt()[:, None]
        self.root = (vectors * roots) @ vectors.mT
        self.inverse_root = (vectors / roots) @ vectors.mT

    def fit(
        self, matrix: Tensor, rank: int, generator: torch.Generator, start: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The best rank-R up (N, R), down (K, R) for matrix (N, K) in this metric; start: the `up`
        of a matrix close to it.
        """
        up, down = svd_lowrank(_Weighted(matrix, self.root), rank, generator, start=start)
        return up, times_blocks(down.T, self.inverse_root).T


class _Weighted:
    """matrix (N, K) . blocks (K/B, B, B), symmetric, or its transpose, as what it does to thin
    matrices: to them the blocks cost little, to the matrix more than all else in its SVD.
    """

    def __init__(self, matrix: Tensor, blocks: Tensor, transposed: bool = False):
        self.matrix, self.blocks, self.transposed = matrix, blocks, transposed
        self.shape = matrix.T.shape if transposed else matrix.shape
        self.device, self.dtype = matrix.device, matrix.dtype

    @property
    def T(self) -> "_Weighted":  # noqa: N802  (a tensor's)
        return _Weighted(self.matrix, self.blocks, not self.transposed)

    def __matmul__(self, thin: Tensor) -> Tensor:
        if self.transposed:
            return self._weighted(self.matrix.T @ thin)
        return self.matrix @ self._weighted(thin)

    def _weighted(self, thin: Tensor) -> Tensor:
        return torch.bmm(self.blocks, thin.unflatten(0, self.blocks.shape[:2])).flatten(0, 1)


def solve_blocks(a: Tensor, b: Tensor) -> Tensor:
    """A^-1 B of each block, (K/B, B, B) both.

    One block after the other: torch 2.13 with MKL answers a batch of larger blocks wrongly once the
    host program has called set_num_threads.
    """
    return torch.stack([torch.linalg.solve(left, right) for left, right in zip(a, b, strict=True)])


def parallel_sum(a: Tensor, noise: Tensor) -> Tensor:
    """(A^-1 + diag(noise)^-1)^-1 = A - A (A + diag(noise))^-1 A, blockwise; A (K/B, B, B), noise
    (K,) positive.
    """
    return a - a @ solve_blocks(a + torch.diag_embed(noise.reshape(a.shape[:2])), a)
