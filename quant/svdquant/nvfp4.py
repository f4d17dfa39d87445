"""One linear layer into 4-bit floats beside a low rank: `decompose.py` on the grid of
`kernels/reference/nvfp4.py`.

Steps and letters are the same, but for two things. The format has no rotation. And the 4-bit part
is W' - L rounded, not W' - L shrunk for the noise of its inputs: next to a large value of its group
a small one becomes 0, so that its error is no noise but itself.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.reference.nvfp4 import dequantize_nvfp4, quantize_nvfp4
from ..calibration.hessian import DAMPING
from ..calibration.statistics import InputStats
from ..weights.packing import pack_int4
from ..weights.svdquant_nvfp4 import NVFP4Weight
from .decompose import Branch, quantize_linear
from .gptq import gptq_on, nearest_on
from .grid import Rounded
from .lowrank_metric import Metric, parallel_sum
from .problem import LayerProblem, layer_problem, sqnr
from .published_grids import E4M3_MAX, E2M1Grid
from .recipe import Recipe
from .smooth import smoothings

ROUNDING_NOISE = 0.009  # squared rounding error of a weight over its group's mean square
QUICK_ROWS = 512  # output rows that a smoothing is scored on
TRIED = {"fast": 1, "best": 2}  # smoothings that are fitted whole


@dataclass(frozen=True)
class Fitted:
    """A layer, and what became of its output: `db` on inputs as `inputs` says; `int4_db`: of the
    same layer in int4, where it was asked for.
    """

    weight: NVFP4Weight
    db: float
    inputs: str
    smoothing: str
    int4_db: float | None = None

    def in_words(self) -> str:
        """How it was made, for the report."""
        words = f"4-bit floats, smoothing {self.smoothing}, {self.inputs}"
        return words if self.int4_db is None else f"{words}; int4 {self.int4_db:.1f} dB"


def rounded_inputs(x: Tensor) -> Tensor:
    """x (tokens, K) after its trip through 4-bit floats."""
    return dequantize_nvfp4(*quantize_nvfp4(x, rounded=True), x.dtype)


class _Fit:
    """The alternation under one smoothing."""

    def __init__(
        self, problem: LayerProblem, smooth: Tensor, recipe: Recipe, generator: torch.Generator
    ):
        self.problem, self.smooth, self.recipe, self.generator = problem, smooth, recipe, generator
        self.weight = problem.weight * smooth
        inputs = problem.x / smooth
        self.inputs = rounded_inputs(inputs)
        self.error = self.inputs - inputs
        d = smooth.reshape(problem.covariance.shape[0], 1, -1)
        moments = problem.covariance / d / d.mT
        diagonal = moments.diagonal(dim1=1, dim2=2)
        floor = (DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(1e-12).expand_as(diagonal)
        self.moments = moments + torch.diag_embed(floor)
        self.noise = self.error.square().mean(0) + 1e-4 * floor.flatten()
        self.hessian = self.moments + torch.diag_embed(self.noise.reshape(diagonal.shape))
        self.wanted = problem.target(problem.x)

    def branch(self, matrix: Tensor, metric: Metric) -> Branch:
        """up (N, R) and raw-x down (K, R) in bf16 for a matrix (N, K) on x / smooth."""
        up, down = metric.fit(matrix, self.recipe.rank, self.generator)
        return up.bfloat16(), (down / self.smooth[:, None]).bfloat16()

    def first_branch(self) -> Branch:
        per_group = self.hessian.diagonal(dim1=1, dim2=2).reshape(-1, 16).mean(1)
        noise = self.noise + ROUNDING_NOISE * per_group.repeat_interleave(16)
        return self.branch(self.weight, Metric(parallel_sum(self.moments, noise)))

    def rounded(self, branch: Branch) -> Rounded:
        """What the branch leaves."""
        up, down = branch
        residual = self.weight - up.float() @ (down.float() * self.smooth[:, None]).T
        whole = (residual.abs().amax() / (E4M3_MAX * E2M1Grid.largest)).clamp_min(1e-30)
        grid = E2M1Grid(whole.repeat(len(residual)))
        if self.recipe.gptq and self.problem.measured:
            return gptq_on(grid, residual, self.hessian, twice=False)
        importance = self.hessian.diagonal(dim1=1, dim2=2).flatten()
        return nearest_on(grid, residual, importance)

    def bias(self, branch: Branch, values: Tensor) -> Tensor | None:
        """The layer's bias, plus the mean error."""
        before, mean = self.problem.bias, self.problem.mean
        if before is None or mean is None:
            return before
        up, down = branch
        seen = mean / self.smooth + self.error.mean(0)
        return (
            before
            + self.problem.weight @ mean
            - up.float() @ (down.float().T @ mean)
            - (values @ seen)
        )

    def loss(self, branch: Branch, values: Tensor, bias: Tensor | None) -> float:
        """Squared output error on the rows to choose by."""
        up, down = branch
        y = self.inputs @ values.T + (self.problem.x @ down.float()) @ up.float().T
        before = self.problem.bias
        shift = 0 if bias is None or before is None else bias - before
        return (y + shift - self.wanted).square().sum().item()

    def solve(self) -> tuple[float, NVFP4Weight]:
        """The best of the turns: its loss, and the layer."""
        best, result, branch = math.inf, None, self.first_branch()
        turns = 1 if self.recipe.solver == "svd" else self.recipe.iterations
        for _ in range(turns):
            rounded = self.rounded(branch)
            values = rounded.dense()
            offers = [branch]
            if self.recipe.solver != "svd":
                branch = self.branch(self.weight - values, Metric(self.moments))
                offers.append(branch)
            for offer in offers:
                bias = self.bias(offer, values)
                loss = self.loss(offer, values, bias)
                if result is None or loss < best:
                    best, result = loss, self._packed(offer, rounded, bias)
        assert result is not None  # the first turn gives one
        return best, result

    def _packed(self, branch: Branch, rounded: Rounded, bias: Tensor | None) -> NVFP4Weight:
        up, down = branch
        assert isinstance(rounded.grid, E2M1Grid)
        return NVFP4Weight(
            pack_int4(rounded.codes),
            rounded.scale.T.contiguous().to(torch.float8_e4m3fn),
            rounded.grid.row[None].clone(),
            down.contiguous(),
            up.contiguous(),
            self.smooth.bfloat16(),
            None if bias is None else bias.bfloat16(),
            rounded=True,
        )


