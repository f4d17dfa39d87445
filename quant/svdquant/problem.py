"""One layer's problem: its weight, and what is known of its inputs: recorded or synthetic."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..calibration.hessian import covariance, diagonal_blocks
from ..calibration.statistics import ENOUGH_PICTURES, InputStats

SYNTHETIC_ROWS = 128
FEWEST_ROWS = 4  # to choose by, or to report on
EXACT_DB = 150.0  # reported for errors of (almost) nothing, where the ratio has no meaning


@dataclass
class LayerProblem:
    """A layer and what is known of its inputs. x: rows to choose by; held_out: rows to report on;
    covariance: of raw x, blockwise.
    """

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    held_out: Tensor
    mean: Tensor | None
    covariance: Tensor
    measured: bool  # the covariance is a recorded Hessian, not a guess from its diagonal
    sampled: bool  # x and held_out are recorded rows, not synthetic ones

    def target(self, x: Tensor) -> Tensor:
        """What the 16-bit layer makes of rows (T, K), without its bias."""
        return torch.nn.functional.linear(x, self.weight)

    def span_rows(self) -> Tensor:
        """Rows (T, K) whose spans steer smoothing: recorded ones, or one row of each input's root
        mean square.
        """
        if self.sampled:
            return self.x
        square = self.covariance.diagonal(dim1=1, dim2=2).reshape(1, -1)
        return (square + (0 if self.mean is None else self.mean.square())).clamp_min(0).sqrt()


class Computed(Protocol):
    """A quantized layer at work."""

    def forward(self, x: Tensor) -> Tensor:
        """x (T, K) → (T, N)."""


def sqnr(problem: LayerProblem, result: Computed) -> float:
    """Signal over quantization noise of the layer's output (without its bias) on held-out rows, in
    dB.
    """
    y = problem.target(problem.held_out)
    bias = 0 if problem.bias is None else problem.bias
    noise = (result.forward(problem.held_out) - bias - y).square().sum().item()
    signal = y.square().sum().item()
    if not noise:
        return EXACT_DB
    return min(max(10 * math.log10(signal / noise), -EXACT_DB), EXACT_DB) if signal else -EXACT_DB


def layer_problem(
    weight: Tensor,
    bias: Tensor | None,
    stats: InputStats | None,
    post_gelu: bool,
    generator: torch.Generator,
) -> LayerProblem:
    """Checks a linear and gathers what is known of its inputs; arguments as in `quantize_linear`.
    Raises ValueError for K not a multiple of 64, shapes that do not fit, NaN and infinity.
    """
    weight = weight.float()
    n, k = weight.shape
    if k % 64:
        raise ValueError(f"K={k} is not a multiple of the group size 64")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit a {n} x {k} linear")
    if not weight.isfinite().all():
        raise ValueError(
            f"the {n} x {k} weight holds NaN or infinity; the file is damaged or overflowed when it"
            " was saved"
        )
    bias = None if bias is None else bias.float().to(weight.device)
    if stats is None or stats.count == 0:
        x = torch.randn(SYNTHETIC_ROWS, k, generator=generator).to(weight.device)
        x = torch.nn.functional.gelu(x) if post_gelu else x
        chosen, held_out = _held_out(x)
        return LayerProblem(
            weight=weight,
            bias=bias,
            x=chosen,
            held_out=held_out,
            mean=None,
            covariance=diagonal_blocks(x.square().mean().expand(k)),
            measured=False,
            sampled=False,
        )
    return _on_recorded_inputs(weight, bias, stats, generator)


def _on_recorded_inputs(
    weight: Tensor, bias: Tensor | None, stats: InputStats, generator: torch.Generator
) -> LayerProblem:
    k = weight.shape[1]
    device = weight.device
    if stats.k != k:
        raise ValueError(f"statistics of {stats.k} inputs do not fit a linear with {k}")
    mean = stats.mean.to(device)
    square = stats.mean_square.to(device)
    if not square.isfinite().all():
        raise ValueError(
            "the recorded inputs hold NaN or infinity; the model overflowed while it was recorded"
        )
    sampled = stats.samples is not None and len(stats.samples) >= 16
    if stats.samples is not None and sampled:
        x = stats.samples.to(device).float()
    else:
        spread = (square - mean.square()).clamp_min(0).sqrt()
        x = torch.randn(SYNTHETIC_ROWS, k, generator=generator).to(device) * spread + mean
    chosen, held_out = _held_out(x, stats if sampled else None)
    return LayerProblem(
        weight=weight,
        bias=bias,
        x=chosen,
        held_out=held_out,
        mean=mean,
        covariance=_trusted(covariance(stats, bias is not None, device), square, stats.pictures),
        measured=stats.hessian is not None,
        sampled=sampled,
    )


def _trusted(blocks: Tensor, square: Tensor, pictures: int) -> Tensor:
    """A covariance (K/B, B, B) as far as it can be trusted. square (K,): E[x^2].

    Few pictures show few of the directions in which inputs vary, and rounding errors would be moved
    to those that only they do not have. So it is drawn to what would be known without correlations,
    (1 - a) C + a diag(E[x^2]), with a = 1/P - 1/ENOUGH for P pictures: shrinkage (Ledoit and Wolf,
    2004) with a weight that is 0 from ENOUGH pictures on.
    """
    if not 0 < pictures < ENOUGH_PICTURES:
        return blocks
    share = 1 / pictures - 1 / ENOUGH_PICTURES
    return (1 - share) * blocks + torch.diag_embed(share * square.reshape(blocks.shape[:2]))


def _held_out(x: Tensor, stats: InputStats | None = None) -> tuple[Tensor, Tensor]:
    """Rows to choose by, and rows held out for the report: those of the last quarter of the
    pictures, for rows of one picture are alike; where there are not two pictures, every fourth row.
    """
    held_out = torch.arange(len(x), device=x.device) % 4 == 3
    if stats is not None and stats.pictures > 1:
        first = stats.pictures - max(1, stats.pictures // 4)
        later = (stats.owners >= first).to(x.device)
        if FEWEST_ROWS <= later.sum() <= len(x) - FEWEST_ROWS:
            held_out = later
    return x[~held_out], x[held_out]
