"""The search of the space in which a layer is rounded: smoothing factors, rotation, unsigned
activations (`smooth.InputSpace`), by a quick score each.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TypedDict

import torch
from torch import Tensor

from ...kernels.reference import SHIFT
from ..calibration.statistics import InputStats
from ..weights.lowrank import svd_lowrank
from .problem import LayerProblem, layer_problem
from .recipe import Recipe
from .smooth import InputSpace, smoothings, with_signs

QUICK_ROWS = {"fast": 512, "best": 1024}  # output rows that a candidate is scored on


class _Mode(TypedDict, total=False):
    """What a space does besides smoothing: arguments of `InputSpace`."""

    rotation: int
    act_unsigned: bool


def _modes(recipe: Recipe, unsigned: bool, sampled: bool) -> list[_Mode]:
    if recipe.rotation != "off" and not sampled:
        # synthetic inputs have no outliers, so they cannot show what rotation is worth
        return [{"rotation": 64}]
    by_rotation: dict[str, list[_Mode]] = {
        "auto": [{}, {"rotation": 64}],
        "on": [{"rotation": 64}],
        "off": [{}],
    }
    modes = by_rotation[recipe.rotation]
    if unsigned:
        modes.append({"act_unsigned": True})
    return modes


def best_spaces(
    problem: LayerProblem, recipe: Recipe, post_gelu: bool, smooth: Tensor | None
) -> Iterator[InputSpace]:
    """The best space of each mode by a quick score; without GPTQ only the best of all."""
    narrow = recipe.act_bits == 4
    unsigned = narrow and post_gelu and recipe.act_unsigned and problem.bias is not None
    best_of_modes = []
    for mode in _modes(recipe, unsigned, problem.sampled):
        if smooth is not None:
            candidates = [
                InputSpace(
                    smooth.bfloat16().float().to(problem.weight.device),
                    **mode,
                    label="given",
                    act_bits=recipe.act_bits,
                    per_token=recipe.table,
                )
            ]
        else:
            rows = problem.span_rows() + (SHIFT if mode.get("act_unsigned") else 0)
            candidates = [
                InputSpace(
                    factors, **mode, label=label, act_bits=recipe.act_bits, per_token=recipe.table
                )
                for label, factors in smoothings(rows, problem.weight, recipe.smoothing_grid)
            ]
        scored = [(quick_score(problem, space, recipe), space) for space in candidates]
        best_of_modes.append(min(scored, key=lambda pair: pair[0]))
    if recipe.gptq:
        yield from (space for _, space in best_of_modes)
    else:
        yield min(best_of_modes, key=lambda pair: pair[0])[1]


def quick_score(problem: LayerProblem, space: InputSpace, recipe: Recipe) -> float:
    """Output error on a part of the output rows, with a low-rank branch and weights rounded to
    nearest (SVDQuant's objective).
    """
    stride = max(1, problem.weight.shape[0] // QUICK_ROWS[recipe.preset])
    residual = space.weight(problem.weight[::stride])
    if recipe.rank:
        generator = torch.Generator().manual_seed(recipe.seed)
        up, down = svd_lowrank(residual, recipe.rank, generator, power=1)
        residual = residual.addmm_(up, down.T, alpha=-1)
    groups = residual.unflatten(1, (-1, recipe.group if recipe.table else 64))
    scale = (groups.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-30)
    rounded = (groups / scale).round_().mul_(scale).flatten(1)
    inputs = space.inputs(problem.x)
    return (inputs @ residual.T - space.quantized(inputs) @ rounded.T).square().sum().item()


def shared_smoothing(weights: list[Tensor], stats: InputStats | None, recipe: Recipe) -> Tensor:
    """Smoothing factors, float32 (K,), for projections that read the same input: searched on their
    rows together.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    problem = layer_problem(torch.cat([w.float() for w in weights]), None, stats, False, generator)
    space = next(best_spaces(problem, replace(recipe, gptq=False), False, None))
    return (with_signs(space, problem.x, generator) if problem.sampled else space).smooth
