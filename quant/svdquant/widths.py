"""Which layers get activations of 8 bits, where a share of the multiplications may have them.

    (E4 - E8) / |y|^2 / (tokens * N * K)

is what 8 bits save of a layer's relative output error for each multiplication: layers are taken in
its order as long as they fit (the greedy answer to a knapsack; Dantzig, 1957, "Discrete-variable
extremum problems"). E4 and E8 are those that smoothings are compared by (`quick_score`). Layers
that read one input are taken together: their input is quantized once.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration.statistics import InputStats
from .problem import LayerProblem, layer_problem
from .recipe import Recipe
from .smooth import InputSpace, smoothing_factors
from .space_search import QUICK_ROWS, quick_score


class Layers(NamedTuple):
    """What may get 8 bits together. saved: of their relative squared errors; cost:
    multiplications.
    """

    names: tuple[str, ...]
    saved: float
    cost: int


def widened(recipe: Recipe) -> Recipe:
    """The recipe of a layer that got 8 bits."""
    return replace(recipe, act_bits=8, wide_share=0.0)


def measured(
    name: str, weight: Tensor, stats: InputStats | None, recipe: Recipe, post_gelu: bool
) -> Layers:
    """What 8 bits save in a layer, weight (N, K), and cost. Without recorded inputs a layer is
    taken to read as many tokens as any other.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    problem = layer_problem(weight, None, stats, post_gelu, generator)
    tokens = stats.count if stats is not None and stats.count else 1
    rows = problem.weight[:: max(1, len(weight) // QUICK_ROWS[recipe.preset])]
    signal = (problem.x @ rows.T).square().sum().item()
    errors = (_error(problem, recipe), _error(problem, widened(recipe)))
    saved = (errors[0] - errors[1]) / signal if signal else 0.0
    return Layers((name,), saved, tokens * weight.numel())


def _error(problem: LayerProblem, recipe: Recipe) -> float:
    """In the space that is right for inputs and weights of a normal distribution."""
    spans = (problem.span_rows().square().mean(0).sqrt(), problem.weight.square().mean(0).sqrt())
    rotation = 0 if recipe.rotation == "off" else 64
    space = InputSpace(smoothing_factors(*spans, 0.5, 0.5), rotation, act_bits=recipe.act_bits)
    return quick_score(problem, space, recipe)


def together(layers: Iterable[Layers]) -> Layers:
    """Several as one."""
    names, saved, costs = zip(*layers, strict=True)
    return Layers(sum(names, ()), sum(saved), sum(costs))


def chosen(layers: list[Layers], share: float) -> frozenset[str]:
    """The names of those that get 8 bits, for at most a share of all multiplications."""
    left = share * sum(one.cost for one in layers)
    names: list[str] = []
    for one in sorted(layers, key=lambda one: one.saved / one.cost, reverse=True):
        if one.saved > 0 and one.cost <= left:
            left -= one.cost
            names += one.names
    return frozenset(names)
