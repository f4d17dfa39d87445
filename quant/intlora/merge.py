"""Applying adapters to a base: merged into its integers, or beside it.

Three ways, from the one that keeps everything to the one that costs nothing:

    merged       P in wider integers (int8 where it fits, else int16, else int32) under the scale of
      `variants`. Exact: the merged weight and the one computed from base and adapter apart are
      equal bit for bit. No longer a 4-bit weight: an int4 kernel cannot read it.
    beside       base as it is, plus x . change^T: dense, or (SHIFT-ADD) as low-rank factors, which
      a layer's 16-bit branch takes up. The factors skip the rounding to 2^-k, so they differ from
      `merged` by at most half a step of s 2^-k a weight.
    refitted     into the format that the layer has: see `quant/merge/refit.py`.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..merge.integer_grid import IntBase
from ..weights.delta import WeightDelta
from .adapter import LayerAdapter
from .variants import ShiftAdd, bits_needed

BLOCK = 2**22  # weights at once
INTEGERS = {8: torch.int8, 16: torch.int16, 32: torch.int32}
Uses = Sequence[tuple[LayerAdapter, float]]


class Overflow(ValueError):
    """P does not fit the integers asked for; `largest_k` is the largest k that does, or -1."""

    def __init__(self, bits: int, k: int, largest_k: int):
        self.largest_k = largest_k
        fix = f"choose k <= {largest_k}" if largest_k >= 0 else "lower the strength"
        super().__init__(f"with k={k} the merged integers do not fit int{bits}; {fix}")


@dataclass(frozen=True)
class Merged:
    """A merged layer: its integers as a base of their own, and what had to be changed for them to
    fit.
    """

    base: IntBase
    notes: tuple[str, ...] = ()


def merge(base: IntBase, uses: Uses, bits: int = 16, lower_k: bool = True) -> Merged:
    """Adapters with their strengths into a base's integers.

    Several SHIFT-ADD adapters add up on the finest of their grids. MUL and SHIFT stand alone (a
    strength of t scales the adapter's A B, not R: at 0 an adapter with R still gives the model as
    it was before training), with SHIFT-ADD adapters on top of what they give.
    bits     the widest integers allowed for SHIFT-ADD; lower_k: choose a smaller k where they do
      not suffice, and say so
    Raises Overflow where that is not allowed, ValueError for two MUL or SHIFT adapters on the same
    rows.
    """
    if not all(math.isfinite(strength) for _, strength in uses):
        raise ValueError("a strength is not a finite number")
    cuts = sorted({0, base.shape[0], *(row for use, _ in uses for row in use.rows or ())})
    notes: list[str] = []
    runs = []
    for start, stop in itertools.pairwise(cuts):
        on_rows = [
            (_within(use, start, stop), strength)
            for use, strength in uses
            if (strength != 0 or use.separated)
            and (use.rows is None or use.rows[0] <= start < use.rows[1])
        ]
        runs.append(_merge_rows(base.rows(start, stop), on_rows, bits, lower_k, notes))
    p = torch.cat([run[0] for run in runs])
    scale = torch.cat([run[1] for run in runs], 1)
    width = bits_needed(p)
    return Merged(_as_base(base, p.to(INTEGERS[width]), scale, width), tuple(notes))


def _within(use: LayerAdapter, start: int, stop: int) -> LayerAdapter:
    first = use.rows[0] if use.rows else 0
    return use.part(start - first, stop - first)


def _as_base(base: IntBase, p: Tensor, scale: Tensor, bits: int = 32) -> IntBase:
    return replace(base, codes=p, scale=scale, bits=bits, unsigned=False, odd=False)


def _ground(base: IntBase, uses: Uses) -> IntBase:
    """The base under the SHIFT-ADD adapters: itself, or what MUL or SHIFT makes of it."""
    alone = [(use, strength) for use, strength in uses if not use.additive]
    if len(alone) > 1:
        raise ValueError(
            "two MUL or SHIFT adapters cannot share a layer: each multiplies the integers that the"
            " other was trained on; keep one of them and convert the others with Convert LoRA to"
            " IntLoRA"
        )
    if not alone:
        return base
    use, strength = alone[0]
    product = use.rule.product(base, use.change(base, strength))
    return _as_base(base, product.p, product.scale)


def _sum(base: IntBase, ground: IntBase, uses: Uses, k: int) -> Tensor:
    """P of the SHIFT-ADD adapters at k, int32. Each is rounded at its own k (as when it is alone)
    and shifted up; a lower k rounds again.
    """
    p = ground.integers().long() << k
    for use, strength in uses:
        if isinstance(use.rule, ShiftAdd):
            own = min(use.rule.k, k)
            p += ShiftAdd(own).addend(ground, use.change(base, strength)).long() << (k - own)
    return p.clamp(-(2**31), 2**31 - 1)


def _merge_rows(
    base: IntBase, uses: Uses, bits: int, lower_k: bool, notes: list[str]
) -> tuple[Tensor, Tensor]:
    """P (int8, int16 or int32) and scale float32 of rows that share their adapters, at the
    adapters' largest k, lowered until P fits.
    """
    wanted = max((use.rule.k for use, _ in uses if isinstance(use.rule, ShiftAdd)), default=None)
    if wanted is None:
        product = _merge_at(base, uses, None, 32)
        assert product is not None  # int32 holds every one
        return product
    k, merged = wanted, _merge_at(base, uses, wanted, bits)
    while merged is None and k > 0:
        k -= 1
        merged = _merge_at(base, uses, k, bits)
    if merged is None or (k < wanted and not lower_k):
        raise Overflow(bits, wanted, -1 if merged is None else k)
    if k < wanted:
        notes.append(
            f"k was lowered from {wanted} to {k}, for the merged integers to fit int{bits}"
        )
    return merged


def _merge_at(base: IntBase, uses: Uses, k: int | None, bits: int) -> tuple[Tensor, Tensor] | None:
    """P and scale at k, a block of rows after another; None as soon as P does not fit."""
    pieces, step = [], max(1, BLOCK // base.shape[1])
    for row in range(0, base.shape[0], step):
        end = min(row + step, base.shape[0])
        part = base.rows(row, end)
        block = [(use.part(row, end), strength) for use, strength in uses]
        ground = _ground(part, block)
        if k is None:
            p, scale = ground.integers(), ground.scale.float()
        else:
            p, scale = _sum(part, ground, block, k), ShiftAdd(k).scale(ground)
        if bits_needed(p) > bits:
            return None
        pieces.append((p.to(INTEGERS[bits]), scale))
    return torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces], 1)


def unmerged(base: IntBase, use: LayerAdapter, strength: float = 1.0) -> Tensor:
    """W' of one adapter computed from base and adapter apart, float32 (N, K) in the base's space:
    what `merge` must equal.
    """
    return use.rule.unmerged(base, use.change(base, strength))


def change(base: IntBase, uses: Uses) -> Tensor:
    """What the adapters change of the weight on raw inputs, dense float32 (N, K): y += x . change^T
    beside the base's kernel.
    """
    return base.out_of(merge(base, uses).base.weight() - base.weight())


def branch(base: IntBase, uses: Uses) -> WeightDelta:
    """SHIFT-ADD adapters as one low-rank branch, float32, strengths inside: y += (x . down) . up^T.

    Raises ValueError for adapters that have no low rank: MUL, SHIFT, and dense changes.
    """
    downs, ups = [], []
    for use, strength in uses:
        if use.factors is None or not use.additive:
            kind = "a dense change" if use.additive else use.rule.NAME.upper()
            raise ValueError(
                f"{kind} has no low rank; merge it, or compute it densely beside the layer"
            )
        if strength:
            down, up = use.factors.floats()
            above = use.rows[0] if use.rows else 0
            below = base.shape[0] - above - up.shape[0]
            downs.append(down)
            ups.append(torch.nn.functional.pad(up * strength, (0, 0, above, below)))
    if not downs:
        return WeightDelta()
    return WeightDelta(down=torch.cat(downs, 1), up=torch.cat(ups, 1))


def delta(base: IntBase, uses: Uses) -> WeightDelta:
    """What adapters of any kind change of the weight on raw inputs, float32: those of low rank as a
    branch, the others dense.
    """
    thin = [use for use in uses if use[0].thin]
    whole = [use for use in uses if not use[0].thin]
    change_of_thin = branch(base, thin)
    return replace(change_of_thin, dense=change(base, whole)) if whole else change_of_thin
