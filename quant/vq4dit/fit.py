"""One linear layer to codewords, in closed form: rotate, scale the rows, fit a codebook, choose the
codes.

    plain      k-means and the nearest codeword (VQ4DiT's start): one codebook, neither scales nor
      rotation
    fast       64-point rotation, a scale a row, k-means weighted by the diagonal of H, the nearest
      codeword in that metric
    feedback   codes by `gptq.assign`, then in turns the best codebook and scales for these
      codes and the codes again

H = E[x x^T] of recorded inputs, less the mean where a bias takes it up; without recorded inputs H
is the identity.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.reference import hadamard64
from ..calibration.hessian import DAMPING, covariance, diagonal_blocks
from ..calibration.statistics import InputStats
from ..weights.packing import pack_indices
from ..weights.vq import VQWeight
from . import codebook as codebooks
from . import gptq as feedback

EXACT_DB = 150.0
SYNTHETIC_ROWS = 128


@dataclass(frozen=True)
class LayerOptions:
    """Choices for one layer: codewords C, sub-vector length D, whether rows have a scale, rotation
    0 | 64, turns of feedback (0: none).
    """

    codewords: int
    vector: int
    scaled: bool = True
    rotation: int = 64
    turns: int = 2
    iterations: int = codebooks.ITERATIONS


@dataclass
class Fitted:
    """A layer in float32 while it is worked on. codes int64 (N, K/D), codebook (C, D), scale (N,) |
    None, bias (N,) | None.
    """

    codes: Tensor
    codebook: Tensor
    scale: Tensor | None
    bias: Tensor | None
    rotation: int

    def matrix(self) -> Tensor:
        """The matrix in the rotated basis, float32 (N, K)."""
        chosen = self.codebook.index_select(0, self.codes.flatten()).reshape(len(self.codes), -1)
        return chosen if self.scale is None else chosen * self.scale[:, None]

    def pack(self, bias_dtype: torch.dtype = torch.bfloat16) -> VQWeight:
        """As stored: codebook and scale in fp16, indices without gaps."""
        bits = len(self.codebook).bit_length() - 1
        return VQWeight(
            pack_indices(self.codes, bits),
            self.codebook.half(),
            None if self.scale is None else self.scale.half(),
            bias=None if self.bias is None else self.bias.to(bias_dtype),
            rotation=self.rotation,
        )

    @classmethod
    def unpack(cls, weight: VQWeight) -> "Fitted":
        """The inverse of `pack`."""
        return cls(
            weight.codes().long(),
            weight.codebook.float(),
            None if weight.scale is None else weight.scale.float(),
            weight.effective_bias(),
            weight.rotation,
        )


def check(weight: Tensor, bias: Tensor | None, stats: InputStats | None) -> None:
    """Raises ValueError for NaN, infinity and shapes that do not fit."""
    n, k = weight.shape
    if not weight.isfinite().all():
        raise ValueError(
            f"the {n} x {k} weight holds NaN or infinity; the file is damaged or overflowed when it"
            " was saved"
        )
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"a bias of shape {tuple(bias.shape)} does not fit a {n} x {k} linear")
    if stats is not None and stats.k != k:
        raise ValueError(f"statistics of {stats.k} inputs do not fit a linear with {k}")
    if stats is not None and not stats.mean_square.isfinite().all():
        raise ValueError(
            "the recorded inputs hold NaN or infinity; the model overflowed while it was recorded"
        )


def moments(
    stats: InputStats | None, k: int, centred: bool, rotation: int, device: torch.device
) -> Tensor | None:
    """H (K/B, B, B) of (rotated) inputs, damped and of mean diagonal 1; None without recorded
    inputs.
    """
    if stats is None or stats.count == 0:
        return None
    blocks = covariance(stats, centred, device)
    if rotation:
        blocks = hadamard64(hadamard64(blocks).mT.contiguous())
    diagonal = blocks.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean().clamp_min(1e-20)
    return (
        blocks
        + torch.diag_embed(
            (DAMPING * diagonal.mean(1, keepdim=True)).clamp_min(1e-4 * mean).expand_as(diagonal)
        )
    ) / mean


def fit(
    weight: Tensor,
    bias: Tensor | None,
    stats: InputStats | None,
    options: LayerOptions,
    generator: torch.Generator,
) -> Fitted:
    """A linear as codewords. weight float (N, K), bias (N,) | None, on one device; generator: a CPU
    one.

    Raises ValueError where D does not divide K, for NaN and for statistics that do not fit.
    """
    check(weight, bias, stats)
    weight = hadamard64(weight.float()) if options.rotation else weight.float()
    hessian = moments(stats, weight.shape[1], bias is not None, options.rotation, weight.device)
    scale = row_scales(weight) if options.scaled else None
    unit = weight if scale is None else weight / scale.clamp_min(1e-30)[:, None]
    weights = _weights(scale, hessian, options)
    vectors = codebooks.sub_vectors(unit, options.vector)
    words = codebooks.kmeans(vectors, options.codewords, generator, weights, options.iterations)
    codes = codebooks.nearest(vectors, words, 1, weights)[0].reshape(len(weight), -1)
    fitted = Fitted(codes, words, scale, None if bias is None else bias.float(), options.rotation)
    if hessian is not None and options.turns:
        fitted = _in_turns(fitted, weight, hessian, options)
    elif scale is not None:
        fitted.scale = feedback.best_scale(
            weight, replace(fitted, scale=None).matrix(), _metric(hessian, weight)
        )
    return _with_mean(_rounded(fitted), weight, stats)


def row_scales(weight: Tensor) -> Tensor:
    """Root mean square of each row over that of the median row: near 1, so that fp16 holds it. A
    row of zeros gets 0.
    """
    rms = weight.square().mean(1).sqrt()
    return rms / rms[rms > 0].median() if (rms > 0).any() else rms


def _metric(hessian: Tensor | None, weight: Tensor) -> Tensor:
    return (
        diagonal_blocks(torch.ones(weight.shape[1], device=weight.device))
        if hessian is None
        else hessian
    )


def _weights(scale: Tensor | None, hessian: Tensor | None, options: LayerOptions) -> Tensor | None:
    """How much each weight's squared error counts, (N K/D, D): its row's scale squared times its
    input's energy.
    """
    if hessian is None:
        return None
    energy = hessian.diagonal(dim1=1, dim2=2).reshape(1, -1)
    return (
        (energy if scale is None else scale.square()[:, None] * energy)
        .expand(len(scale) if scale is not None else 1, -1)
        .reshape(-1, options.vector)
    )


def _in_turns(fitted: Fitted, weight: Tensor, hessian: Tensor, options: LayerOptions) -> Fitted:
    """Codes with feedback, then codebook and scales for them; the turn with the least output error
    counts.
    """
    best, least, words = fitted, math.inf, fitted.codebook
    scale = torch.ones(len(weight), device=weight.device) if fitted.scale is None else fitted.scale
    for _ in range(options.turns):
        unit = weight / scale.clamp_min(1e-30)[:, None] if fitted.scale is not None else weight
        codes = feedback.assign(unit, hessian, words)
        words = feedback.best_codebook(weight, codes, words, scale, hessian)
        chosen = words.index_select(0, codes.flatten()).reshape(weight.shape)
        if fitted.scale is not None:
            scale = feedback.best_scale(weight, chosen, hessian)
        error = feedback.output_error(weight - chosen * scale[:, None], hessian)
        if error < least:
            best = replace(
                fitted, codes=codes, codebook=words, scale=None if fitted.scale is None else scale
            )
            least = error
    return best


def _with_mean(fitted: Fitted, weight: Tensor, stats: InputStats | None) -> Fitted:
    """The bias takes up the mean of the error."""
    if fitted.bias is None or stats is None or stats.count == 0:
        return fitted
    mean = stats.mean.to(weight.device)
    mean = hadamard64(mean) if fitted.rotation else mean
    return replace(fitted, bias=fitted.bias + (weight - fitted.matrix()) @ mean)


def _rounded(fitted: Fitted) -> Fitted:
    """Codebook and scale as fp16 holds them. Raises ValueError where they are too large for it."""
    words = fitted.codebook.half().float()
    scale = None if fitted.scale is None else fitted.scale.half().float()
    if not words.isfinite().all() or (scale is not None and not scale.isfinite().all()):
        raise ValueError(
            "the weights are too large for a codebook in fp16 (over 65504); the file is damaged"
        )
    return replace(fitted, codebook=words, scale=scale)


def sample_rows(stats: InputStats | None, k: int, generator: torch.Generator) -> Tensor:
    """Rows (T, K) to report errors on: recorded ones, of held-out pictures where there are such;
    else noise with the recorded spread, else plain noise.
    """
    if stats is not None and stats.samples is not None and len(stats.samples) >= 16:
        held = stats.held_out.to(stats.samples.device)
        return (stats.samples[held] if held.any() else stats.samples).float()
    noise = torch.randn(SYNTHETIC_ROWS, k, generator=generator)
    if stats is None or stats.count == 0:
        return noise
    return (
        noise * (stats.mean_square - stats.mean.square()).clamp_min(0).sqrt().cpu()
        + stats.mean.cpu()
    )


def sqnr(weight: Tensor, bias: Tensor | None, result: VQWeight, rows: Tensor) -> float:
    """10 log10(|y|^2 / |y - y_q|^2) of the outputs of rows (T, K), y without bias; limited to
    +-150.
    """
    y = torch.nn.functional.linear(rows, weight.float())
    noise = (result.forward(rows) - (0 if bias is None else bias.float()) - y).square().sum().item()
    signal = y.square().sum().item()
    if not noise:
        return EXACT_DB
    return min(max(10 * math.log10(signal / noise), -EXACT_DB), EXACT_DB) if signal else -EXACT_DB
