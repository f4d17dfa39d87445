"""One linear layer into SVDQuant's form: W = 4-bit part + low rank, in a space where inputs survive
4 bits.

With x' the smoothed (rotated) input, e the error of its trip through 4 bits, or 8 (act_bits of the
recipe), C = E[x' x'^T] and S = E[e e^T] (diagonal), the error is

    E |y - y_q|^2 = tr (W' - L - Q) C (W' - L - Q)^T + tr Q S Q^T

1. Were Q not rounded, the best Q for a given L is (W' - L) C (C + S)^-1, and what remains is tr (W'
  - L) P (W' - L)^T with P = (C^-1 + S^-1)^-1: the branch starts as the best rank R in the metric P.
  (Where inputs dwarf their error, P = S: SVDQuant's choice.)
2. Q is that best Q, rounded: by GPTQ with the Hessian C + S, or to nearest.
3. For a given Q the best L is the best rank R for W' - Q in the metric C; then again from 2,
  keeping whichever did best on samples.

SVDQuant: Li et al., 2024, arXiv:2411.05007, section 4; GPTQ: arXiv:2210.17323. A bias also takes up
the mean of the error.
"""

import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.reference import SHIFT
from ..calibration.hessian import DAMPING
from ..calibration.statistics import InputStats
from ..weights.packing import pack_int4
from ..weights.svdquant_w4a4 import SVDQuantWeight
from ..weights.svdquant_w4a8 import W4A8Weight
from .gptq import gptq_on, nearest_on
from .grid import EvenGrid, Grid, Rounded, TableGrid
from .learned_smoothing import learned
from .lowrank_metric import Metric, parallel_sum, solve_blocks, times_blocks
from .problem import LayerProblem, layer_problem, sqnr
from .recipe import Recipe
from .smooth import InputSpace, with_signs
from .space_search import best_spaces

log = logging.getLogger("nibble")

# squared rounding error of a weight over its group's mean square: (2.5 rms / 7)^2 / 12
ROUNDING_NOISE = 0.0105
Branch = tuple[Tensor, Tensor]  # up (N, R) and down (K, R) on raw x
Layer = SVDQuantWeight | W4A8Weight


@dataclass(frozen=True)
class LayerError:
    """What quantization did to a layer's output.

    db         10 log10 (|y|^2 / |y - y_q|^2) on `inputs`, y without bias; limited to +-150
    inputs     "held-out samples" | "synthetic inputs"
    smoothing  the chosen smoothing factors, in words
    gptq       whether recorded inputs steered the rounding
    chosen     what was chosen on held-out pictures, for a last fit to all of them
    """

    db: float
    inputs: str
    smoothing: str
    rotation: int
    act_unsigned: bool
    gptq: bool
    chosen: "Choice"


class Choice(NamedTuple):
    """A space, and after how many turns the decomposition was at its best."""

    space: InputSpace
    turns: int


def quantize_linear(  # noqa: PLR0913  (a layer's data, and what the plan knows of it)
    weight: Tensor,
    bias: Tensor | None,
    stats: InputStats | None,
    recipe: Recipe,
    *,
    post_gelu: bool = False,
    smooth: Tensor | None = None,
    generator: torch.Generator | None = None,
    chosen: Choice | None = None,
) -> tuple[Layer, LayerError]:
    """A linear into 4-bit weights and activations of recipe.act_bits with a low-rank branch, in the
    recipe's format, on the weight's device.

    Shapes:
        weight float (N, K), 64 | K · bias float (N,) | None · smooth float (K,): factors to use
        instead of searching
    stats: recorded inputs; without them synthetic ones stand in. post_gelu: the input comes from a
    GELU, so that unsigned activations are tried (they need a bias to fold into). generator: a CPU
    one; by default seeded with recipe.seed. chosen: by an earlier call, in place of all searches.
    Raises ValueError for K not a multiple of 64, shapes that do not fit, and weights or statistics
    with NaN or infinity.
    """
    generator = generator or torch.Generator().manual_seed(recipe.seed)
    problem = layer_problem(weight, bias, stats, post_gelu, generator)
    if chosen is not None:
        best = _solve(_Fit(problem, chosen.space, recipe, generator), chosen.turns)
    else:
        best = _searched(problem, recipe, post_gelu, smooth, generator)
    result, space = best.fit.pack(*best.parts), best.fit.space
    return result, LayerError(
        db=sqnr(problem, result),
        inputs="held-out samples" if problem.sampled else "synthetic inputs",
        smoothing=space.label,
        rotation=space.rotation,
        act_unsigned=space.act_unsigned,
        gptq=recipe.gptq and problem.measured,
        chosen=Choice(space, best.turn),
    )


