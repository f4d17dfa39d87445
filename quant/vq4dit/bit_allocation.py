"""Which layer gets how many bits, when the whole file must not exceed a size: greedy by error
removed for each byte spent.

Every layer starts at the fewest bits; then the step to the next layout that removes the most error
a byte is taken, again and again, as long as it fits. A layer's error is sum |W - W_q|^2 / sum |W|^2
at each layout, measured by a quick k-means on a part of its rows: the share of noise in its outputs
for inputs without a preferred direction. Errors of different layers count alike.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..files.architectures import LayerPlan
from . import fit as fitting
from .recipe import LAYOUTS, Recipe

ROWS, ITERATIONS = 128, 6  # of a layer that the quick k-means looks at, and its iterations


def quick_errors(
    weight: Tensor, recipe: Recipe, shape: tuple[int, int], seed: int
) -> dict[int, float]:
    """Bits → share of the weights' power that would be lost, from evenly spread rows of a weight
    (N, K).
    """
    rows = weight[:: max(1, len(weight) // ROWS)][:ROWS]
    power, errors = rows.square().sum().item(), {}
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
    errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], room: int
) -> dict[str, int]:
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
    size: Callable[[LayerPlan, int], int],
    room: int,
) -> dict[str, int]:
    """Bits for each planned layer. weight: reads a layer's matrix; size: its bytes at so
    many bits.
    """
    layers = list(layers)
    errors = {
        layer.name: quick_errors(weight(layer.name), recipe, (layer.N, layer.K), recipe.seed)
        for layer in layers
    }
    return allocate(
        errors,
        {layer.name: {bits: size(layer, bits) for bits in LAYOUTS} for layer in layers},
        room,
    )
