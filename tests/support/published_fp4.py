"""Nunchaku's NVFP4 files, made by the published index formulas (deepcompressor,
backend/nunchaku/utils.py), and the official arithmetic (nunchaku, gemm_w4a4.cuh) number by number;
nothing of the package's own readers is used.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nunchaku_packers import codes_of, pack_vector
from published_files import RandomFlux, svdquant

LEVELS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def pack_micro(scale: Tensor) -> Tensor:
    """e4m3 (N, K/16) natural → (K/16, N) as stored."""
    size, groups = scale.shape
    n, g = np.meshgrid(np.arange(size), np.arange(groups), indexing="ij")
    m = n % 128
    place = (
        ((((n // 128) * (groups // 4) + g // 4) * 8 + m % 8) * 4 + (m % 32) // 8) * 16
        + (m // 32) * 4
        + g % 4
    )
    assert len(set(place.reshape(-1).tolist())) == place.size, "no two numbers share a place"
    out = np.zeros(size * groups, np.uint8)
    out[place.reshape(-1)] = scale.view(torch.uint8).numpy().reshape(-1)
    return torch.from_numpy(out).reshape(groups, size).view(torch.float8_e4m3fn)


def fp4_linear(part: dict[str, Tensor], seed: int, per_row: bool) -> dict[str, Tensor]:
    """The part with e4m3 scales of 16 columns, and one scale of all or one a row."""
    n, half = part["weight"].shape
    draw = torch.Generator().manual_seed(seed)
    micro = (torch.rand(n, half // 8, generator=draw) * 20 + 2).to(torch.float8_e4m3fn)
    size = 0.006 / (half * 2) ** 0.5
    rows = (torch.rand(n, generator=draw) + 0.5) * size
    beside = {"wcscales": rows.bfloat16()} if per_row else {"wtscale": torch.tensor([size])}
    return part | {"micro": micro} | beside


def packed(prefix: str, part: dict[str, Tensor]) -> dict[str, Tensor]:
    """A linear in Nunchaku's form."""
    out = svdquant(prefix, part)
    out[f"{prefix}.wscales"] = pack_micro(part["micro"])
    if "wcscales" in part:
        out[f"{prefix}.wcscales"] = pack_vector(part["wcscales"])
    else:
        out[f"{prefix}.wtscale"] = part["wtscale"]
    return out


class RandomFp4Flux(RandomFlux):
    """The random FLUX with 4-bit floats; its q, k and v have a scale a row, all others one."""

    def __init__(self, **sizes):
        super().__init__(**sizes)
        for seed, name in enumerate(self.parts):
            self.parts[name] = fp4_linear(self.parts[name], seed, "qkv" in name)

    def state(self) -> dict[str, Tensor]:
        """The whole file."""
        blocks, others = self.nunchaku()
        for name, part in self.parts.items():
            blocks |= packed(name, part)
        return blocks | others


def _nearest(ratio: np.ndarray) -> np.ndarray:
    """Signed values nearest to ratios; ties go to the even code."""
    size = np.minimum(np.abs(ratio), 6)[..., None]
    distance = np.abs(size - LEVELS)
    odd = np.arange(8) % 2
    code = np.lexsort((np.broadcast_to(odd, distance.shape), distance), axis=-1)[..., 0]
    return np.sign(ratio) * LEVELS[code]


def official(part: dict[str, Tensor], x: Tensor) -> np.ndarray:
    """y (M, N) of a linear as Nunchaku computes it, but in float64: x (M, K)."""
    codes = codes_of(part["weight"]).astype(int)
    values = np.where(codes & 8, -1, 1) * LEVELS[codes & 7]
    n, k = values.shape
    micro = part["micro"].float().numpy().astype(float)
    weight = (values.reshape(n, -1, 16) * micro[..., None]).reshape(n, k)
    xs = x.float().numpy().astype(np.float32)
    v = (xs / part["weight_smooth_factor"].float().numpy()).reshape(len(xs), -1, 16)
    top = np.minimum(np.abs(v).max(-1, keepdims=True) / np.float32(6), 448).astype(np.float32)
    scale = torch.from_numpy(top).to(torch.float8_e4m3fn).float().numpy().astype(float)
    inputs = (_nearest(v / np.where(top == 0, np.inf, top)) * scale).reshape(len(xs), k)
    y = inputs @ weight.T
    rows = part["wcscales"] if "wcscales" in part else part["wtscale"]
    down, up = (part[f"weight_proj_{way}"].double().numpy() for way in ("down", "up"))
    return y * rows.double().numpy() + (xs @ down) @ up.T + part["bias"].double().numpy()
