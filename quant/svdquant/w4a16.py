"""Few-token layers (modulation) and text encoders: 4-bit weights, inputs in 16 bit."""

import torch
from torch import Tensor

from ..calibration.hessian import DAMPING
from ..calibration.statistics import InputStats
from ..weights.awq_w4a16 import W4A16Weight
from ..weights.packing import dequantize_groups, pack_int4
from .gptq import gptq, round_to_nearest
from .problem import layer_problem, sqnr
from .recipe import Recipe


def quantize_w4a16(
    weight: Tensor, bias: Tensor | None, stats: InputStats | None, recipe: Recipe
) -> tuple[W4A16Weight, float]:
    """4-bit weights for layers that see few tokens (modulation); activations stay in 16 bit.

    weight float (N, K), 64 | K; bias float (N,) | None. Symmetric; by GPTQ on the inputs'
    covariance, with any preset, where they were recorded: inputs of modulation layers are few and
    alike, so that most of the rounding error can be moved to where they never point.
    Returns the layer and its SQNR in dB on recorded, or else synthetic, inputs.
    """
    problem = layer_problem(weight, bias, stats, False, torch.Generator().manual_seed(recipe.seed))
    diagonal = problem.covariance.diagonal(dim1=1, dim2=2)
    hessian = problem.covariance + torch.diag_embed(
        (DAMPING * diagonal.mean()).clamp_min(1e-20).expand_as(diagonal)
    )
    if problem.measured:
        codes, scale = gptq(problem.weight, hessian, recipe.clip_search)
    else:
        codes, scale = round_to_nearest(
            problem.weight, hessian.diagonal(dim1=1, dim2=2).flatten(), recipe.clip_search
        )
    bias = problem.bias
    if bias is not None and problem.mean is not None:
        bias = bias + (problem.weight - dequantize_groups(codes, scale)) @ problem.mean
    result = W4A16Weight(
        pack_int4(codes + 8), scale.bfloat16(), None, None if bias is None else bias.bfloat16()
    )
    return result, sqnr(problem, result)