def _searched(
    problem: LayerProblem,
    recipe: Recipe,
    post_gelu: bool,
    smooth: Tensor | None,
    generator: torch.Generator,
) -> "_Best":
    """The best decomposition in any space."""
    trials = []
    for space in best_spaces(problem, recipe, post_gelu, smooth):
        if smooth is None and problem.sampled:
            space = with_signs(space, problem.x, generator)
        fit = _Fit(problem, space, recipe, generator)
        trials.append(_solve(fit, recipe.iterations))
        if smooth is None and problem.sampled and recipe.smoothing_steps:
            space = learned(space, fit.unserved(), problem.x, recipe.smoothing_steps)
            trials.append(_solve(_Fit(problem, space, recipe, generator), recipe.iterations))
    tried = [(trial.fit.space.label, trial.loss) for trial in trials]
    log.debug("%s: %s", tuple(problem.weight.shape), tried)
    return min(trials, key=lambda trial: trial.loss)


# ---- the decomposition in a given space ----------------------------------------------------------


class _Fit:
    """The alternation in one space; holds what stays the same: W', moments, noise, the wanted
    outputs.
    """

    def __init__(
        self, problem: LayerProblem, space: InputSpace, recipe: Recipe, generator: torch.Generator
    ):
        self.problem, self.space, self.recipe, self.generator = problem, space, recipe, generator
        self.weight = space.weight(problem.weight)
        self.inputs = space.inputs(problem.x)
        self.quantized_inputs = space.quantized(self.inputs)
        moments = space.moments(problem.covariance)
        diagonal = moments.diagonal(dim1=1, dim2=2)
        floor = (DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(1e-12).expand_as(diagonal)
        self.moments = moments + torch.diag_embed(floor)
        self.noise = (self.quantized_inputs - self.inputs).square().mean(0) + 1e-4 * floor.flatten()
        self.hessian = self.moments + torch.diag_embed(self.noise.reshape(diagonal.shape))
        self.grid: Grid = EvenGrid(recipe.clip_search)
        if recipe.table:
            self.grid = TableGrid.fitted(self.weight, recipe.group)
        self.judges = space.quantized(space.inputs(problem.judges))
        self.wanted = problem.target(problem.judges)

    def first_branch(self) -> Branch:
        per_group = (
            self.hessian.diagonal(dim1=1, dim2=2).reshape(-1, 64).mean(1).repeat_interleave(64)
        )
        noise = self.noise + ROUNDING_NOISE * per_group
        return self.branch(self.weight, Metric(parallel_sum(self.moments, noise)))

    def unserved(self) -> Tensor:
        """What the first branch leaves of the weight, on raw x."""
        up, down = self.first_branch()
        return self.problem.weight - up.float() @ down.float().T

    def branch(self, matrix: Tensor, metric: Metric, last: Branch | None = None) -> Branch:
        """The best low rank for a matrix (N, K) of this space, rounded to bf16; last: that of one
        close to it.
        """
        if not self.recipe.rank:
            n, k = matrix.shape
            return matrix.new_zeros(n, 0).bfloat16(), matrix.new_zeros(k, 0).bfloat16()
        start = None if last is None else last[0].float()
        up, down = metric.fit(matrix, self.recipe.rank, self.generator, start)
        return up.bfloat16(), self.space.raw_weight(down.T).T.bfloat16()

    def residual(self, branch: Branch) -> Tensor:
        """W' less the rounded branch, so that the 4-bit part makes up for that rounding too."""
        up, down = branch
        return torch.addmm(self.weight, up.float(), self.space.weight(down.float().T), alpha=-1)

    def rounded(self, residual: Tensor, last: Rounded | None = None) -> Rounded:
        """Step 2; last: what it gave a turn before."""
        best = residual
        if self.problem.measured:
            # (W' - L) C (C + S)^-1
            best = times_blocks(residual, solve_blocks(self.hessian, self.moments).mT)
        grid = self.grid.for_rows_of(best) if isinstance(self.grid, TableGrid) else self.grid
        if self.problem.measured and self.recipe.gptq:
            return gptq_on(grid, best, self.hessian, twice=self.space.act_bits == 8)
        importance = self.hessian.diagonal(dim1=1, dim2=2).flatten()
        return nearest_on(grid, best, importance, None if last is None else last.scale)

    def bias(self, branch: Branch, dense: Tensor) -> Tensor | None:
        """The layer's bias, plus the mean error, less the shift of unsigned activations times the
        4-bit part.
        """
        if self.problem.bias is None:
            return None
        mean = self.problem.mean
        shift = SHIFT / self.space.smooth if self.space.act_unsigned else None
        if mean is None and shift is None:
            return self.problem.bias
        seen = self.space.inputs(torch.zeros_like(self.space.smooth) if mean is None else mean)
        # the branch and the 16-bit weight do not see the shift
        wanted = seen if shift is None else seen - shift
        up, down = branch
        error = (
            self.weight @ wanted
            - up.float() @ (self.space.weight(down.float().T) @ wanted)
            - dense @ seen
        )
        return self.problem.bias + error

    def loss(self, branch: Branch, outputs: Tensor, bias: Tensor | None) -> float:
        """Squared output error on the rows to choose by; outputs: of the 4-bit part on them."""
        up, down = branch
        y = outputs + (self.problem.judges @ down.float()) @ up.float().T
        before = self.problem.bias
        shift = 0 if bias is None or before is None else bias - before
        return (y + shift - self.wanted).square().sum().item()

    def pack(self, branch: Branch, rounded: Rounded, bias: Tensor | None) -> Layer:
        up, down = (factor.contiguous() for factor in branch)
        bias = None if bias is None else bias.bfloat16()
        smooth, grid = self.space.smooth.bfloat16(), rounded.grid
        if isinstance(grid, TableGrid):
            return W4A8Weight(
                qweight=pack_int4(rounded.codes),
                scale=rounded.scale.to(torch.int8),
                channel_scale=grid.channel_scale,
                table=grid.table.to(torch.int8),
                smooth_factor=smooth,
                proj_down=down if self.recipe.rank else None,
                proj_up=up if self.recipe.rank else None,
                bias=bias,
                rotation=self.space.rotation,
            )
        return SVDQuantWeight(
            pack_int4(rounded.codes),
            rounded.scale.bfloat16(),
            down,
            up,
            smooth,
            bias,
            self.space.act_unsigned,
            self.space.rotation,
            act_bits=self.space.act_bits,
        )


@dataclass
class _Best:
    """The decomposition with the least loss so far."""

    fit: _Fit
    loss: float = math.inf
    parts: tuple = ()
    turn: int = 1  # that gave it
    turns: int = 1  # so far

    def offer(self, branch: Branch, rounded: Rounded, dense: Tensor, outputs: Tensor) -> bool:
        """Takes a decomposition in if it is better; says whether it was. dense: of `rounded`;
        outputs: of `dense` on the rows to choose by.
        """
        bias = self.fit.bias(branch, dense)
        loss = self.fit.loss(branch, outputs, bias)
        better = not self.parts or loss < self.loss
        if better:
            self.loss, self.parts, self.turn = loss, (branch, rounded, bias), self.turns
        return better


def _solve(fit: _Fit, iterations: int) -> _Best:
    """Steps 1 to 3, in so many turns."""
    branch, best, stale = fit.first_branch(), _Best(fit), 0
    rounded: Rounded | None = None
    if fit.recipe.solver == "svd" or not fit.recipe.rank:
        rounded = fit.rounded(fit.residual(branch))
        dense = rounded.dense()
        best.offer(branch, rounded, dense, fit.judges @ dense.T)
        return best
    metric = Metric(fit.moments)
    for best.turns in range(1, iterations + 1):
        rounded = fit.rounded(fit.residual(branch), rounded)
        dense = rounded.dense()
        outputs = fit.judges @ dense.T
        improved = best.offer(branch, rounded, dense, outputs)
        branch = fit.branch(fit.weight - dense, metric, branch)
        improved |= best.offer(branch, rounded, dense, outputs)
        stale = 0 if improved else stale + 1
        if stale == 2:
            break
    return best
