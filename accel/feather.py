"""FEATHER: which visual tokens a vision-language model may forget half-way (Endo et al., ICCV 2025,
arXiv:2412.13180).

A layer's score of an image token is how much the last text token attends to it, *without* rotary
position embedding: with it, as in FastV (Chen et al., ECCV 2024, arXiv:2403.06764), tokens near the
end of the raster win whatever they show. Shallow scores are unsure, so the first stage also keeps a
uniform grid; the second, deeper one trusts the scores alone:

    phi = mean over heads of softmax over image keys of (q_last · k / sqrt(d))
    stage 1 (layer K1):  top (1 - R) n by phi, and every `stride`-th token of the raster in both
      directions
    stage 2 (layer K2):  top (1 - R)^2 of those that are left

Scores are taken from the layer before the stage, on its normalised input. Text is never pruned, and
kept tokens keep their positions.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CRITERIA = ("feather", "fastv", "uniform")


@dataclass(frozen=True)
class Stage:
    """Before `layer` runs, keep a share of the image tokens that are left, and (stride > 0) a
    uniform grid of the picture.
    """

    layer: int
    keep: float
    stride: int = 0

    def __post_init__(self):
        if self.layer < 1:
            raise ValueError(
                f"layer {self.layer}: scores come from the layer before, so the first that can be"
                " pruned before is 1"
            )
        if not 0 < self.keep <= 1:
            raise ValueError(
                f"keep = {self.keep} is not a share between 0 and 1; 1 keeps every token"
            )
        if self.stride < 0:
            raise ValueError(f"stride = {self.stride} is negative; 0 is no grid")


def stages(
    layers: int, keep: float = 0.3, stride: int = 3, first: int = 0, second: int = 0, least: int = 1
) -> tuple[Stage, ...]:
    """The paper's two stages for a model of `layers` layers: `keep` with a grid at a quarter of the
    depth, keep^2 at the half.

    The paper prunes before layers 8 and 16 of 32; 0 is that depth in this model. `least` is the
    first layer that can be pruned before: later than 1 in a model whose first layers get the
    picture piece by piece. Raises ValueError for layers that are not in order or not there.
    """
    first = first or max(least, round(layers / 4))
    second = second or max(first + 1, round(layers / 2))
    if not least <= first < second < layers:
        raise ValueError(
            f"layers {first} and {second} are not two layers in rising order that this model of"
            f" {layers} layers can be pruned before; choose from {least} to {layers - 1}, or 0 for"
            " a quarter and a half of the depth."
        )
    return Stage(first, keep, stride), Stage(second, keep * keep)


def last_token_scores(query: Tensor, keys: Tensor) -> Tensor:
    """phi (n,) float32, summing to 1, of image tokens.

    query (heads, d): the last token's; keys (key heads, n, d): of the image tokens, where heads is
        a multiple of key heads. Without rotary
    embedding for FEATHER, with it for FastV. Raises ValueError where the heads do not fit.
    """
    if query.shape[0] % keys.shape[0] or query.shape[1] != keys.shape[2]:
        raise ValueError(
            f"{query.shape[0]} query heads of {query.shape[1]} do not fit {keys.shape[0]} key heads"
            f" of {keys.shape[2]}"
        )
    grouped = query.float().reshape(keys.shape[0], -1, query.shape[1])
    logits = grouped @ keys.float().mT / math.sqrt(query.shape[1])
    return torch.softmax(logits, -1).flatten(0, 1).mean(0)


def grid(height: int, width: int, stride: int) -> Tensor:
    """Mask (height * width,) of a uniform grid over the raster; stride 0 is empty."""
    mask = torch.zeros(height, width, dtype=torch.bool)
    if stride:
        mask[::stride, ::stride] = True
    return mask.flatten()


def even_mask(count: int, kept: int) -> Tensor:
    """Mask (count,) of `kept` tokens at even distances: the uniform baseline."""
    mask = torch.zeros(count, dtype=torch.bool)
    if kept:
        mask[(torch.arange(kept) * count) // kept] = True
    return mask


def keep_mask(scores: Tensor, left: Tensor, stage: Stage, fixed: Tensor | None = None) -> Tensor:
    """Which of all image tokens (n,) stay after a stage.

    scores (n,), read only where `left` (n,) is True: those that earlier stages kept; fixed (n,):
    tokens that stay anyway (the grid). int(keep * left) tokens are kept by score, at least one; of
    equal scores the one that comes first in the raster.
    """
    count = max(1, int(stage.keep * int(left.sum()) + 1e-9))
    order = torch.argsort(scores.masked_fill(~left, -math.inf), descending=True, stable=True)
    mask = torch.zeros_like(left)
    mask[order[:count]] = True
    return (mask | fixed & left) if fixed is not None else mask


def layer_flops(tokens: int, width: int, hidden: int) -> int:
    """4 n d^2 + 2 n^2 d + 2 n d m of one layer (the paper's and FastV's count): tokens n, width d,
    feed-forward width m.
    """
    return 4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden


def flops(tokens_per_layer: list[int], width: int, hidden: int) -> int:
    """The cost of all layers; tokens_per_layer counts text and what is left of the image."""
    return sum(layer_flops(tokens, width, hidden) for tokens in tokens_per_layer)


def mean_row(mask: Tensor, height: int, width: int) -> float:
    """Mean height of the kept tokens in the picture, 0 top to 1 bottom: about 0.5 where position
    does not matter, 0.8 for FastV in the paper.
    """
    rows = mask.reshape(height, width).nonzero()[:, 0].float()
    return rows.mean().item() / max(1, height - 1) if len(rows) else math.nan