def _quick_loss(problem: LayerProblem, smooth: Tensor) -> float:
    """Output error on a part of the output rows, weights rounded to nearest, without a branch."""
    stride = max(1, len(problem.weight) // QUICK_ROWS)
    weight = problem.weight[::stride] * smooth
    whole = (weight.abs().amax() / (E4M3_MAX * E2M1Grid.largest)).clamp_min(1e-30)
    values = dequantize_nvfp4(*quantize_nvfp4(weight / whole, rounded=True), weight.dtype) * whole
    inputs = problem.x / smooth
    error = inputs @ weight.T - rounded_inputs(inputs) @ values.T
    return error.square().sum().item()


def quantize_linear_nvfp4(  # noqa: PLR0913  (a layer's data, and what the plan knows of it)
    weight: Tensor,
    bias: Tensor | None,
    stats: InputStats | None,
    recipe: Recipe,
    *,
    post_gelu: bool = False,
    smooth: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Fitted:
    """A linear into 4-bit floats with a low-rank branch; arguments as in
    `decompose.quantize_linear`. With recipe.compare it is quantized to int4, too.
    """
    generator = generator or torch.Generator().manual_seed(recipe.seed)
    problem = layer_problem(weight, bias, stats, post_gelu, generator)
    if smooth is None:
        candidates = list(smoothings(problem.span_rows(), problem.weight, recipe.smoothing_grid))
        candidates.sort(key=lambda pair: _quick_loss(problem, pair[1]))
    else:
        candidates = [("given", smooth.abs().bfloat16().float().to(problem.weight.device))]
    trials = [
        (*_Fit(problem, factors, recipe, generator).solve(), label)
        for label, factors in candidates[: TRIED[recipe.preset]]
    ]
    _, result, label = min(trials, key=lambda trial: trial[0])
    int4 = None
    if recipe.compare:
        shared = ("rank", "solver", "iterations", "gptq", "smoothing_grid", "seed")
        plain = Recipe.from_preset(recipe.preset, **{key: getattr(recipe, key) for key in shared})
        int4 = quantize_linear(weight, bias, stats, plain, post_gelu=post_gelu)[1].db
    return Fitted(
        result,
        sqnr(problem, result),
        "held-out samples" if problem.sampled else "synthetic inputs",
        label,
        int4,
    )
