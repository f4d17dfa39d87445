"""How a file of codewords is laid out, from shapes alone: which codebook each layer has, and every
tensor of the file.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from ..files import architectures
from ..files.architectures import Architecture, LayerPlan
from ..files.source import Source, StateDictSource
from ..files.writer import TensorSpec
from ..job.checkpoint_run import ShapesOnly
from ..job.run_metadata import JSON_BYTES
from ..job.whole_groups import with_zeros
from . import bit_allocation, calibrate
from .recipe import Recipe

# outside the blocks: the paper leaves embedders and the final layer alone too
_OUTSIDE = ("final_layer.*", "*_in.*", "*embed*")
# a layer's name → (codewords, weights each)
Layouts = Mapping[str, tuple[int, int]]


def plan(
    shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, recipe: Recipe, name: str
) -> list[LayerPlan]:
    """What becomes of each linear: action "vq" or "keep", and why. Raises FileRefused when nothing
    could be quantized; `name` is the model's in that.
    """
    layers = []
    for layer in architectures.plan(shapes, architecture, recipe, name):
        action, why = _action(layer, recipe)
        layers.append(replace(layer, action=action, why=why, group=None, post_gelu=False))
    return layers


def _action(layer: LayerPlan, recipe: Recipe) -> tuple[str, str]:
    if layer.action == "keep":
        return "keep", layer.why
    in_no_block = calibrate.block_of(layer.name) == layer.name
    if in_no_block and any(fnmatchcase(layer.name, pattern) for pattern in _OUTSIDE):
        return "keep", "16 bit: small, and every block or pixel depends on it"
    vector = recipe.layout((layer.N, layer.columns))[1]
    if layer.columns % vector:
        return "keep", f"K={layer.K} is not a multiple of the sub-vector length {vector}"
    return "vq", layer.why


def layer_specs(
    layer: LayerPlan,
    layout: tuple[int, int],
    recipe: Recipe,
    bias_dtype: torch.dtype = torch.bfloat16,
) -> list[TensorSpec]:
    """The tensors of one layer of codewords."""
    (codewords, vector), name = layout, layer.name
    width = layer.columns // vector * (codewords.bit_length() - 1) // 8
    specs = [
        TensorSpec(f"{name}.weight", torch.uint8, (layer.N, width)),
        TensorSpec(f"{name}.weight_codebook", torch.float16, (codewords, vector)),
    ]
    if recipe.scaled:
        specs.append(TensorSpec(f"{name}.weight_scale", torch.float16, (layer.N,)))
    if layer.bias:
        specs.append(TensorSpec(f"{name}.bias", bias_dtype, (layer.N,)))
    return [*specs, TensorSpec(f"{name}.comfy_quant", torch.uint8, (JSON_BYTES,))]


def file_specs(
    shapes: Mapping[str, tuple[int, ...]],
    layers: Iterable[LayerPlan],
    layouts: Layouts,
    recipe: Recipe,
    kept_dtype: Callable[[str], torch.dtype] = lambda name: torch.bfloat16,
) -> list[TensorSpec]:
    """Every tensor of the file."""
    quantized = [layer for layer in layers if layer.action != "keep"]
    specs = [
        spec
        for layer in quantized
        for spec in layer_specs(layer, layouts[layer.name], recipe, bias_dtype(layer, kept_dtype))
    ]
    owned = {f"{layer.name}.{part}" for layer in quantized for part in ("weight", "bias")}
    return specs + [
        TensorSpec(key, kept_dtype(key), tuple(shape))
        for key, shape in shapes.items()
        if key not in owned
    ]


def bias_dtype(layer: LayerPlan, kept_dtype: Callable[[str], torch.dtype]) -> torch.dtype:
    """The dtype of a layer's bias in the file: the source's where it is a common float."""
    if not layer.bias:
        return torch.bfloat16
    dtype = kept_dtype(f"{layer.name}.bias")
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.bfloat16


def layer_layouts(
    source: Source | StateDictSource | ShapesOnly,
    layers: Iterable[LayerPlan],
    recipe: Recipe,
    measured: Mapping[str, float] | None = None,
) -> dict[str, tuple[int, int]]:
    """Codewords and sub-vector length of each layer: the recipe's, what a budget allows (which
    reads the weights), or mixed by what `sensitivity.measure` found.
    """
    quantized = [layer for layer in layers if layer.action != "keep"]

    def size(layer: LayerPlan, bits: float) -> int:
        layout = recipe.layout((layer.N, layer.columns), bits)
        return sum(spec.nbytes for spec in layer_specs(layer, layout, recipe))

    room = None if recipe.budget_gb is None else _room(source, quantized, recipe)
    bits: Mapping[str, float] = {layer.name: recipe.bits for layer in quantized}
    if measured is not None:
        bits = bit_allocation.choose_measured(quantized, recipe, measured, size, room)
    elif room is not None and not isinstance(source, ShapesOnly):
        weight = source.weight

        def read(name: str) -> Tensor:
            return with_zeros(weight(name))

        bits = bit_allocation.choose(quantized, recipe, read, size, room)
    return {
        layer.name: recipe.layout((layer.N, layer.columns), bits[layer.name]) for layer in quantized
    }


def _room(
    source: Source | StateDictSource | ShapesOnly, quantized: list[LayerPlan], recipe: Recipe
) -> int:
    """Bytes that a budget leaves for the layers of codewords."""
    if isinstance(source, ShapesOnly):
        raise ValueError(
            "which layer gets how many bits under a budget depends on the weights; leave budget_gb"
            " out of a plan"
        )
    owned = {f"{layer.name}.{part}" for layer in quantized for part in ("weight", "bias")}
    rest = sum(
        math.prod(shape) * source.kept_dtype(key).itemsize
        for key, shape in source.shapes.items()
        if key not in owned
    )
    # a generous guess at the header, its checksums and the report
    header = 400 * (len(source.shapes) + 4 * len(quantized))
    return int((recipe.budget_gb or 0) * 1e9) - rest - header
