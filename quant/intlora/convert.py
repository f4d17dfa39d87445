"""An ordinary LoRA to a SHIFT-ADD adapter, without training, and what each layer keeps of it.

    D = strength * (alpha / r) * up . down      P = (Z << k) + round(rot(D * smooth) 2^k / s)

The rounding error of an entry is at most half of s 2^-k, so the expected error is 2^-k rms(s) /
sqrt(12) against rms(D); k is the smallest for which that, together with the error of the integer
factors, stays under the target. "Kept" is 1 - |realised - wanted| / |wanted| in the space of the
integers, measured.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..files.errors import FileRefused
from ..merge.integer_grid import IntBase
from ..merge.refit import rounded_to_base
from .adapter import Adapter, LayerAdapter, key_of
from .factors import Factors, balanced, quantize, thin_norm
from .merge import BLOCK, Overflow, merge
from .variants import MAX_K, ShiftAdd, bits_needed


@dataclass(frozen=True)
class Change:
    """What a LoRA does to one module, or to rows of it: up (N, r) and down (r, K) with alpha (None:
    r), or dense float (N, K).
    """

    module: str
    up: Tensor | None = None
    down: Tensor | None = None
    alpha: float | None = None
    dense: Tensor | None = None
    rows: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return (
            tuple(self.dense.shape)
            if self.dense is not None
            else (self.up.shape[0], self.down.shape[1])
        )


@dataclass(frozen=True)
class Row:
    """A line of the report. size: |D| / |W|; kept, nearest: shares of D that the adapter and
    rounding to the base's own levels keep (0..1);
    bits: of the merged integers; by_k: k → share kept, where it was asked for.
    """

    layer: str
    rank: int
    size: float
    k: int
    kept: float
    nearest: float
    bits: int
    note: str = ""
    by_k: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """An adapter and what it keeps, layer by layer; skipped: modules of the LoRA that the model
    does not have in integers.
    """

    adapter: Adapter
    rows: list[Row]
    skipped: list[str]

    @property
    def kept(self) -> float:
        """The share kept in all layers, weighted alike."""
        return sum(row.kept for row in self.rows) / len(self.rows)


def convert(
    changes: Iterable[Change],
    bases: Mapping[str, IntBase],
    file: str,
    strength: float = 1.0,
    target: float = 0.02,
    k: int | None = None,
    bits: int = 16,
    ks: Iterable[int] = (),
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    facts: dict | None = None,
) -> Conversion:
    """A LoRA on a model's integers.

    file     the LoRA's name, for messages
    target   the error wanted, as a share of the change; k: instead of choosing one for it
    bits     16 | 8: the widest merged integers allowed. A k that was chosen is lowered to fit, with
      a note; a k that was given is refused
    ks       values of k for which the report says what would be kept
    progress called before each layer; an exception raised in it stops the work
    Raises FileRefused for a LoRA that fits no layer, has other shapes, rank 0, or values that are
    not finite; ValueError for options.
    """
    if not (
        0 < target < 1
        and math.isfinite(strength)
        and bits in (8, 16)
        and (k is None or 0 <= k <= MAX_K)
    ):
        raise ValueError(
            f"target={target}, strength={strength}, bits={bits}, k={k}: target is between 0 and 1,"
            f" bits 8 or 16, k 0 to {MAX_K}"
        )
    changes = list(changes)
    here = [change for change in changes if change.module in bases]
    if not here:
        raise FileRefused(
            f"{file} fits no 4-bit or int8 layer of this model (it has"
            f" {', '.join(c.module for c in changes[:3]) or 'no layers'}); choose a LoRA made for"
            " this model."
        )
    for change in here:
        _check(change, bases[change.module], file)
    layers, rows = {}, []
    for done, change in enumerate(here):
        progress(done, len(here), change.module)
        key = key_of(change.module, change.rows)
        if key in layers:
            raise FileRefused(
                f"{file} changes {key} twice; convert the two parts one by one and stack them."
            )
        layers[key], row = _convert(
            change, bases[change.module], strength, target, k, bits, tuple(ks), file
        )
        rows.append(row)
    progress(len(here), len(here), "")
    skipped = sorted({change.module for change in changes} - set(bases))
    return Conversion(
        Adapter(layers, {"source": file, "strength": strength, "target": target} | (facts or {})),
        rows,
        skipped,
    )


def _check(change: Change, base: IntBase, file: str) -> None:
    n, k = base.shape
    start, stop = change.rows or (0, n)
    if change.dense is None and (
        change.up is None
        or change.down is None
        or change.up.dim() != 2
        or change.down.dim() != 2
        or change.up.shape[1] != change.down.shape[0]
        or not change.up.shape[1]
    ):
        raise FileRefused(
            f"{file} is damaged: the factors of {change.module} do not fit one another or have rank"
            " 0; download it again."
        )
    if change.shape != (stop - start, k) or not 0 <= start < stop <= n:
        raise FileRefused(
            f"{file} was made for another model: it changes {change.module} as {change.shape[0]} x"
            f" {change.shape[1]}, this model has {stop - start} x {k}; choose a LoRA made for this"
            " model."
        )
    parts = (change.up, change.down, change.dense, torch.tensor(float(change.alpha or 0.0)))
    if not all(part.isfinite().all() for part in parts if part is not None):
        raise FileRefused(
            f"{file} is damaged: {change.module} holds values that are not finite; download it"
            " again."
        )


def _convert(
    change: Change,
    whole: IntBase,
    strength: float,
    target: float,
    k: int | None,
    bits: int,
    ks: tuple[int, ...],
    file: str,
) -> tuple[LayerAdapter, Row]:
    base = whole.rows(*(change.rows or (0, whole.shape[0])))
    job = _Job(change, base, strength, target)
    chosen = job.choose(target) if k is None else k
    layer, width = None, 0
    for lower in range(chosen, -1, -1):
        layer = job.layer(lower)
        try:
            width = merge(base, [(layer, 1.0)], bits, lower_k=False).base.bits
            break
        except Overflow as overflow:
            if k is not None or overflow.largest_k < 0:
                fix = (
                    f"choose k <= {overflow.largest_k}"
                    if overflow.largest_k >= 0
                    else "lower the strength"
                )
                raise FileRefused(
                    f"{file} does not fit int{bits} in {change.module} with k={chosen}; {fix}."
                ) from overflow
    used = layer.rule.k
    note = (
        ""
        if used == chosen
        else f"k lowered from {chosen} to {used}: the merged integers would not fit int{bits}"
    )
    kept = {value: job.kept(value) for value in {used, *ks}}
    size = math.sqrt(job.energy / max(job.weight_energy, 1e-300))
    row = Row(
        key_of(change.module, change.rows),
        layer.rank,
        size,
        used,
        kept[used],
        job.nearest,
        width,
        note,
        {value: kept[value] for value in ks},
    )
    return LayerAdapter(layer.rule, layer.base, layer.factors, layer.dense, change.rows), row


class _Job:
    """One layer's conversion: sums over blocks of rows, so that no float64 matrix of the whole
    layer is held. Integers are computed in float64, as when they are merged; what is only reported,
    in float32.

    energy, weight_energy  |D|^2 and |W|^2;  lost  |error of the integer factors|^2;  nearest  the
      share that rounding to the base keeps
    """

    def __init__(self, change: Change, base: IntBase, strength: float, target: float):
        self.base, self.digest, device = base, base.digest(), base.codes.device
        if change.dense is not None:
            self.factors, self.dense = None, change.dense.to(device)
            self.scale = strength
        else:
            rank = change.up.shape[1]
            self.scale = strength * ((rank if change.alpha is None else change.alpha) / rank)
            up, down = change.up.to(device).double() * self.scale, change.down.to(device).double()
            self.factors, self.up, self.down = _factors(up, down, target), up.float(), down.float()
        self.energy = self.weight_energy = self.lost = near = 0.0
        for part, wanted, stored in self.blocks():
            self.energy += wanted.square().sum(dtype=torch.float64).item()
            self.weight_energy += part.weight().square().sum(dtype=torch.float64).item()
            self.lost += (stored.float() - wanted).square().sum(dtype=torch.float64).item()
            near += (
                (rounded_to_base(part, wanted) - wanted).square().sum(dtype=torch.float64).item()
            )
        self.nearest = self._share(near)

    def blocks(self) -> Iterator[tuple[IntBase, Tensor, Tensor]]:
        """(base, the change wanted, float32, and the change that the stored factors give, float64),
        in the base's space, block by block of rows.
        """
        step = max(1, BLOCK // self.base.shape[1])
        for start in range(0, self.base.shape[0], step):
            part, rows = self.base.rows(start, start + step), slice(start, start + step)
            if self.factors is None:
                stored = part.into(self.dense[rows].double() * self.scale)
                yield part, stored.float(), stored
            else:
                yield (
                    part,
                    part.into(self.up[rows] @ self.down),
                    part.into(self.factors.rows(start, start + step).delta()),
                )

    def _share(self, lost: float) -> float:
        return 1.0 if self.energy == 0 else max(0.0, 1 - math.sqrt(lost / self.energy))

    def choose(self, target: float) -> int:
        """The smallest k whose expected error, with that of the factors, is within the target."""
        if self.energy == 0:
            return 0
        room = math.sqrt(
            max(target**2 - self.lost / self.energy, (target / 4) ** 2)
            * self.energy
            / math.prod(self.base.shape)
        )
        step = self.base.scale.double().square().mean().sqrt().item() / math.sqrt(12)
        return min(MAX_K, max(0, math.ceil(math.log2(max(step / room, 1e-30)))))

    def kept(self, k: int) -> float:
        """The share of the change that is kept at k."""
        return self._share(
            sum(
                (
                    ShiftAdd(k).addend(part, stored).float()
                    * part.spread(part.scale, torch.float32)
                    * 2.0**-k
                    - wanted
                )
                .square()
                .sum(dtype=torch.float64)
                .item()
                for part, wanted, stored in self.blocks()
            )
        )

    def layer(self, k: int) -> LayerAdapter:
        """The adapter at k; its rows are those of the base."""
        if self.factors is not None:
            return LayerAdapter(ShiftAdd(k), self.digest, self.factors)
        addend = torch.cat([ShiftAdd(k).addend(part, stored) for part, _, stored in self.blocks()])
        return LayerAdapter(
            ShiftAdd(k),
            self.digest,
            dense=addend.to({8: torch.int8, 16: torch.int16, 32: torch.int32}[bits_needed(addend)]),
        )


def _factors(up: Tensor, down: Tensor, target: float) -> Factors:
    """Integer factors: int8 where their error is at most half of the target, else int16. Norms of
    thin products: no dense matrix.
    """
    up, down = balanced(up, down)
    found = quantize(up, down, torch.int8)
    stored_down, stored_up = found.floats()
    error = thin_norm([(stored_up, stored_down, 1.0), (up, down.T, -1.0)])
    return (
        found
        if error <= target / 2 * thin_norm([(up, down.T, 1.0)])
        else quantize(up, down, torch.int16)
    )
