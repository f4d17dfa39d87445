"""Which image tokens a stage keeps: scores from a layer of the encoder (`accel/feather.py` has the
formula), and the mask that follows from them.
"""

from __future__ import annotations

import torch

from ....accel import feather
from ....accel.feather import Stage
from .record import Picture, Prompt
from .shortened import positions_at, positions_of, window_of


def token_scores(
    prompt: Prompt, criterion: str, layer: torch.nn.Module, x: torch.Tensor, freqs: tuple | list
) -> torch.Tensor:
    """phi (length,) on the CPU, of the image tokens that are left; FastV's is its attention among
    all tokens, rotated, and within the layer's window.

    x (1, length, d): what the layer is given; freqs: its rotary embedding
    """
    attention = layer.self_attn
    scores = torch.zeros(prompt.length)
    if criterion == "uniform":
        return scores
    scored = prompt.mask()
    if criterion == "feather":
        scored = scored & _images(prompt)
    elif window := window_of(layer):
        scored[: max(0, prompt.last - window + 1)] = False
    rows = scored.nonzero().flatten()
    last = torch.tensor([prompt.last])
    hidden = layer.input_layernorm(x[0, torch.cat([rows, last]).to(x.device)])
    query = _heads(attention.q_proj(hidden[-1:]), attention.num_heads, attention.q_norm)
    keys = _heads(attention.k_proj(hidden[:-1]), attention.num_kv_heads, attention.k_norm)
    if criterion == "fastv":
        freqs = positions_of(layer, freqs)
        query = _rotate(query, positions_at(freqs, last.to(x.device)))
        keys = _rotate(keys, positions_at(freqs, rows.to(x.device)))
        scores[rows] = feather.last_token_scores(query[:, 0], keys).cpu()
        return scores
    # each image by itself: none loses its tokens to another
    for picture in prompt.pictures:
        own = (rows >= picture.start) & (rows < picture.start + picture.count)
        phi = feather.last_token_scores(query[:, 0], keys[:, own.to(keys.device)])
        scores[rows[own]] = phi.cpu()
    return scores


def _images(prompt: Prompt) -> torch.Tensor:
    """Mask (length,) of all image tokens."""
    mask = torch.zeros(prompt.length, dtype=torch.bool)
    for picture in prompt.pictures:
        mask[picture.start : picture.start + picture.count] = True
    return mask


def kept_tokens(
    picture: Picture, scores: torch.Tensor, stage: Stage, criterion: str
) -> torch.Tensor:
    """Mask (count,) of the tokens of an image that stay from a stage on."""
    left = picture.kept()
    if criterion == "feather":
        grid = feather.grid(picture.height, picture.width, stage.stride)
        return feather.keep_mask(scores, left, stage, grid)
    if criterion == "fastv":
        return feather.keep_mask(scores, left, stage)
    count, mask = int(left.sum()), torch.zeros_like(left)
    chosen = feather.even_mask(count, max(1, int(stage.keep * count + 1e-9)))
    mask[left.nonzero().flatten()[chosen]] = True
    return mask


def _heads(x: torch.Tensor, heads: int, norm: torch.nn.Module | None) -> torch.Tensor:
    """(n, heads * d) as (heads, n, d), normalised where the model does so."""
    x = x.reshape(len(x), heads, -1).transpose(0, 1)
    return x if norm is None else norm(x)


def _rotate(x: torch.Tensor, freqs: tuple) -> torch.Tensor:
    """Rotary embedding of x (heads, n, d) by halves, as the language model does it."""
    cos, sin, negative = (part.reshape(-1, part.shape[-2], part.shape[-1])[-1] for part in freqs)
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([second * negative, first * sin], -1)
