"""One linear into a format of stock ComfyUI, fitted to what it reads.

With x' the rotated input, x^ what few bits make of it, e = x^ - x', C = E[x' x'^T], S = E[e e^T]
(diagonal), the weight Q is rounded by GPTQ (arXiv:2210.17323) with the Hessian C + S. Where e is
independent of x' (8 bits), what is rounded is the least-squares weight for noisy inputs, W' C (C +
S)^-1; else W' itself. A bias takes up the mean of the error, W' E[x'] - Q E[x^].
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...calibration.hessian import DAMPING
from ...calibration.statistics import InputStats
from ...weights.base import json_tensor
from ..gptq import gptq_on, nearest_on
from ..lowrank_metric import solve_blocks, times_blocks
from ..problem import LayerProblem, layer_problem, sqnr
from .formats import StockFormat
from .recipe import StockRecipe


@dataclass
class _Rounded:
    """The layer as ComfyUI will compute it, in float32."""

    form: StockFormat
    weight: Tensor  # rotated, (N, K)
    bias: Tensor | None
    tensors: dict[str, Tensor]  # in the file, by suffix

    def forward(self, x: Tensor) -> Tensor:
        """x (tokens, K) → (tokens, N)."""
        inputs = self.form.activations(self.form.rotated(x))
        return torch.nn.functional.linear(inputs, self.weight, self.bias)


def quantize_layer(  # noqa: PLR0913  (a layer's data, and what the plan knows of it)
    weight: Tensor,
    bias: Tensor | None,
    stats: InputStats | None,
    form: StockFormat,
    recipe: StockRecipe,
    post_gelu: bool = False,
) -> tuple[dict[str, Tensor], float, str]:
    """A linear in a format: its tensors by suffix (bias float32, JSON among them), the ratio of
    signal to quantization noise on held-out inputs in dB, and how it was made, in words.

    weight float (N, K), 64 | K; bias float (N,) | None; stats: recorded inputs, or None. Raises
    ValueError as `layer_problem` does.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    problem = layer_problem(weight, bias, stats, post_gelu, generator)
    first = _fitted(problem, form, recipe)
    tensors, words = first.tensors, "held-out samples" if problem.sampled else "synthetic inputs"
    if stats is not None and stats.held_count:
        whole = layer_problem(weight, bias, stats.whole(), post_gelu, generator)
        tensors = _fitted(whole, form, recipe).tensors
    tensors["comfy_quant"] = json_tensor(form.facts(weight.shape[1]))
    steered = "GPTQ, " if recipe.gptq and problem.measured else ""
    return tensors, sqnr(problem, first), steered + words


def _fitted(problem: LayerProblem, form: StockFormat, recipe: StockRecipe) -> _Rounded:
    rotated = form.rotated(problem.weight)
    inputs = form.rotated(problem.x)
    error = form.activations(inputs) - inputs
    moments, hessian = _moments(problem, form, error)
    wanted = rotated
    if problem.measured and form.independent_errors:
        wanted = times_blocks(rotated, solve_blocks(hessian, moments).mT)
    grid = form.grid(wanted)
    if recipe.gptq and problem.measured:
        rounded = gptq_on(grid, wanted, hessian)
    else:
        importance = hessian.diagonal(dim1=1, dim2=2).flatten()
        rounded = nearest_on(grid, wanted, importance)
    values = rounded.dense()
    shifted = problem.bias
    if shifted is not None and problem.mean is not None:
        mean = form.rotated(problem.mean)
        seen = mean if form.independent_errors else mean + error.mean(0)
        shifted = shifted + rotated @ mean - values @ seen
    tensors = form.pack(rounded.codes, rounded.scale, grid)
    if shifted is not None:
        tensors["bias"] = shifted
    return _Rounded(form, values, shifted, tensors)


def _moments(problem: LayerProblem, form: StockFormat, error: Tensor) -> tuple[Tensor, Tensor]:
    """C and C + S, (K/B, B, B): blocks of whole rotations."""
    blocks = problem.covariance
    k, size = problem.weight.shape[1], form.rotation(problem.weight.shape[1])
    together = math.lcm(blocks.shape[1], size) // blocks.shape[1]
    blocks = torch.stack([torch.block_diag(*part) for part in blocks.split(together)])
    turned = form.rotated(form.rotated(blocks).mT.contiguous())
    diagonal = turned.diagonal(dim1=1, dim2=2)
    floor = (DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(1e-12).expand_as(diagonal)
    moments = turned + torch.diag_embed(floor)
    noise = error.square().mean(0) if len(error) else torch.zeros(k, device=blocks.device)
    return moments, moments + torch.diag_embed(noise.reshape(diagonal.shape))
