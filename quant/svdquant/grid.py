"""The numbers that 4-bit weights can be, and the scale of a group for them.

EvenGrid    codes -8..7 times a 16-bit scale, 64 columns a group            svdquant_w4a4, awq_w4a16
TableGrid   16 levels of a table times an int8 scale, read as int8, times a number a row; groups of
            16, 32 or 64 columns                                            svdquant_w4a8

A grid works on groups as they are rounded: w (..., g, n), one column of the weight after another,
with scales (..., 1, n). Of a weight's outputs `rows` takes some.
"""

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.reference.w4a8 import LEVELS, SHIFT_BITS
from ..weights.packing import dequantize_groups

SHRINK = (1.0, 0.93, 0.86, 0.79)  # searched range of a group, as a share of its absmax
TABLE_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
ROOM = 1.02  # of a row's largest scale: GPTQ moves errors into columns that grow by it
HIGHEST = 127  # of a level and of a scale
UNIT = 1 << SHIFT_BITS
SAMPLES = 2**18  # weights that a table is fitted to
LLOYD_TURNS = 30
FINE = 2  # steps of a level by which the closest one is looked up


class Grid(ABC):
    """See above. group: columns that share a scale."""

    group: int

    @abstractmethod
    def rows(self, part: slice) -> "Grid":
        """The grid of some of the outputs."""

    @abstractmethod
    def scales(self, w: Tensor, importance: Tensor) -> Tensor:
        """Scales (..., 1, n) of groups w (..., g, n), as the file holds them, in float32;
        importance (..., g, 1) weighs the columns' squared errors.
        """

    def scales_near(self, w: Tensor, importance: Tensor, near: Tensor) -> Tensor:
        """The same, where `near` (..., 1, n) was found for almost these groups: a start that may
        save the search.
        """
        return self.scales(w, importance)

    @abstractmethod
    def codes(self, w: Tensor, scale: Tensor) -> Tensor:
        """The codes closest to w."""

    @abstractmethod
    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        """What codes stand for, float32."""

    def dense(self, codes: Tensor, scale: Tensor) -> Tensor:
        """The matrix of codes int8 (N, K) and scale (K/g, N), float32 (N, K)."""
        groups = codes.T.reshape(len(scale), self.group, -1).float()
        return self.values(groups, scale[:, None]).flatten(0, 1).T


