"""A linear of 4-bit weights that are read as int8, with 8-bit activations, on disk and in memory:
its tensors, their names, and the matrix that they stand for.

    W8 = (table[code] * scale + 64) >> 7                  int8, a scale for `group` columns of a row
    y = (Q8(x / smooth) . W8^T) * ascale * channel_scale + (x . proj_down) . proj_up^T + bias

The formula's parts and their sources: `kernels.reference.w4a8`. At the same bits a weight it is
closer than `svdquant_w4a4` with activations of 8 bits: int8 scales take half the room of 16-bit
ones, so that there are twice or four times as many, and 16 free levels fit weights better than an
even grid.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels import ops, reference
from ...kernels.reference import w4a8
from .base import StoredWeight, same_tensor


@dataclass
class W4A8Weight(StoredWeight):
    """N outputs, K inputs, R rank, groups of K/S columns.

    Shapes:
        qweight        int8 (N, K/2)     two codes 0..15 a byte, low nibble = even column
        scale          int8 (S, N)       -127..127
        channel_scale      float32 (N,)
        table          int8 (16,)        levels by code, -127..127
        smooth_factor  bf16 (K,)         nonzero; with a rotation it may be negative
        proj_down      bf16 (K, R) | None   acts on raw x; with proj_up bf16 (N, R) | None
        bias           bf16 (N,) | None
    rotation: 0 | 64. Raises ValueError for shapes that do not fit.
    """

    qweight: Tensor
    scale: Tensor
    channel_scale: Tensor
    table: Tensor
    smooth_factor: Tensor
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None
    bias: Tensor | None = None
    rotation: int = 0

    FORMAT = "svdquant_w4a8"
    SUFFIXES = {
        "qweight": "weight",
        "scale": "weight_scale",
        "channel_scale": "weight_channel_scale",
        "table": "weight_table",
        "smooth_factor": "weight_smooth_factor",
        "proj_down": "weight_proj_down",
        "proj_up": "weight_proj_up",
        "bias": "bias",
    }
    OPTIONAL = ("weight_proj_down", "weight_proj_up", "bias")
    TOLD = ("format", "group", "rank")
    OUTPUT_DIM = {"qweight": 0, "scale": 1, "channel_scale": 0, "proj_up": 0, "bias": 0}

    def __post_init__(self):
        (n, k), r = self.shape, self.rank
        if k % 64 or self.group not in w4a8.GROUPS or k % self.group:
            raise ValueError(
                f"{len(self.scale)} rows of scales for K={k}: K is a multiple of 64, and groups"
                f" have {', '.join(map(str, w4a8.GROUPS))} columns"
            )
        self._check_shapes(
            f"a {n} x {k} linear of rank {r}",
            {
                "scale": (k // self.group, n),
                "channel_scale": (n,),
                "table": (w4a8.LEVELS,),
                "smooth_factor": (k,),
                "proj_down": (k, r),
                "proj_up": (n, r),
                "bias": (n,),
            },
        )
        if (self.proj_down is None) != (self.proj_up is None):
            raise ValueError("a low-rank branch needs both proj_down and proj_up")
        if self.rotation not in (0, 64):
            raise ValueError(f"rotation={self.rotation} is neither 0 nor 64")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the linear."""
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // max(1, len(self.scale))

    @property
    def rank(self) -> int:
        """R of the low-rank branch, 0 without one."""
        return 0 if self.proj_down is None else self.proj_down.shape[1]

    @property
    def branch_dtype(self) -> torch.dtype:
        """Of a low-rank branch that it gets: that of its smoothing."""
        return self.smooth_factor.dtype

    def facts(self) -> dict:
        """The layer's JSON: format, group, and the options that it uses."""
        options = {"rank": self.rank, "rotation": self.rotation}
        return {"format": self.FORMAT, "group": self.group} | {
            name: value for name, value in options.items() if value
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "W4A8Weight":
        """The inverse of `tensors`. Raises ValueError for a missing tensor, another format, or an
        option that it does not know.
        """
        parts, facts = cls._read(tensors, prefix)
        cls._refuse_unknown(prefix, facts, {"format", "group", "rank", "rotation"})
        weight = cls(**parts, rotation=int(facts.get("rotation", 0)))
        said = {name: value for name, value in facts.items() if value}
        if weight.facts() != said:
            raise ValueError(f"{prefix} says {facts}, its tensors are those of {weight.facts()}")
        return weight

    def residual(self) -> Tensor:
        """The 4-bit part as a matrix on raw x: un-rotated, un-smoothed. float32 (N, K)."""
        matrix = w4a8.dequantize_w4a8(self.qweight, self.scale, self.channel_scale, self.table)
        matrix = reference.hadamard64(matrix) if self.rotation else matrix
        return matrix / self.smooth_factor.float()

    def dequantize(self) -> Tensor:
        """The whole matrix on raw x, low-rank branch included, float32 (N, K)."""
        matrix = self.residual()
        if self.factors is None:
            return matrix
        down, up = self.factors
        return matrix + up.float() @ down.float().T

    def effective_bias(self) -> Tensor | None:
        """The bias in float32 (N,), or None."""
        return None if self.bias is None else self.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype, with activations of 8 bits."""
        return ops.linear_w4a8(
            x,
            self.qweight,
            self.scale,
            self.channel_scale,
            self.table,
            self.smooth_factor,
            self.proj_down,
            self.proj_up,
            self.bias,
            self.rotation,
        )

    def rows(self, start: int, stop: int) -> "W4A8Weight":
        """The linear that computes outputs start..stop; shares table, proj_down and smooth_factor
        with the whole.
        """
        return replace(self, **self._output_slices(start, stop))

    @staticmethod
    def cat(pieces: Sequence["W4A8Weight"]) -> "W4A8Weight":
        """The inverse of `rows`. Raises ValueError unless all pieces share table, proj_down,
        smooth_factor and options.
        """
        first = pieces[0]
        for piece in pieces[1:]:
            same = (
                torch.equal(piece.table, first.table)
                and torch.equal(piece.smooth_factor, first.smooth_factor)
                and same_tensor(piece.proj_down, first.proj_down)
            )
            if (
                not same
                or piece.facts() != first.facts()
                or (piece.bias is None) != (first.bias is None)
            ):
                raise ValueError(
                    "only pieces with one table, proj_down, smooth_factor and set of options can be"
                    " joined along N"
                )
        return replace(first, **W4A8Weight._joined_outputs(pieces))
