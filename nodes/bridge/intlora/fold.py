"""IntLoRAs and patches folded into one low-bit layer.

What is folded is always the sum of everything at once: base + IntLoRAs that were merged before +
patches, so that stacks lose no more than one of their kind would. Where it goes
(`quant/merge/refit.py`):

    W4A4 layers    same size: branch and 4-bit codes are fitted again at the branch's own rank, so
                   that nothing costs more than before;
                   wider: the change's factors join the branch, exactly.
    4-bit weights  (modulation, one token a step) and codewords: the factors lie beside the codes:
                   rounding them again would lose most of them.
    16 bit         are written with the change in them.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import comfy.lora
import torch

from ....quant.interop.export import ACTIONS
from ....quant.intlora import file, merge
from ....quant.intlora.adapter import Adapter, LayerAdapter
from ....quant.merge import refit
from ....quant.merge.integer_grid import IntBase
from ....quant.weights.delta import WeightDelta
from ....quant.weights.formats import Weight
from ....quant.weights.lowrank import ROUNDING, factors_of_lowest_rank
from ....quant.weights.svdquant_w4a4 import SVDQuantWeight
from ....quant.weights.svdquant_w4a8 import W4A8Weight
from ..quantized import patches
from .bases import PREFIX

BRANCHES = ("wider", "same size")
Use = tuple[LayerAdapter, float]  # an adapter's layer and its strength


@dataclass(frozen=True)
class MergedLayer:
    """A layer that was folded. retention: share of the change that it keeps; rank: of its branch
    after; note: what was done otherwise than asked for.
    """

    name: str
    action: str
    retention: float
    rank: int
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0
    note: str = ""

    def to_json(self) -> dict:
        """As the merged file keeps it, where the retention is called `kept`."""
        return {
            "kept" if name == "retention" else name: value for name, value in asdict(self).items()
        }

    @classmethod
    def from_json(cls, row: dict) -> MergedLayer:
        """The inverse of `to_json`."""
        return cls(
            **{"retention" if name == "kept" else name: value for name, value in row.items()}
        )


@dataclass(frozen=True)
class MergeReport:
    """What a merge did. name: of the model or the file; bytes_before, bytes_after: of the whole
    file, or of the merged layers.
    """

    name: str
    branch: str
    sources: str
    layers: list[MergedLayer]
    bytes_before: int
    bytes_after: int
    left_out: tuple[str, ...] = ()


def read_adapters(uses: Iterable[tuple[str, float]]) -> dict[str, Adapter]:
    """Path → adapter, each file read once."""
    return {path: file.read(path) for path in sorted({path for path, _ in uses})}


def layers_by_module(
    uses: Iterable[tuple[str, float]], adapters: Mapping[str, Adapter]
) -> dict[str, list[Use]]:
    """Module → the layers of all adapters for it, with their strengths."""
    modules: dict[str, list[Use]] = {}
    for path, strength in uses:
        for name, layers in adapters[path].by_module().items():
            modules.setdefault(name, []).extend(
                (layer, strength) for layer in layers if strength != 0 or layer.separated
            )
    return {name: layers for name, layers in modules.items() if layers}


def combined(
    weight: Weight, uses: list[Use], change: WeightDelta | None
) -> tuple[Weight, WeightDelta]:
    """(the weight, its rows scaled where a patch does so, and what IntLoRAs and patches together
    add to it).
    """
    device = weight.device
    delta = WeightDelta()
    if uses:
        on_device = [(layer.to(device), strength) for layer, strength in uses]
        delta = merge.delta(IntBase.of(weight), on_device)
    if change is not None:
        delta = delta.then(change.to(device))
    if delta.row_scale is None:
        return weight, delta
    return _with_scaled_rows(weight, delta.row_scale), replace(delta, row_scale=None)


def _with_scaled_rows(weight: Weight, ratio: torch.Tensor) -> Weight:
    """The weight with its rows times ratio (N,), in its scales; its real bias stays."""
    names: tuple[str, ...] = ("scale", "zeros", "proj_up")
    if isinstance(weight, W4A8Weight):  # whose scales are integers below one of each row
        names = ("channel_scale", "proj_up")
    if weight.scale is None:  # codewords of rows that share the codebook's
        weight = replace(weight, scale=torch.ones_like(ratio, dtype=weight.branch_dtype))
    fields = {}
    for name in names:
        tensor = getattr(weight, name, None)
        if tensor is not None:
            rows = ratio[:, None] if name == "proj_up" else ratio
            fields[name] = (tensor.float() * rows).to(tensor.dtype)
    new = replace(weight, **fields)
    return refit.same_bias(weight, new) if isinstance(weight, SVDQuantWeight) else new


def change_of_patches(
    weight: Weight, name: str, entries: list[tuple], inputs: int | None = None
) -> WeightDelta:
    """What ComfyUI's patches do to a layer: as factors where they are, or can be split
    into, some. inputs: of the layer, where the weight has zeros behind them.
    """
    n, stored = weight.shape
    k = inputs or stored

    def dense() -> torch.Tensor:
        return weight.dequantize()[:, :k]

    effect = patches.effect_of(entries, (n, k), dense, name, weight.device)
    change = _split(dense(), name, entries) if effect is None else effect.delta
    return change.for_inputs(stored)


def _split(original: torch.Tensor, name: str, entries: list[tuple]) -> WeightDelta:
    """What patches do to a float weight, by ComfyUI's own arithmetic on it."""
    key = f"{PREFIX}{name}.weight"
    difference = comfy.lora.calculate_weight(entries, original.clone(), key) - original
    factors = factors_of_lowest_rank(difference, original.square().sum().item() * ROUNDING**2)
    if factors is None:
        return WeightDelta(dense=difference)
    down, up = factors
    return WeightDelta(down=down, up=up)


def fold(weight: Weight, delta: WeightDelta, wider: bool) -> tuple[Weight, float]:
    """The weight with a change in it, and the share of it that is retained."""
    if wider or not can_refit(weight):
        return refit.fold_into_branch(weight, delta)
    return refit.refit(weight, delta)


def can_refit(weight: Weight) -> bool:
    """Whether codes can be fitted again: of a plain layer they would lose the change, and those of
    a composite have no one grid.
    """
    return isinstance(weight, SVDQuantWeight) and not weight.smooth_rows


def merged_layer(
    name: str, old: Weight, new: Weight, retention: float, began: float, wider: bool
) -> MergedLayer:
    """A line of the report. began: time.monotonic() before the work."""
    note = ""
    if not wider and not can_refit(old):
        note = "in a wider branch, since its parts have unlike smoothing"
        if not isinstance(old, SVDQuantWeight):
            note = "beside the low-bit weights"
    return MergedLayer(
        name=name,
        action=ACTIONS[old.FORMAT],
        retention=retention,
        rank=new.rank,
        bytes_before=old.nbytes,
        bytes_after=new.nbytes,
        seconds=time.monotonic() - began,
        note=note,
    )
