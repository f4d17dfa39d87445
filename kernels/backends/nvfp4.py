"""4-bit floats on GPUs that multiply them, through torch's scaled matrix product (cuBLAS): sm_100
(B200) and sm_120 (RTX 50) on. Not yet measured.

Scales go in tiles of 128 rows by 4 groups, in the order of CUTLASS' sm100_blockscaled_layout.hpp.
The order of the two codes in a byte is of no account, as both operands have the same.
"""

from __future__ import annotations

import functools

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
    """One small linear compared with the reference."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(32, 256, generator=draw).to(device, torch.bfloat16)
    codes, scale = reference.quantize_nvfp4(torch.randn(128, 256, generator=draw))
    ones, branch = torch.ones(256).to(device), torch.zeros(256, 16).to(device)
    p = NVFP4Params(
        pack(codes).to(device), scale.to(device), ones[:128], ones, branch, branch[:128], None, True
    )
    try:
        found = linear_nvfp4(x, p).float()
    except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
        return False, f"torch's scaled product fails here: {str(error).splitlines()[0]}"
    wanted = reference.linear_nvfp4(x, *p).float()
    far = ((found - wanted).norm() / wanted.norm()).item()
    if not far < TOLERANCE:
        return False, f"torch's scaled product is wrong here (relative error {far:.2g})"
    return True, "torch's scaled product of 4-bit floats"


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