def best_of(
    grid: Grid, w: Tensor, importance: Tensor, candidates: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """(for each group the scale of least weighted squared error, the first of equals; its
    error).
    """
    best, error = candidates[0], loss(grid, w, candidates[0], importance)
    for candidate in candidates[1:]:
        found = loss(grid, w, candidate, importance)
        best, error = torch.where(found < error, candidate, best), torch.minimum(found, error)
    return best, error


def loss(grid: Grid, w: Tensor, scale: Tensor, importance: Tensor) -> Tensor:
    """Weighted squared error of groups at a scale, (..., 1, n)."""
    values = grid.values(grid.codes(w, scale), scale)
    return values.sub_(w).square_().mul_(importance).sum(-2, keepdim=True)


# ---- codes -8..7 ---------------------------------------------------------------------------------


def stored(scale: Tensor) -> Tensor:
    """A scale as the file holds it: through bf16, in float32."""
    return scale.bfloat16().float()


@dataclass(frozen=True)
class EvenGrid(Grid):
    """search: each group's scale instead of absmax / 7: also clipped ranges, and negative scales,
    whose code -8 serves the largest positive weight; the best is refined by least squares for its
    codes.
    """

    search: bool = True
    group: int = 64

    def rows(self, part: slice) -> "EvenGrid":
        return self

    def scales(self, w: Tensor, importance: Tensor) -> Tensor:
        largest, bottom = w.abs().amax(-2, keepdim=True), w.amin(-2, keepdim=True)
        if not self.search:
            return stored(largest / 7)
        # the sign that lets -8 reach the extreme
        full = torch.where(bottom == -largest, largest, -largest) / 8
        tried = [largest / 7 * r for r in SHRINK] + [full * r for r in SHRINK]
        return self._refined(w, importance, [stored(scale) for scale in tried])

    def scales_near(self, w: Tensor, importance: Tensor, near: Tensor) -> Tensor:
        return self._refined(w, importance, [near]) if self.search else self.scales(w, importance)

    def _refined(self, w: Tensor, importance: Tensor, tried: list[Tensor]) -> Tensor:
        best, error = best_of(self, w, importance, tried)
        codes = self.codes(w, best)
        weighted = codes * importance
        refined = stored(
            (weighted * w).sum(-2, keepdim=True)
            / weighted.mul_(codes).sum(-2, keepdim=True).clamp_min(1e-30)
        )
        return torch.where(loss(self, w, refined, importance) < error, refined, best)

    def codes(self, w: Tensor, scale: Tensor) -> Tensor:
        return (w / torch.where(scale == 0, torch.inf, scale)).round_().clamp_(-8, 7)

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        return codes * scale

    def dense(self, codes: Tensor, scale: Tensor) -> Tensor:
        return dequantize_groups(codes, scale)


# ---- 16 levels of a table ------------------------------------------------------------------------


@dataclass(frozen=True)
class TableGrid(Grid):
    """table: float32 (16,), whole numbers -127..127 in order; channel_scale: float32 (N,), without
    which only `fitted` is of use.
    """

    table: Tensor
    channel_scale: Tensor
    group: int = 16

    @classmethod
    def fitted(cls, weight: Tensor, group: int) -> "TableGrid":
        """The table of a weight (N, K)."""
        return cls(fit_table(weight, group), weight.new_zeros(0), group)

    def for_rows_of(self, weight: Tensor) -> "TableGrid":
        """The grid whose rows reach as far as those of a weight (N, K)."""
        reach = ROOM * UNIT / (HIGHEST * HIGHEST)
        return replace(self, channel_scale=(weight.abs().amax(1) * reach).clamp_min(1e-30))

    def rows(self, part: slice) -> "TableGrid":
        return replace(self, channel_scale=self.channel_scale[part])

    def scales(self, w: Tensor, importance: Tensor) -> Tensor:
        top, bottom = w.amax(-2, keepdim=True), w.amin(-2, keepdim=True)
        # the level 127 on the extreme, whatever its sign; or the lowest one
        extreme = torch.where(top > -bottom, top, bottom) * (UNIT / self.channel_scale)
        full, turned = extreme / self.table[-1], extreme / self.table[0]
        candidates = [full * r for r in TABLE_SHRINK] + [turned * r for r in TABLE_SHRINK[:2]]
        candidates = [self._whole(candidate) for candidate in candidates]
        best, error = best_of(self, w, importance, candidates)
        levels = self._levels(self.codes(w, best))
        weighted = levels * importance
        refined = self._whole(
            (weighted * w).sum(-2, keepdim=True)
            / weighted.mul_(levels).sum(-2, keepdim=True).clamp_min(1e-30)
            * (UNIT / self.channel_scale)
        )
        return torch.where(loss(self, w, refined, importance) < error, refined, best)

    @staticmethod
    def _whole(scale: Tensor) -> Tensor:
        return scale.round().clamp_(-HIGHEST, HIGHEST)

    def _levels(self, codes: Tensor) -> Tensor:
        return self.table.index_select(0, codes.flatten().int()).view(codes.shape)

    def codes(self, w: Tensor, scale: Tensor) -> Tensor:
        step = scale * (self.channel_scale / (UNIT * FINE))
        place = (w / torch.where(step == 0, torch.inf, step)).round_()
        place = place.clamp_(-FINE * UNIT, FINE * UNIT).add_(FINE * UNIT).int()
        return self._closest.index_select(0, place.flatten()).view(w.shape)

    @functools.cached_property
    def _closest(self) -> Tensor:
        """The code of the level closest to each place from -UNIT to UNIT in steps of 1 / FINE: a
        search among the levels takes twenty times as long.
        """
        places = torch.arange(-FINE * UNIT, FINE * UNIT + 1, device=self.table.device) / FINE
        return torch.bucketize(places, (self.table[1:] + self.table[:-1]) / 2).int()

    def values(self, codes: Tensor, scale: Tensor) -> Tensor:
        # whole numbers below 2^24: as exact as `reference.w4a8.decode_groups`
        whole = self._levels(codes).mul_(scale).add_(UNIT / 2).div_(UNIT).floor_()
        return whole.mul_(self.channel_scale)


def fit_table(weight: Tensor, group: int) -> Tensor:
    """The 16 levels of least squared error for a weight (N, K) whose groups are scaled so that the
    largest magnitude is the level 127: float32 (16,), whole numbers in order. Lloyd's algorithm
    (1982) on evenly spaced rows.
    """
    stride = max(1, weight.numel() // SAMPLES)
    groups = weight[::stride].unflatten(1, (-1, group))
    top, bottom = groups.amax(-1, keepdim=True), groups.amin(-1, keepdim=True)
    extreme = torch.where(top > -bottom, top, bottom)
    shares = (groups / torch.where(extreme == 0, 1, extreme)).flatten()
    energy = extreme.square().expand_as(groups).flatten()
    levels = torch.linspace(-0.95, 1, LEVELS, device=weight.device)
    for _ in range(LLOYD_TURNS):
        nearest = torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)
        count = torch.zeros_like(levels).index_add_(0, nearest, energy)
        total = torch.zeros_like(levels).index_add_(0, nearest, energy * shares)
        levels = torch.where(count > 0, total / count.clamp_min(1e-30), levels).sort()[0]
        levels[-1] = 1
    return (levels * HIGHEST).round()


# ---- a rounded weight ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounded:
    """codes int8 (N, K) and scale float32 (K/g, N) on a grid."""

    codes: Tensor
    scale: Tensor
    grid: Grid

    def dense(self) -> Tensor:
        """The matrix that it stands for, float32 (N, K)."""
        return self.grid.dense(self.codes, self.scale)
