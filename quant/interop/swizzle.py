"""The orders in which published files keep a linear's numbers, as permutations to and from natural
row-major order.

Nunchaku stores every tensor in the order in which its tensor-core kernels load it (deepcompressor,
backend/nunchaku/utils.py); comfy-kitchen knows a second, tiled order beside the natural one
("kitchen_tile_packed_w4a4"). All functions are exact: they move bytes, and each stands beside its
inverse. N outputs, K inputs, G = K/64 groups, R rank; N and K are multiples of 128, R of 16, as
both kernels demand.
"""

import torch
from torch import Tensor

KITCHEN_LAYOUT = "kitchen_tile_packed_w4a4"
_AWQ_GROUP_STEP = 16  # AWQ scales are padded to a multiple of this many groups


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _permuted(tensor: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    return tensor.contiguous().reshape(shape).permute(order).contiguous()


def _restored(tensor: Tensor, shape: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """The inverse of `_permuted` with the same shape and order."""
    return (
        tensor.contiguous().reshape([shape[i] for i in order]).permute(_inverse(order)).contiguous()
    )


# ---- Nunchaku ------------------------------------------------------------------------------------

_WEIGHT, _SCALE, _LOW_RANK = (0, 2, 5, 3, 1, 6, 4), (0, 2, 4, 3, 5, 1), (1, 4, 2, 0, 5, 3, 6)
_UP, _MICRO = (0, 4, 2, 1, 5, 3, 6), (0, 4, 3, 2, 1, 5)


def _weight_shape(n: int, k: int) -> tuple[int, ...]:
    return n // 128, k // 64, 8, 8, 4, 2, 2


def weight_from_nunchaku(qweight: Tensor) -> Tensor:
    """int8 (N, K/2), tiled → int8 (N, K/2), low nibble = even column. A word of 32 bits holds eight
    neighbours of K in both orders.
    """
    n, half = qweight.shape
    words = _permuted(qweight.contiguous().view(torch.int32), _weight_shape(n, 2 * half), _WEIGHT)
    return words.reshape(n, half // 4).view(torch.int8)


def weight_to_nunchaku(codes: Tensor) -> Tensor:
    """The inverse of `weight_from_nunchaku`."""
    n, half = codes.shape
    words = _restored(codes.contiguous().view(torch.int32), _weight_shape(n, 2 * half), _WEIGHT)
    return words.reshape(n, half // 4).view(torch.int8)


def scale_from_nunchaku(wscales: Tensor) -> Tensor:
    """(G, N), tiled → (G, N)."""
    g, n = wscales.shape
    return _permuted(wscales, (n // 128, g, 8, 4, 2, 2), _SCALE).reshape(n, g).t().contiguous()


def scale_to_nunchaku(scale: Tensor) -> Tensor:
    """The inverse of `scale_from_nunchaku`."""
    g, n = scale.shape
    return _restored(scale.t(), (n // 128, g, 8, 4, 2, 2), _SCALE).reshape(g, n)


def micro_from_nunchaku(wscales: Tensor) -> Tensor:
    """NVFP4's scales of 8 bits, (K/16, N), tiled → (N, K/16)."""
    g, n = wscales.shape
    raw = _permuted(wscales.contiguous().view(torch.uint8), (n // 128, g // 4, 8, 4, 4, 4), _MICRO)
    return raw.reshape(n, g).view(wscales.dtype)


def micro_to_nunchaku(scale: Tensor) -> Tensor:
    """The inverse of `micro_from_nunchaku`."""
    n, g = scale.shape
    raw = _restored(scale.contiguous().view(torch.uint8), (n // 128, g // 4, 8, 4, 4, 4), _MICRO)
    return raw.reshape(g, n).view(scale.dtype)


def vector_from_nunchaku(vector: Tensor) -> Tensor:
    """A bias (N,) or smoothing (K,): the order of scales with one group."""
    return scale_from_nunchaku(vector.reshape(1, -1)).reshape(-1)


def vector_to_nunchaku(vector: Tensor) -> Tensor:
    """The inverse of `vector_from_nunchaku`."""
    return scale_to_nunchaku(vector.reshape(1, -1)).reshape(-1)


def _low_rank_shape(width: int, rank: int) -> tuple[int, ...]:
    return width // 16, rank // 16, 8, 4, 2, 2, 2


def down_from_nunchaku(proj_down: Tensor) -> Tensor:
    """(K, R), tiled → (K, R)."""
    k, r = proj_down.shape
    return _permuted(proj_down, _low_rank_shape(k, r), _LOW_RANK).reshape(r, k).t().contiguous()


def down_to_nunchaku(proj_down: Tensor) -> Tensor:
    """The inverse of `down_from_nunchaku`."""
    k, r = proj_down.shape
    return _restored(proj_down.t(), _low_rank_shape(k, r), _LOW_RANK).reshape(k, r)


def up_from_nunchaku(proj_up: Tensor) -> Tensor:
    """(N, R), tiled → (N, R)."""
    n, r = proj_up.shape
    return _permuted(proj_up, _low_rank_shape(n, r), _UP).reshape(n, r)


def up_to_nunchaku(proj_up: Tensor) -> Tensor:
    """The inverse of `up_from_nunchaku`."""
    n, r = proj_up.shape
    return _restored(proj_up, _low_rank_shape(n, r), _UP).reshape(n, r)


def awq_from_nunchaku(qweight: Tensor) -> Tensor:
    """int32 (N/4, K/2) of AWQ's interleaved codes → int8 (N, K/2), codes 0..15, low nibble = even
    column.
    """
    n, k = qweight.shape[0] * 4, qweight.shape[1] * 2
    words = (
        qweight.contiguous().view(torch.int16).reshape(n // 4, k // 64, 4, 2, 1, 8).to(torch.int32)
    )
    codes = (words >> torch.tensor([0, 4, 8, 12], dtype=torch.int32).reshape(4, 1)) & 15
    codes = codes.permute(0, 2, 1, 3, 4, 5).reshape(n, k // 2, 2).to(torch.uint8)
    return (codes[..., 0] | codes[..., 1] << 4).view(torch.int8)


def awq_to_nunchaku(codes: Tensor) -> Tensor:
    """The inverse of `awq_from_nunchaku`."""
    n, half = codes.shape
    bytes_ = codes.contiguous().view(torch.uint8)
    wide = (
        torch.stack([bytes_ & 15, bytes_ >> 4], -1)
        .reshape(n // 4, 4, half // 32, 2, 4, 8)
        .permute(0, 2, 1, 3, 4, 5)
        .to(torch.int32)
    )
    words = wide[..., 0, :] | wide[..., 1, :] << 4 | wide[..., 2, :] << 8 | wide[..., 3, :] << 12
    return words.to(torch.int16).reshape(n // 4, half * 2).view(torch.int32)


def awq_groups(k: int) -> int:
    """Rows of AWQ's scales for K inputs: the K/64 groups and their padding."""
    return -(-(k // 64) // _AWQ_GROUP_STEP) * _AWQ_GROUP_STEP


def rows_from_adanorm(tensor: Tensor, splits: int) -> Tensor:
    """Rows in the order of an interleaved modulation, (D, splits) → those of the model, (splits,
    D): shift, scale, gate, …
    """
    return tensor.reshape(-1, splits, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def rows_to_adanorm(tensor: Tensor, splits: int) -> Tensor:
    """The inverse of `rows_from_adanorm`."""
    return tensor.reshape(splits, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


# ---- comfy-kitchen -------------------------------------------------------------------------------


def weight_from_kitchen(tiles: Tensor) -> Tensor:
    """int8 (N/128, K/64, 32, 128), of which the last axis is 4 rows x 32 bytes → (N, K/2)."""
    blocks, groups = tiles.shape[:2]
    return (
        tiles.reshape(blocks, groups, 32, 4, 32)
        .permute(0, 2, 3, 1, 4)
        .reshape(blocks * 128, groups * 32)
        .contiguous()
    )


def weight_to_kitchen(codes: Tensor) -> Tensor:
    """The inverse of `weight_from_kitchen`."""
    n, half = codes.shape
    return (
        codes.reshape(n // 128, 32, 4, half // 32, 32)
        .permute(0, 3, 1, 2, 4)
        .reshape(n // 128, half // 32, 32, 128)
        .contiguous()
    )


def scale_from_kitchen(tiles: Tensor) -> Tensor:
    """(N/128, G, 128) → (G, N); a tiled proj_up (N/128, R, 128) → (R, N) likewise."""
    return tiles.permute(1, 0, 2).reshape(tiles.shape[1], -1).contiguous()


def scale_to_kitchen(scale: Tensor) -> Tensor:
    """The inverse of `scale_from_kitchen`."""
    return scale.reshape(scale.shape[0], -1, 128).permute(1, 0, 2).contiguous()
