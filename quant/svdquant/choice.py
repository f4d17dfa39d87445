"""A layer that was fitted to recorded inputs, or the one that needs no data: whichever errs less on
pictures that nothing was fitted to.

Few or unlike pictures can mislead whatever is fitted to them; then the layer is made from its
weights alone, as the preset fast makes it without inputs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..calibration.statistics import InputStats
from ..weights.base import StoredWeight
from .problem import layer_problem, sqnr
from .recipe import PRESETS, Recipe


def without_data(recipe: Recipe) -> Recipe:
    """The recipe of a layer that is made from its weights alone."""
    changes: dict[str, Any] = PRESETS["fast"]
    return replace(recipe, **changes, compare=False)


def closer(
    weight: Tensor,
    bias: Tensor | None,
    stats: InputStats | None,
    calibrated: StoredWeight,
    data_free: Callable[[], StoredWeight],
) -> tuple[StoredWeight, float] | None:
    """The data-free layer and its error in dB on held-out pictures, if it is closer to the 16-bit
    layer on the pictures to choose by; None where it is not, or no pictures were held out.
    """
    if stats is None or stats.pictures < 2 or stats.count == 0:
        return None
    problem = layer_problem(weight, bias, stats, False, torch.Generator())
    if not problem.sampled:
        return None
    other = data_free()
    if sqnr(problem, other, problem.judges) <= sqnr(problem, calibrated, problem.judges):
        return None
    return other, sqnr(problem, other)
