"""Which layer gets how many bits, when all of them must not exceed a size: greedy by error removed
for each byte spent.

Every layer starts at the fewest bits; then the step to the next layout that removes the most error
a byte is taken, again and again, as long as it fits. What a layer's error is:

    the model at work  its share in the error of what the model puts out (`sensitivity`)
    weights alone      sum |W - W_q|^2 / sum |W|^2 at each layout, by a quick k-means on a part of
      its rows: the share of noise in its outputs for inputs without a preferred direction. Errors
      of different layers count alike
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..files.architectures import LayerPlan
from . import fit as fitting
from . import sensitivity
from .recipe import LAYOUTS, MIXED_LAYOUTS, Recipe

MOST_LESS = 1  # bits that a layer gives up for others where bits are mixed
ROWS, ITERATIONS = 128, 6  # of a layer that the quick k-means looks at, and its iterations


def quick_errors(
    weight: Tensor, recipe: Recipe, shape: tuple[int, int], seed: int
) -> dict[float, float]:
    """Bits → share of the weights' power that would be lost, from evenly spread rows of a weight
    (N, K).
    """
    rows = weight[:: max(1, len(weight) // ROWS)][:ROWS]
    power = rows.square().sum().item()
    errors: dict[float, float] = {}
    for bits in LAYOUTS:
        codewords, vector = recipe.layout(shape, bits)
        quick_layout = (min(codewords, rows.numel() // vector), vector)
        options = replace(recipe.layer_options(quick_layout), iterations=ITERATIONS)
        if options.codewords & (options.codewords - 1):
            options = replace(options, codewords=1 << (options.codewords.bit_length() - 1))
        fitted = fitting.fit(rows, None, None, options, torch.Generator().manual_seed(seed))
        turned = fitting.hadamard64(rows) if options.rotation else rows
        errors[bits] = (turned - fitted.matrix()).square().sum().item() / max(power, 1e-30)
    return errors


def allocate(
    errors: Mapping[str, Mapping[float, float]], sizes: Mapping[str, Mapping[float, int]], room: int
) -> dict[str, float]:
    """Bits for each layer. errors, sizes: layer → bits → error, bytes; room: bytes for all of them
    together.

    Raises ValueError when even the fewest bits do not fit, saying what they need.
    """
    bits = {name: min(choices) for name, choices in sizes.items()}
    spent = sum(sizes[name][chosen] for name, chosen in bits.items())
    if spent > room:
        raise ValueError(
            f"at the fewest bits the layers take {spent / 1e9:.3f} GB, and {max(room, 0) / 1e9:.3f}"
            " GB are left for them; raise budget_gb"
        )
    open_ones = set(bits)
    while open_ones:
        best = None
        for name in sorted(open_ones):
            more = min((b for b in sizes[name] if b > bits[name]), default=None)
            cost = 0 if more is None else sizes[name][more] - sizes[name][bits[name]]
            if more is None or spent + cost > room:
                open_ones.discard(name)
                continue
            gain = (errors[name][bits[name]] - errors[name][more]) / max(cost, 1)
            if best is None or gain > best[0]:
                best = gain, name, more, cost
        if best:
            bits[best[1]], spent = best[2], spent + best[3]
    return bits


def choose(
    layers: Iterable[LayerPlan],
    recipe: Recipe,
    weight: Callable[[str], Tensor],
    size: Callable[[LayerPlan, float], int],
    room: int,
) -> dict[str, float]:
    """Bits for each planned layer. weight: reads a layer's matrix; size: its bytes at so
    many bits.
    """
    layers = list(layers)
    errors = {
        layer.name: quick_errors(weight(layer.name), recipe, (layer.N, layer.columns), recipe.seed)
        for layer in layers
    }
    return allocate(errors, _sizes(layers, size, LAYOUTS), room)


def choose_measured(
    layers: Iterable[LayerPlan],
    recipe: Recipe,
    measured: Mapping[str, float],
    size: Callable[[LayerPlan, float], int],
    room: int | None,
) -> dict[str, float]:
    """The same by what `sensitivity.measure` found; room None: what the layers take at the
    recipe's bits. Layers that were not measured have the recipe's bits.
    """
    layers = list(layers)
    reached = [layer for layer in layers if layer.name in measured]
    others = [layer for layer in layers if layer.name not in measured]
    if room is None:
        room = sum(size(layer, recipe.bits) for layer in layers)
        choices = [bits for bits in MIXED_LAYOUTS if bits >= recipe.bits - MOST_LESS]
    else:
        choices = list(LAYOUTS)
    sizes = _sizes(reached, size, choices) | _sizes(others, size, [recipe.bits])
    return allocate(sensitivity.at_bits(measured, choices), sizes, room)


def _sizes(
    layers: Iterable[LayerPlan], size: Callable[[LayerPlan, float], int], choices: Iterable[float]
) -> dict[str, dict[float, int]]:
    """Layer → bits → bytes, of the layouts whose sub-vectors divide its rows."""
    choices = list(choices)
    return {
        layer.name: {
            bits: size(layer, bits)
            for bits in choices
            if layer.columns % MIXED_LAYOUTS[bits][1] == 0
        }
        for layer in layers
    }
