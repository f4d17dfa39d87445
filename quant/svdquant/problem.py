"""One layer's problem: its weight, and what is known of its inputs: recorded or synthetic."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..calibration.hessian import covariance, diagonal_blocks
from ..calibration.statistics import InputStats
from ..files.integrity import is_finite
from ..files.report import SYNTHETIC
from ..job.measurement import measured_on

SYNTHETIC_ROWS = 128
FEWEST_ROWS = 4  # to choose by, or to report on
# tokens that count as one: measured on the demo model (velocity's signal to noise over the preset
# fast's noise: none 27.4, 1 33.0, 2 33.2, 4 33.3 dB)
DEPENDENCE = 2
EXACT_DB = 150.0  # reported for errors of (almost) nothing, where the ratio has no meaning


@dataclass
class LayerProblem:
    """A layer and what is known of its inputs. x: rows to fit; judges: rows to choose by; held_out:
    rows to report on; covariance: of raw x, blockwise.
    """

    weight: Tensor
    bias: Tensor | None
    x: Tensor
    judges: Tensor
    held_out: Tensor
    mean: Tensor | None
    covariance: Tensor
    measured: bool  # the covariance is a recorded Hessian, not a guess from its diagonal
    sampled: bool  # x, judges and held_out are recorded rows, not synthetic ones
    on: str  # what held_out is of, as reports have it

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


def sqnr(problem: LayerProblem, result: Computed, rows: Tensor | None = None) -> float:
    """Signal over quantization noise of the layer's output (without its bias) in dB, on rows (T, K)
    or else the held-out ones.
    """
    rows = problem.held_out if rows is None else rows
    y = problem.target(rows)
    bias = 0 if problem.bias is None else problem.bias
    noise = (result.forward(rows) - bias - y).square().sum().item()
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
    if not is_finite(weight):
        raise ValueError(
            f"the {n} x {k} weight holds NaN or infinity; the file is damaged or overflowed when it"
            " was saved"
        )
    bias = None if bias is None else bias.float().to(weight.device)
    if stats is None or stats.count == 0:
        x = torch.randn(SYNTHETIC_ROWS, k, generator=generator).to(weight.device)
        x = torch.nn.functional.gelu(x) if post_gelu else x
        fitted, judges, held_out = _rows_of(None, x)
        return LayerProblem(
            weight=weight,
            bias=bias,
            x=fitted,
            judges=judges,
            held_out=held_out,
            mean=None,
            covariance=diagonal_blocks(x.square().mean().expand(k)),
            measured=False,
            sampled=False,
            on=SYNTHETIC,
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
    on = measured_on(stats)
    sampled = on != SYNTHETIC
    if stats.samples is not None and sampled:
        x = stats.samples.to(device).float()
    else:
        spread = (square - mean.square()).clamp_min(0).sqrt()
        x = torch.randn(SYNTHETIC_ROWS, k, generator=generator).to(device) * spread + mean
    fitted, judges, held_out = _rows_of(stats if sampled else None, x)
    return LayerProblem(
        weight=weight,
        bias=bias,
        x=fitted,
        judges=judges,
        held_out=held_out,
        mean=mean,
        covariance=_trusted(covariance(stats, bias is not None, device), square, stats),
        measured=stats.hessian is not None,
        sampled=sampled,
        on=on,
    )


def _trusted(blocks: Tensor, square: Tensor, stats: InputStats) -> Tensor:
    """A covariance (K/B, B, B) as far as it can be trusted. square (K,): E[x^2].

    Rounding errors are moved to directions in which inputs do not vary, and few tokens show few of
    those in which they do. So it is drawn to what would be known without correlations,
    (1 - a) C + a diag(E[x^2]), as Ledoit and Wolf (2004, "A well-conditioned estimator for
    large-dimensional covariance matrices") draw it to a multiple of the identity. Their a is the
    error of C over its distance from that target; for n independent tokens of B inputs it goes as
    B / (B + n), and tokens are not independent: DEPENDENCE of them count as one.
    """
    share = shrinkage(stats.count, blocks.shape[-1])
    return (1 - share) * blocks + torch.diag_embed(share * square.reshape(blocks.shape[:2]))


def shrinkage(tokens: int, inputs: int) -> float:
    """How far a covariance of so many inputs is drawn to its diagonal after so many tokens."""
    return DEPENDENCE * inputs / (DEPENDENCE * inputs + tokens)


def _rows_of(stats: InputStats | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to fit, to choose by and to report on. Where the rows' pictures are told, the latter two
    are of pictures that nothing was fitted to, and of different ones where there are two; else
    every fourth row is for the report. Of synthetic rows a third of the others is enough to choose
    by.
    """
    fourth = torch.arange(len(x), device=x.device) % 4 == 3
    if stats is None:
        return x[~fourth], x[~fourth][::3], x[fourth]
    held = stats.held_out.to(x.device)
    if not FEWEST_ROWS <= held.sum() <= len(x) - FEWEST_ROWS:
        return x[~fourth], x[~fourth], x[fourth]
    later = held & (stats.owners * 2 >= stats.pictures).to(x.device)
    earlier = held & ~later
    if min(later.sum(), earlier.sum()) < FEWEST_ROWS:
        return x[~held], x[held], x[held]
    return x[~held], x[earlier], x[later]
