"""Packing by the published index formulas (deepcompressor, backend/nunchaku/utils.py and
backend/tinychat): each number is put where its formula says.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def _placed(values: np.ndarray, places: np.ndarray, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of `shape` whose flat element places[i] is values[i]."""
    out = np.zeros(int(np.prod(shape)), values.dtype)
    assert len(set(places.reshape(-1).tolist())) == places.size, "no two numbers share a place"
    out[places.reshape(-1)] = values.reshape(-1)
    return torch.from_numpy(out).reshape(shape).view(like.dtype)


def _bits(tensor: Tensor) -> np.ndarray:
    """16-bit floats as integers."""
    return tensor.contiguous().view(torch.int16).numpy()


def codes_of(packed: Tensor) -> np.ndarray:
    """int8 (N, K/2) → codes 0..15, (N, K); the low nibble is the even column."""
    raw = packed.contiguous().view(torch.uint8).numpy()
    return np.stack([raw & 15, raw >> 4], -1).reshape(raw.shape[0], -1)


def pack_weight(packed: Tensor) -> Tensor:
    codes = codes_of(packed).astype(np.uint32)
    size, K = codes.shape
    n, k = np.meshgrid(np.arange(size), np.arange(K), indexing="ij")
    word = (
        (
            ((((n // 128) * (K // 64) + k // 64) * 8 + (n % 128) // 16) * 8 + n % 8) * 4
            + (k % 32) // 8
        )
        * 2
        + (n % 16) // 8
    ) * 2 + (k % 64) // 32
    words = np.zeros(size * K // 8, np.uint32)
    np.add.at(words, word.reshape(-1), (codes << (4 * (k % 8)).astype(np.uint32)).reshape(-1))
    return torch.from_numpy(words.view(np.int8)).reshape(size, K // 2)


def pack_scale(scale: Tensor) -> Tensor:
    """(G, N) natural → (G, N) as stored."""
    G, N = scale.shape
    n, g = np.meshgrid(np.arange(N), np.arange(G), indexing="ij")
    m = n % 128
    place = (
        ((n // 128) * G + g) * 128
        + (m // 16) * 16
        + ((m % 8) // 2) * 4
        + ((m % 16) // 8) * 2
        + m % 2
    )
    return _placed(_bits(scale.t()), place, scale, (G, N))


def pack_vector(vector: Tensor) -> Tensor:
    return pack_scale(vector.reshape(1, -1)).reshape(-1)


def pack_down(down: Tensor) -> Tensor:
    """(K, R) natural; the formula speaks of L[r, c]."""
    K, R = down.shape
    r, c = np.meshgrid(np.arange(R), np.arange(K), indexing="ij")
    place = (
        (((((c // 16) * (R // 16) + r // 16) * 8 + r % 8) * 4 + (c % 8) // 2) * 2 + (r % 16) // 8)
        * 4
        + ((c % 16) // 8) * 2
        + c % 2
    )
    return _placed(_bits(down.t()), place, down, (K, R))


def pack_up(up: Tensor) -> Tensor:
    N, R = up.shape
    n, r = np.meshgrid(np.arange(N), np.arange(R), indexing="ij")
    place = (
        (((((n // 16) * (R // 16) + r // 16) * 8 + n % 8) * 4 + (r % 8) // 2) * 2 + (n % 16) // 8)
        * 4
        + ((r % 16) // 8) * 2
        + r % 2
    )
    return _placed(_bits(up), place, up, (N, R))


def pack_awq(packed: Tensor) -> Tensor:
    codes = codes_of(packed).astype(np.uint16)
    N, K = codes.shape
    n, k = np.meshgrid(np.arange(N), np.arange(K), indexing="ij")
    place = ((n // 4) * (K // 64) + k // 64) * 64 + (n % 4) * 16 + ((k % 64) // 32) * 8 + k % 8
    words = np.zeros(N * K // 4, np.uint16)
    np.add.at(
        words, place.reshape(-1), (codes << (4 * ((k % 32) // 8)).astype(np.uint16)).reshape(-1)
    )
    return torch.from_numpy(words.view(np.int32)).reshape(N // 4, K // 2)
