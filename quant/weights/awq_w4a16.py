"""A 4-bit linear for few tokens, on disk and in memory: its tensors, their names, and the matrix
that they stand for.

    y = x . ((codes - 8) * scale + zeros)^T + bias  [+ (x . proj_down) . proj_up^T, where a LoRA
                                                       was merged]

comfy-kitchen's awq_w4a16, which the modulation layers have. Layouts are natural: row major, low
nibble = even column.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels import ops
from .base import StoredWeight, same_tensor
from .packing import unpack_int4


@dataclass
class W4A16Weight(StoredWeight):
    """A linear at 4-bit weights and 16-bit activations, for few tokens (modulation):
    comfy-kitchen's awq_w4a16.

    Shapes:
        qweight  int8 (N, K/2)     two codes 0..15 a byte, low nibble = even column; W = (code - 8)
          * scale + zeros
        scale    bf16 (K/64, N)
        zeros    bf16 (K/64, N) | None: symmetric, as Nibble's own files are
        bias     bf16 (N,) | None
        proj_down, proj_up  bf16 (K, R), (N, R) | None: what was merged beside the 4-bit weights;
          comfy-kitchen's form has none
    """

    qweight: Tensor
    scale: Tensor
    zeros: Tensor | None = None
    bias: Tensor | None = None
    proj_down: Tensor | None = None
    proj_up: Tensor | None = None

    FORMAT = "awq_w4a16"
    SUFFIXES = {
        "qweight": "weight",
        "scale": "weight_scale",
        "zeros": "weight_zeros",
        "bias": "bias",
        "proj_down": "weight_proj_down",
        "proj_up": "weight_proj_up",
    }
    OPTIONAL = ("bias", "weight_zeros", "weight_proj_down", "weight_proj_up")
    OUTPUT_DIM = {"qweight": 0, "scale": 1, "zeros": 1, "bias": 0, "proj_up": 0}

    def __post_init__(self):
        n, k = self.shape
        if (self.proj_down is None) != (self.proj_up is None):
            raise ValueError("proj_down and proj_up go together; one of them is missing")
        self._check_shapes(
            f"a {n} x {k} linear",
            {
                "scale": (k // 64, n),
                "zeros": (k // 64, n),
                "bias": (n,),
                "proj_down": (k, self.rank),
                "proj_up": (n, self.rank),
            },
        )
        if k % 64:
            raise ValueError(f"K={k} is not a multiple of the group size 64")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the linear."""
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @property
    def rank(self) -> int:
        """R of what was merged beside the 4-bit weights; 0: nothing."""
        return 0 if self.proj_down is None else self.proj_down.shape[1]

    @property
    def branch_dtype(self) -> torch.dtype:
        """Of a low-rank branch that it gets: that of its scales."""
        return self.scale.dtype

    def facts(self) -> dict:
        """The layer's JSON: the format, and the rank where there is one."""
        facts: dict = {"format": self.FORMAT}
        if self.proj_down is not None:
            facts["rank"] = self.rank
        return facts

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "W4A16Weight":
        """The inverse of `tensors`. Raises ValueError for a missing tensor, another format, or an
        option that it does not know.
        """
        parts, facts = cls._read(tensors, prefix)
        cls._refuse_unknown(prefix, facts, {"format", "rank"})
        weight = cls(**parts)
        if facts.get("rank", 0) != weight.rank:
            raise ValueError(
                f"{prefix} says rank {facts.get('rank', 0)}, its factors have {weight.rank}"
            )
        return weight

    def residual(self) -> Tensor:
        """The 4-bit part on x, float32 (N, K)."""
        codes = unpack_int4(self.qweight, signed=False)
        n, k = self.shape
        grouped = (codes.reshape(n, k // 64, 64).float() - 8) * self.scale.float().T[..., None]
        if self.zeros is not None:
            grouped = grouped + self.zeros.float().T[..., None]
        return grouped.reshape(n, k)

    def dequantize(self) -> Tensor:
        """The whole matrix on x, float32 (N, K)."""
        dense = self.residual()
        if self.factors is None:
            return dense
        down, up = self.factors
        return dense + up.float() @ down.float().T

    def effective_bias(self) -> Tensor | None:
        """The bias in float32 (N,), or None."""
        return None if self.bias is None else self.bias.float()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype."""
        y = ops.linear_w4a16(x, self.qweight, self.scale, self.zeros, self.bias)
        if self.factors is None:
            return y
        down, up = self.factors
        return y + (x @ down.to(x.dtype)) @ up.to(x.dtype).T

    def rows(self, start: int, stop: int) -> "W4A16Weight":
        """The linear that computes outputs start..stop; shares proj_down with the whole."""
        return replace(self, **self._output_slices(start, stop))

    @staticmethod
    def cat(pieces: list["W4A16Weight"]) -> "W4A16Weight":
        """The inverse of `rows`. Raises ValueError when only some pieces have a bias or zero
        points, or their proj_down differ.
        """
        first = pieces[0]
        if len({(p.bias is None, p.zeros is None) for p in pieces}) > 1:
            raise ValueError(
                "only pieces that all have, or all lack, a bias and zero points can be joined"
                " along N"
            )
        if not all(same_tensor(p.proj_down, first.proj_down) for p in pieces):
            raise ValueError("only pieces with one proj_down can be joined along N")
        return replace(first, **W4A16Weight._joined_outputs(pieces))
