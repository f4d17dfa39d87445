"""An ordinary LoRA to a SHIFT-ADD adapter, without training, and what each layer keeps of it.

    D = strength * (alpha / r) * up . down      P = (Z << k) + round(rot(D * smooth) 2^k / s)

The rounding error of an entry is at most half of s 2^-k, so the expected error is 2^-k rms(s) /
sqrt(12) against rms(D); k is the smallest for which that, together with the error of the integer
factors, stays under the target. The retention is 1 - |realised - wanted| / |wanted| in the space of
the integers, measured.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..files.errors import FileRefused
from ..merge.integer_grid import IntBase
from ..merge.refit import rounded_to_base
from ..weights.delta import WeightDelta
from ..weights.lowrank import balanced, thin_norm
from .adapter import Adapter, LayerAdapter, key_of
from .factors import Factors, quantize
from .merge import BLOCK, INTEGERS, Overflow, merge
from .variants import MAX_K, ShiftAdd, bits_needed


@dataclass(frozen=True)
class ModuleChange:
    """What a LoRA does to one module, or to rows of it.

    delta  low rank or dense, float, at strength 1 but for `scale`
    scale  of the delta: alpha / r of a LoRA
    rows   (start, stop) of a fused module; None: all of it
    """

    module: str
    delta: WeightDelta
    scale: float = 1.0
    rows: tuple[int, int] | None = None

    @classmethod
    def of_lora(
        cls,
        module: str,
        up: Tensor,
        down: Tensor,
        alpha: float | None = None,
        rows: tuple[int, int] | None = None,
    ) -> "ModuleChange":
        """The change that a LoRA's up (N, r), down (r, K) and alpha (None: r) make."""
        rank = up.shape[1]
        scale = 1.0 if alpha is None or not rank else alpha / rank
        return cls(module, WeightDelta(down=down.T, up=up), scale, rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K); what a damaged LoRA has instead."""
        if self.delta.dense is not None:
            return tuple(self.delta.dense.shape)
        assert self.delta.factors is not None  # `convert` refuses a change without
        down, up = self.delta.factors
        return up.shape[0], down.shape[0]


@dataclass(frozen=True)
class LayerRow:
    """A line of the report. size: |D| / |W|; retention, nearest: shares of D that the adapter and
    rounding to the base's own levels keep (0..1); bits: of the merged integers; by_k: k → share
    kept, where it was asked for.
    """

    layer: str
    rank: int
    size: float
    k: int
    retention: float
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
    rows: list[LayerRow]
    skipped: list[str]

    @property
    def retention(self) -> float:
        """The share kept in all layers, weighted alike."""
        return sum(row.retention for row in self.rows) / len(self.rows)


@dataclass(frozen=True)
class Options:
    """How closely a LoRA is to be kept. Raises ValueError for values out of range.

    strength  the LoRA's
    target    the error wanted, as a share of the change; k: instead of choosing one for it
    bits      16 | 8: the widest merged integers allowed. A k that was chosen is lowered to fit,
      with a note; a k that was given is refused
    ks        values of k for which the report says what would be kept
    """

    strength: float = 1.0
    target: float = 0.02
    k: int | None = None
    bits: int = 16
    ks: tuple[int, ...] = ()

    def __post_init__(self):
        if not (
            0 < self.target < 1
            and math.isfinite(self.strength)
            and self.bits in (8, 16)
            and (self.k is None or 0 <= self.k <= MAX_K)
        ):
            raise ValueError(
                f"target={self.target}, strength={self.strength}, bits={self.bits}, k={self.k}:"
                f" target is between 0 and 1, bits 8 or 16, k 0 to {MAX_K}"
            )


def convert(
    changes: Iterable[ModuleChange],
    bases: Mapping[str, IntBase],
    file: str,
    options: Options | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    facts: dict | None = None,
) -> Conversion:
    """A LoRA on a model's integers.

    file     the LoRA's name, for messages
    progress called before each layer; an exception raised in it stops the work
    facts    what the adapter's file says besides source, strength and target
    Raises FileRefused for a LoRA that fits no layer, has other shapes, rank 0, or values that are
    not finite.
    """
    options = options or Options()
    changes = list(changes)
    fitting = [change for change in changes if change.module in bases]
    if not fitting:
        raise FileRefused(
            f"{file} fits no 4-bit or int8 layer of this model (it has"
            f" {', '.join(c.module for c in changes[:3]) or 'no layers'}); choose a LoRA made for"
            " this model."
        )
    for change in fitting:
        _check(change, bases[change.module], file)
    layers: dict[str, LayerAdapter] = {}
    rows = []
    for done, change in enumerate(fitting):
        progress(done, len(fitting), change.module)
        key = key_of(change.module, change.rows)
        if key in layers:
            raise FileRefused(
                f"{file} changes {key} twice; convert the two parts one by one and stack them."
            )
        layers[key], row = _convert_layer(change, bases[change.module], options, file)
        rows.append(row)
    progress(len(fitting), len(fitting), "")
    skipped = sorted({change.module for change in changes} - set(bases))
    provenance = {"source": file, "strength": options.strength, "target": options.target}
    return Conversion(Adapter(layers, provenance | (facts or {})), rows, skipped)


def _check(change: ModuleChange, base: IntBase, file: str) -> None:
    n, k = base.shape
    start, stop = change.rows or (0, n)
    up, down, dense = change.delta.up, change.delta.down, change.delta.dense
    if dense is None and (
        up is None
        or down is None
        or up.dim() != 2
        or down.dim() != 2
        or up.shape[1] != down.shape[1]
        or not up.shape[1]
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
    tensors = [tensor for tensor in (up, down, dense) if tensor is not None]
    if not (math.isfinite(change.scale) and all(t.isfinite().all() for t in tensors)):
        raise FileRefused(
            f"{file} is damaged: {change.module} holds values that are not finite; download it"
            " again."
        )


def _convert_layer(
    change: ModuleChange, whole: IntBase, options: Options, file: str
) -> tuple[LayerAdapter, LayerRow]:
    base = whole.rows(*(change.rows or (0, whole.shape[0])))
    conversion = _LayerConversion(change, base, options)
    chosen = conversion.choose(options.target) if options.k is None else options.k
    layer, used, width = _fit(conversion, change.module, chosen, options, file)
    note = ""
    if used != chosen:
        note = (
            f"k lowered from {chosen} to {used}: the merged integers would not fit"
            f" int{options.bits}"
        )
    retention = {k: conversion.retention(k) for k in {used, *options.ks}}
    row = LayerRow(
        layer=key_of(change.module, change.rows),
        rank=layer.rank,
        size=math.sqrt(conversion.energy / max(conversion.weight_energy, 1e-300)),
        k=used,
        retention=retention[used],
        nearest=conversion.nearest,
        bits=width,
        note=note,
        by_k={k: retention[k] for k in options.ks},
    )
    return replace(layer, rows=change.rows), row


def _fit(
    conversion: "_LayerConversion", module: str, chosen: int, options: Options, file: str
) -> tuple[LayerAdapter, int, int]:
    """(the adapter at the largest k up to `chosen` whose merged integers fit, this k, their
    bits).
    """
    for k in range(chosen, -1, -1):
        layer = conversion.layer(k)
        try:
            merged = merge(conversion.base, [(layer, 1.0)], options.bits, lower_k=False)
            return layer, k, merged.base.bits
        except Overflow as overflow:
            if options.k is None and overflow.largest_k >= 0:
                continue
            fix = "lower the strength"
            if overflow.largest_k >= 0:
                fix = f"choose k <= {overflow.largest_k}"
            raise FileRefused(
                f"{file} does not fit int{options.bits} in {module} with k={chosen}; {fix}."
            ) from overflow
    raise AssertionError("a k of 0 either fits or has been refused")


class _LayerConversion:
    """One layer's conversion: sums over blocks of rows, so that no float64 matrix of the whole
    layer is held. Integers are computed in float64, as when they are merged; what is only reported,
    in float32.

    energy, weight_energy  |D|^2 and |W|^2;  lost  |error of the integer factors|^2;  nearest  the
      share that rounding to the base keeps
    """

    def __init__(self, change: ModuleChange, base: IntBase, options: Options):
        self.base, self.digest = base, base.digest()
        self.factors: Factors | None = None
        self.scale = options.strength * change.scale
        device, delta = base.codes.device, change.delta
        if delta.dense is not None:
            self.dense = delta.dense.to(device)
        else:
            assert delta.factors is not None  # `convert` refuses a change without
            up = delta.factors[1].to(device).double() * self.scale
            down = delta.factors[0].T.to(device).double()
            self.factors = _factors(up, down, options.target)
            self.up, self.down = up.float(), down.float()
        self.energy = self.weight_energy = self.lost = nearest_lost = 0.0
        for part, wanted, stored in self.blocks():
            nearest = rounded_to_base(part, wanted)
            self.energy += _energy(wanted)
            self.weight_energy += _energy(part.weight())
            self.lost += _energy(stored.float() - wanted)
            nearest_lost += _energy(nearest - wanted)
        self.nearest = self._share(nearest_lost)

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
                wanted = part.into(self.up[rows] @ self.down)
                yield part, wanted, part.into(self.factors.rows(start, start + step).delta())

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

    def retention(self, k: int) -> float:
        """The share of the change that is kept at k."""
        lost = 0.0
        for part, wanted, stored in self.blocks():
            steps = ShiftAdd(k).addend(part, stored).float()
            realised = steps * part.spread(part.scale, torch.float32) * 2.0**-k
            lost += _energy(realised - wanted)
        return self._share(lost)

    def layer(self, k: int) -> LayerAdapter:
        """The adapter at k; its rows are those of the base."""
        if self.factors is not None:
            return LayerAdapter(ShiftAdd(k), self.digest, self.factors)
        addend = torch.cat([ShiftAdd(k).addend(part, stored) for part, _, stored in self.blocks()])
        return LayerAdapter(
            ShiftAdd(k), self.digest, dense=addend.to(INTEGERS[bits_needed(addend)])
        )


def _energy(matrix: Tensor) -> float:
    return matrix.square().sum(dtype=torch.float64).item()


def _factors(up: Tensor, down: Tensor, target: float) -> Factors:
    """Integer factors: int8 where their error is at most half of the target, else int16. Norms of
    thin products: no dense matrix.
    """
    up, down = balanced(up, down)
    narrow = quantize(up, down, torch.int8)
    stored_down, stored_up = narrow.floats()
    error = thin_norm([(stored_up, stored_down, 1.0), (up, down.T, -1.0)])
    if error <= target / 2 * thin_norm([(up, down.T, 1.0)]):
        return narrow
    return quantize(up, down, torch.int16)
