"""ComfyUI's own formats of a low-bit linear, as it reads them from version 0.33 on (comfy/ops.py,
`_load_quantized_module`) and comfy-kitchen computes them.

    asym_w4a8_int8   codes into a table of 16, an e4m3 scale per 16 columns, float32 per row;
                     x rotated, int8 per token                                       4.5 bits
    int8_convrot     int8 and a float32 scale per row; x rotated, int8 per token     8 bits
    nvfp4            e2m1, an e4m3 scale per 16 columns, one float32; x alike        4.5 bits

`int8_convrot` is what files are called; the layer's JSON says int8_tensorwise with "convrot". Their
rotation is block diagonal, an orthonormal Kronecker power of the regular 4-point Hadamard matrix
(ConvRot): symmetric, its own inverse.
"""

import math
from abc import ABC, abstractmethod
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...files.safetensors import TensorSpec
from ..grid import Grid
from ..published_grids import E4M3_MAX, LLOYD_MAX, E2M1Grid, Int8, Lookup8

_BLOCKS = (256, 64)  # of the rotation: the largest that divides K


@lru_cache(maxsize=4)
def regular_hadamard(size: int) -> Tensor:
    """The orthonormal Kronecker power of the regular 4-point matrix, (size, size) float32; size: a
    power of 4.
    """
    four = torch.tensor([[1.0, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]])
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.kron(matrix, four)
    return matrix / math.sqrt(size)


class StockFormat(ABC):
    """One of the formats, for linears of K inputs, a multiple of 64."""

    name: ClassVar[str]
    action: ClassVar[str]  # in reports
    independent_errors: ClassVar[bool] = True  # of activations, from the activations themselves

    def rotated(self, x: Tensor) -> Tensor:
        """x (..., K) as it is quantized: turned, or as it is."""
        return x

    def rotation(self, k: int) -> int:
        """Columns of one block of the rotation; 1 without one."""
        return 1

    @abstractmethod
    def facts(self, k: int) -> dict[str, Any]:
        """The layer's JSON."""

    @abstractmethod
    def specs(self, n: int, k: int) -> list[TensorSpec]:
        """Its tensors, named by suffix, without bias and JSON."""

    @abstractmethod
    def grid(self, weight: Tensor) -> Grid:
        """The grid, with its rows' scales, for a (rotated) weight (N, K)."""

    @abstractmethod
    def activations(self, x: Tensor) -> Tensor:
        """(Rotated) x (tokens, K) after its trip through few bits."""

    @abstractmethod
    def pack(self, codes: Tensor, scale: Tensor, grid: Any) -> dict[str, Tensor]:
        """suffix → tensor; codes int8 (N, K), scale float32 (K/16, N)."""


class _Rotated(StockFormat):
    def rotation(self, k: int) -> int:
        return next(size for size in _BLOCKS if k % size == 0)

    def rotated(self, x: Tensor) -> Tensor:
        size = self.rotation(x.shape[-1])
        return (x.unflatten(-1, (-1, size)) @ regular_hadamard(size).to(x)).flatten(-2)

    def activations(self, x: Tensor) -> Tensor:
        scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-30)
        return (x / scale).round_().clamp_(-128, 127).mul_(scale)


