"""A linear at 4-bit weights and activations, on disk and in memory: its tensors, their names, and
the matrix that they stand for.

    y = Q(x / smooth) . (codes * scale)^T + (x . proj_down) . proj_up^T + bias

SVDQuant (Li et al., 2024, arXiv:2411.05007, eq. 7), optionally with unsigned activations (a shift
is folded into the bias), all of them or those from one column on, or a 64-point Hadamard rotation
after smoothing. Layouts are natural: row major, low nibble = even column.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ...kernels import ops, reference
from .base import StoredWeight
from .packing import dequantize_groups, unpack_int4


@dataclass
class SVDQuantWeight(StoredWeight):
    """A linear at 4-bit weights and activations with a 16-bit low-rank branch. N outputs, K inputs,
    R rank, group 64.

    Shapes:
        qweight        int8 (N, K/2)     two codes -8..7 a byte, low nibble = even column
        scale          bf16 (K/64, N)    may be negative: the code -8 then serves a group's largest
          positive weight
        proj_down      bf16 (K, R)       acts on raw x: already divided by smooth_factor
        proj_up        bf16 (N, R)
        smooth_factor  bf16 (K,)         nonzero; with a rotation it may be negative: its signs
          randomize the Hadamard
        bias           bf16 (N,) | None  with act_unsigned, SHIFT times the row sums of the 4-bit
          part is already subtracted
    unsigned_from: a column; the inputs before it are signed, those from it on unsigned, as where a
        linear reads attention and a GELU
    side by side (FLUX's linear2). 0: act_unsigned says it for all.
    smooth_rows: heights of the P runs of outputs that smooth the input each in its own way,
        smooth_factor then being (P, K); (): one for all.
    """

    qweight: Tensor
    scale: Tensor
    proj_down: Tensor
    proj_up: Tensor
    smooth_factor: Tensor
    bias: Tensor | None = None
    act_unsigned: bool = False
    rotation: int = 0
    unsigned_from: int = 0
    smooth_rows: tuple[int, ...] = ()

    FORMAT = "svdquant_w4a4"
    SUFFIXES = {
        "qweight": "weight",
        "scale": "weight_scale",
        "proj_down": "weight_proj_down",
        "proj_up": "weight_proj_up",
        "smooth_factor": "weight_smooth_factor",
        "bias": "bias",
    }
    OUTPUT_DIM = {"qweight": 0, "scale": 1, "proj_up": 0, "bias": 0}

    def __post_init__(self):
        n, k = self.shape
        r = self.proj_down.shape[-1]
        self.smooth_rows = tuple(self.smooth_rows)
        smooth = (len(self.smooth_rows), k) if self.smooth_rows else (k,)
        self._check_shapes(
            f"a {n} x {k} linear of rank {r}",
            {
                "scale": (k // 64, n),
                "proj_down": (k, r),
                "proj_up": (n, r),
                "smooth_factor": smooth,
                "bias": (n,),
            },
        )
        self._check_options()

    def _check_options(self) -> None:
        n, k = self.shape
        if k % 64:
            raise ValueError(f"K={k} is not a multiple of the group size 64")
        if self.rotation not in (0, 64) or (self.rotation and self.act_unsigned):
            raise ValueError(
                f"rotation={self.rotation}, act_unsigned={self.act_unsigned}: rotation is 0 or 64,"
                " and excludes act_unsigned"
            )
        if self.unsigned_from and (
            self.rotation
            or self.act_unsigned
            or self.unsigned_from % 64
            or not 0 < self.unsigned_from < k
        ):
            raise ValueError(
                f"unsigned_from={self.unsigned_from} must be a multiple of 64 within K={k}, beside"
                " neither rotation nor act_unsigned"
            )
        if self.smooth_rows and (
            self.unsigned_from or sum(self.smooth_rows) != n or min(self.smooth_rows) < 1
        ):
            raise ValueError(
                f"smooth_rows={self.smooth_rows} must be heights that add up to N={n}, beside no"
                " unsigned_from"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the linear."""
        return self.qweight.shape[0], self.qweight.shape[1] * 2

    @property
    def rank(self) -> int:
        """R of the low-rank branch."""
        return self.proj_down.shape[1]

    @property
    def branch_dtype(self) -> torch.dtype:
        """Of a low-rank branch that it gets: that of its scales."""
        return self.scale.dtype

    def facts(self) -> dict:
        """The layer's JSON: format, rank, and the options that differ from plain SVDQuant."""
        options = {
            "act_unsigned": self.act_unsigned,
            "rotation": self.rotation,
            "unsigned_from": self.unsigned_from,
            "smooth_rows": list(self.smooth_rows),
        }
        return {"format": self.FORMAT, "rank": self.rank} | {
            name: value for name, value in options.items() if value
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str) -> "SVDQuantWeight":
        """The inverse of `tensors`. Raises ValueError for a missing tensor, another format, or an
        option that it does not know.
        """
        parts, facts = cls._read(tensors, prefix)
        options = {"act_unsigned", "rotation", "unsigned_from", "smooth_rows"}
        cls._refuse_unknown(prefix, facts, {"format", "rank"} | options)
        weight = cls(
            **parts,
            act_unsigned=bool(facts.get("act_unsigned", False)),
            rotation=int(facts.get("rotation", 0)),
            unsigned_from=int(facts.get("unsigned_from", 0)),
            smooth_rows=tuple(facts.get("smooth_rows", ())),
        )
        if facts.get("rank", weight.rank) != weight.rank:
            raise ValueError(f"{prefix} says rank {facts['rank']}, its factors have {weight.rank}")
        return weight

    def residual(self) -> Tensor:
        """The 4-bit part as a matrix on raw x: un-rotated, un-smoothed. float32 (N, K)."""
        rotated = dequantize_groups(unpack_int4(self.qweight), self.scale.float())
        plain = reference.hadamard64(rotated) if self.rotation else rotated
        smooth = self.smooth_factor.float()
        heights = torch.tensor(self.smooth_rows, device=smooth.device)
        return plain / (smooth.repeat_interleave(heights, 0) if self.smooth_rows else smooth)

    def dequantize(self) -> Tensor:
        """The whole matrix on raw x, W4 + proj_up . proj_down^T, float32 (N, K)."""
        return self.residual() + self.proj_up.float() @ self.proj_down.float().T

    def effective_bias(self) -> Tensor | None:
        """The bias that goes with `dequantize`: without the fold of unsigned activations. float32
        (N,) | None.
        """
        if not self.act_unsigned and not self.unsigned_from:
            return None if self.bias is None else self.bias.float()
        fold = self.residual()[:, self.unsigned_from :].sum(1) * reference.SHIFT
        return fold if self.bias is None else self.bias.float() + fold

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype, with 4-bit activations."""
        return linear_w4a4(x, self.qweight, self, self.proj_down, self.proj_up, self.bias)

    def rows(self, start: int, stop: int) -> "SVDQuantWeight":
        """The linear that computes outputs start..stop; shares proj_down and smooth_factor with the
        whole.
        """
        runs = {
            i: min(b, stop) - max(a, start)
            for i, (a, b) in enumerate(spans(self.smooth_rows))
            if min(b, stop) > max(a, start)
        }
        smooth = self.smooth_factor
        heights: tuple[int, ...] = ()
        if len(runs) == 1:
            smooth = self.smooth_factor[next(iter(runs))]
        elif runs:
            smooth, heights = self.smooth_factor[list(runs)], tuple(runs.values())
        slices = self._output_slices(start, stop)
        return replace(self, **slices, smooth_factor=smooth, smooth_rows=heights)

    @staticmethod
    def cat(pieces: list["SVDQuantWeight"]) -> "SVDQuantWeight":
        """The inverse of `rows`. Raises ValueError unless all pieces share proj_down, smooth_factor
        and options.
        """
        first = pieces[0]
        for piece in pieces[1:]:
            same = torch.equal(piece.proj_down, first.proj_down) and torch.equal(
                piece.smooth_factor, first.smooth_factor
            )
            if (
                not same
                or first.smooth_rows
                or piece.facts() != first.facts()
                or (piece.bias is None) != (first.bias is None)
            ):
                raise ValueError(
                    "only pieces with one proj_down, smooth_factor and set of options can be joined"
                    " along N"
                )
        return replace(first, **SVDQuantWeight._joined_outputs(pieces))


class W4A4Options(Protocol):
    """What decides how a linear's inputs become 4-bit numbers: the fields of that name of
    `SVDQuantWeight`.
    """

    scale: Tensor
    smooth_factor: Tensor
    act_unsigned: bool
    rotation: int
    unsigned_from: int
    smooth_rows: tuple[int, ...]


def linear_w4a4(
    x: Tensor,
    codes: Tensor,
    options: W4A4Options,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """x (..., K) → (..., N) in x's dtype, whatever kind of linear the options make it.

    codes: packed, int8 (N, K/2)
    """
    o = options
    if o.smooth_rows:
        return linear_in_runs(
            x,
            codes,
            o.scale,
            o.smooth_factor,
            proj_down,
            proj_up,
            bias,
            o.smooth_rows,
            o.act_unsigned,
            o.rotation,
        )
    flags = (o.act_unsigned, o.rotation, o.unsigned_from)
    return ops.linear_w4a4(x, codes, o.scale, o.smooth_factor, proj_down, proj_up, bias, *flags)


def spans(heights: Sequence[int]) -> list[tuple[int, int]]:
    """(start, stop) of runs of these heights, one behind the other."""
    return [(sum(heights[:i]), sum(heights[: i + 1])) for i in range(len(heights))]


def linear_in_runs(  # noqa: PLR0913 - the operands of an op
    x: Tensor,
    qweight: Tensor,
    scale: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    heights: tuple[int, ...],
    act_unsigned: bool = False,
    rotation: int = 0,
) -> Tensor:
    """A linear whose outputs come in runs of `heights`, each with its own smoothing of the input,
    smooth_factor (P, K): one product a run, side by side. The low-rank branch is that of all runs;
    each product computes it for its own outputs.
    """
    return torch.cat(
        [
            ops.linear_w4a4(
                x,
                qweight[a:b],
                scale[:, a:b].contiguous(),
                smooth,
                proj_down,
                proj_up[a:b],
                None if bias is None else bias[a:b],
                act_unsigned,
                rotation,
            )
            for (a, b), smooth in zip(spans(heights), smooth_factor, strict=True)
        ],
        -1,
    )
