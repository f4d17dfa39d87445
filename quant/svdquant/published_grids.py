"""The grids of formats that others publish: `grid.py` with what ComfyUI and Nunchaku read.

lookup8   round(table[code] . s_group) . s_row     codes of 4 bits, decoded to int8 (ComfyUI's
  asym_w4a8_int8)
e2m1      value[code] . s_group . s_row            4-bit floats: 0, .5, 1, 1.5, 2, 3, 4, 6 with a
  sign (NVFP4)
int8      code . s_row                             -127..127

A group is 16 neighbouring input columns of one output row, s_group an 8-bit float, e4m3; a row has
one scale besides.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from .grid import Grid, best_of, loss

GROUP = 16
E4M3_MAX = 448.0
E4M3_LEAST = 2.0**-9  # the smallest above zero
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The 16 levels that suit groups of a rotated weight over their largest magnitude, which are nearly
# normal (Lloyd, 1982; Max, 1960). comfy-kitchen's own table.
LLOYD_MAX = (
    *(-0.980602, -0.794529, -0.638165, -0.500986, -0.377321, -0.263187, -0.155210, -0.050720),
    *(0.052541, 0.156985, 0.265284, 0.379533, 0.502636, 0.638953, 0.794876, 0.980671),
)
# searched ranges of a group, as shares of the one that holds its largest weight
RANGES = (1.0, 1.08, 0.93, 0.86, 0.8, 0.74, 0.68)


def e4m3(scale: Tensor) -> Tensor:
    """Positive scales as the 8-bit floats nearest to them, in float32; none becomes zero."""
    return scale.clamp(E4M3_LEAST, E4M3_MAX).to(torch.float8_e4m3fn).float()


G = TypeVar("G", bound="_OfRows")


@dataclass(frozen=True)
class _OfRows(Grid):
    """A grid with its rows' scales, row: float32 (N,)."""

    row: Tensor
    group = GROUP

    def rows(self: G, part: slice) -> G:
        return replace(self, row=self.row[part])


class _Scaled(_OfRows):
    """A grid whose groups have a scale: the best of `RANGES`, then by least squares for its
    codes.
    """

    largest = 1.0  # level of the table

    def scales(self, w: Tensor, importance: Tensor) -> Tensor:
        full = w.abs().amax(-2, keepdim=True) / (self.largest * self.row)
        best, error = best_of(self, w, importance, [e4m3(full * share) for share in RANGES])
        unscaled = self.values(self.codes(w, best), best) / best
        weighted = unscaled * importance
        squares = (weighted * unscaled).sum(-2, keepdim=True).clamp_min(1e-30)
        refined = e4m3((weighted * w).sum(-2, keepdim=True) / squares)
        return torch.where(loss(self, w, refined, importance) < error, refined, best)


@dataclass(frozen=True)
class Lookup8(_Scaled):
    """See the module's head; table: float32 (16,), rising."""

    table: Tensor

    @property
    def largest(self) -> float:  # type: ignore[override]
        return self.table.abs().max().item()

    def codes(self, w: Tensor, scale: Tensor) -> Tensor:
        middles = (self.table[1:] + self.table[:-1]) / 2
        return torch.bucketize((w / (scale * self.row)).contiguous(), middles)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return (self.table[codes.long()] * scale).round_().clamp_(-127, 127) * self.row


@dataclass(frozen=True)
class E2M1Grid(_Scaled):
    """See the module's head; codes as in a file, bit 3 the sign."""

    largest = E2M1[-1]

    def codes(self, w: Tensor, scale: Tensor) -> Tensor:
        levels = torch.tensor(E2M1, device=w.device)
        ratio = w / (scale * self.row)
        magnitude = torch.bucketize(ratio.abs().contiguous(), (levels[1:] + levels[:-1]) / 2)
        return magnitude + 8 * (ratio < 0)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        levels = torch.tensor((*E2M1, *(-level for level in E2M1)), device=codes.device)
        return levels[codes.long()] * scale * self.row


@dataclass(frozen=True)
class Int8(_OfRows):
    """See the module's head; its groups have no scale of their own (1)."""

    def scales(self, w: Tensor, importance: Tensor) -> Tensor:
        return torch.ones_like(w[:, :1])

    def codes(self, w: Tensor, scale: Tensor) -> Tensor:
        return (w / self.row).round_().clamp_(-127, 127).to(torch.int64)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes * self.row