class AsymW4A8(_Rotated):
    """See the module's head."""

    name, action = "asym_w4a8_int8", "w4a8"

    def facts(self, k: int) -> dict[str, Any]:
        return {"format": self.name, "group_size": 16, "convrot_groupsize": self.rotation(k)}

    def specs(self, n: int, k: int) -> list[TensorSpec]:
        return [
            TensorSpec("weight", torch.int8, (n, k // 2)),
            TensorSpec("weight_s_rel", torch.float8_e4m3fn, (n, k // 16)),
            TensorSpec("weight_s_channel", torch.float32, (n,)),
            TensorSpec("weight_codebook", torch.float32, (16,)),
        ]

    def grid(self, weight: Tensor) -> Lookup8:
        return Lookup8(_row_scale(weight), torch.tensor(LLOYD_MAX, device=weight.device))

    def pack(self, codes: Tensor, scale: Tensor, grid: Lookup8) -> dict[str, Tensor]:
        return {
            "weight": pack_pairs(codes, even_first=True).view(torch.int8),
            "weight_s_rel": scale.T.contiguous().to(torch.float8_e4m3fn),
            "weight_s_channel": grid.row,
            "weight_codebook": grid.table,
        }


class Int8ConvRot(_Rotated):
    """See the module's head."""

    name, action = "int8_convrot", "w8a8"

    def facts(self, k: int) -> dict[str, Any]:
        return {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": self.rotation(k)}

    def specs(self, n: int, k: int) -> list[TensorSpec]:
        return [
            TensorSpec("weight", torch.int8, (n, k)),
            TensorSpec("weight_scale", torch.float32, (n, 1)),
        ]

    def grid(self, weight: Tensor) -> Int8:
        return Int8(_row_scale(weight))

    def pack(self, codes: Tensor, scale: Tensor, grid: Int8) -> dict[str, Tensor]:
        return {"weight": codes.to(torch.int8), "weight_scale": grid.row[:, None].contiguous()}


class NVFP4(StockFormat):
    """See the module's head. Rows are padded to whole 16, scales to whole tiles of 128 rows by 4
    groups; a byte's high half is the even column.
    """

    name, action = "nvfp4", "nvfp4"
    # Next to a large value a small one becomes 0, and its error is itself: shrinking weights for
    # the noise of their inputs, as for int8, does harm.
    independent_errors = False

    def facts(self, k: int) -> dict[str, Any]:
        return {"format": self.name}

    def specs(self, n: int, k: int) -> list[TensorSpec]:
        return [
            TensorSpec("weight", torch.uint8, (_up(n, 16), k // 2)),
            TensorSpec("weight_scale", torch.float8_e4m3fn, (_up(n, 128), _up(k // 16, 4))),
            TensorSpec("weight_scale_2", torch.float32, ()),
        ]

    def grid(self, weight: Tensor) -> E2M1Grid:
        largest = weight.abs().amax().clamp_min(1e-30)
        return E2M1Grid((largest / (E4M3_MAX * E2M1Grid.largest)).repeat(weight.shape[0]))

    def activations(self, x: Tensor) -> Tensor:
        whole = (x.abs().amax() / (E4M3_MAX * E2M1Grid.largest)).clamp_min(1e-30)
        groups = x.unflatten(-1, (-1, 16))
        largest = groups.abs().amax(-1, keepdim=True)
        scale = (largest / (E2M1Grid.largest * whole)).to(torch.float8_e4m3fn).float()
        unit = E2M1Grid(whole)
        codes = unit.codes(groups, scale.clamp_min(2.0**-10))
        return unit.values(codes, scale).flatten(-2)

    def pack(self, codes: Tensor, scale: Tensor, grid: E2M1Grid) -> dict[str, Tensor]:
        n = codes.shape[0]
        padding = (0, 0, 0, _up(n, 16) - n)
        return {
            "weight": torch.nn.functional.pad(pack_pairs(codes, even_first=False), padding),
            "weight_scale": tiled_scales(scale.T).to(torch.float8_e4m3fn),
            "weight_scale_2": grid.row[0].clone(),
        }


FORMATS: dict[str, StockFormat] = {form.name: form for form in (AsymW4A8(), Int8ConvRot(), NVFP4())}


def _up(count: int, whole: int) -> int:
    return -(-count // whole) * whole


def _row_scale(weight: Tensor) -> Tensor:
    """What lets int8 reach the largest weight of each row, float32 (N,)."""
    return (weight.abs().amax(1) / 127).clamp_min(1e-12)


def pack_pairs(codes: Tensor, even_first: bool) -> Tensor:
    """Codes 0..15 (N, K) → uint8 (N, K/2); even_first: even columns in the low half of a byte."""
    even, odd = codes[:, 0::2], codes[:, 1::2]
    low, high = (even, odd) if even_first else (odd, even)
    return (low | high << 4).to(torch.uint8)


def tiled_scales(scale: Tensor) -> Tensor:
    """Scales (N, G) in the order that Blackwell's matrix units read, zeros as padding: tiles of 128
    rows by 4 groups, one behind the other along G; row r and group c of a tile lie at
    r % 32 * 16 + r // 32 * 4 + c (CUTLASS, sm100_blockscaled_layout.hpp). (N up to 128, G up to 4).
    """
    n, g = scale.shape
    rows, columns = _up(n, 128), _up(g, 4)
    padded = torch.nn.functional.pad(scale, (0, columns - g, 0, rows - n))
    tiles = padded.reshape(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns).contiguous()
