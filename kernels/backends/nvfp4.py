"""4-bit floats on GPUs that multiply them, through torch's scaled matrix product (cuBLAS): sm_100
(B200) and sm_120 (RTX 50) on. Not yet measured.

Scales go in tiles of 128 rows by 4 groups, in the order of CUTLASS' sm100_blockscaled_layout.hpp.
The order of the two codes in a byte is of no account, as both operands have the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..params import NVFP4Params
from ..reference import nvfp4 as reference

FIRST_CAPABILITY = (10, 0)
TOLERANCE = 0.02  # relative error of the trial: of a 16-bit result


def serves(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether the product runs here for activations of a dtype, and why (not)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False, f"no 4-bit floats on {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        return False, f"GPUs of compute capability {capability[0]}.{capability[1]} have none"
    if dtype not in (torch.bfloat16, torch.float16):
        return False, f"the scaled product takes 16-bit activations, not {dtype}"
    if not hasattr(torch, "float4_e2m1fn_x2"):
        return False, "this torch has no float4_e2m1fn_x2; update it"
    return _tried(device)


@functools.lru_cache(maxsize=16)
def _tried(device: torch.device) -> tuple[bool, str]:
    return tried(linear_nvfp4, device, "torch's scaled product")


def tried(
    linear: Callable[[Tensor, NVFP4Params], Tensor], device: torch.device, name: str
) -> tuple[bool, str]:
    """One small linear by a way of `name`, compared with the reference; why (not)."""
    draw = torch.Generator("cpu").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cpu")

    x = normal(72, 320).bfloat16()
    codes, scale = reference.quantize_nvfp4(normal(136, 320))
    smooth = torch.linspace(0.5, 2, 320, dtype=torch.bfloat16, device="cpu")
    down, up = (normal(320, 24) * 0.1).bfloat16(), (normal(136, 24) * 0.3).bfloat16()
    column = torch.linspace(0.5, 1, 136, device="cpu")
    p = NVFP4Params(pack(codes), scale, column, smooth, down, up, normal(136).bfloat16(), True)
    wanted = reference.linear_nvfp4(x.float(), *p)
    tensors = {name: t for name, t in p._asdict().items() if isinstance(t, Tensor)}
    moved: dict[str, Any] = {name: tensor.to(device) for name, tensor in tensors.items()}
    there = p._replace(**moved)
    try:
        found = linear(x.to(device), there).float().cpu()
    except Exception as error:  # of compilers, drivers and libraries of any make
        words = str(error).strip().split("\n")[0]
        return False, f"{name} fails on {device}: {type(error).__name__}: {words}"
    far = ((found - wanted).norm() / wanted.norm()).item()
    if not far < TOLERANCE:
        return False, f"{name} is wrong on {device} (relative error {far:.2g})"
    return True, f"{name} of 4-bit floats"


def pack(codes: Tensor) -> Tensor:
    """Codes 0..15 (M, K) → int8 (M, K/2), low nibble = even column."""
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)


def tiled(scale: Tensor) -> Tensor:
    """e4m3 scales (rows, K/16) in the order that the matrix unit reads, flat, zeros as padding."""
    rows, groups = scale.shape
    raw = torch.nn.functional.pad(scale.view(torch.uint8), (0, -groups % 4, 0, -rows % 128))
    tiles = raw.reshape(raw.shape[0] // 128, 4, 32, raw.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(torch.float8_e4m3fn)


def linear_nvfp4(x: Tensor, p: NVFP4Params) -> Tensor:
    """`reference.linear_nvfp4` of x (M, K) in 16 bits; inputs are rounded by the scale that is
    used.
    """
    codes, scale = reference.quantize_nvfp4(x.float() / p.smooth_factor.float(), rounded=True)
    y = torch._scaled_mm(
        pack(codes).view(torch.float4_e2m1fn_x2),
        p.weight.view(torch.float4_e2m1fn_x2).t(),
        scale_a=tiled(scale),
        scale_b=tiled(p.weight_scale),
        out_dtype=torch.bfloat16,
    )
    h = (x @ p.proj_down.to(x.dtype)) @ p.proj_up.to(x.dtype).t()
    y = y.float() * p.weight_scale_2.float() + h.float()
    return (y if p.bias is None else y + p.bias.float()).to(x.dtype)
