"""comfy-kitchen's kernels as a fallback, and the only file that imports comfy_kitchen.

Its backend is that of the device: "cuda" on NVIDIA's GPUs, "hip" on AMD's (RDNA2 to RDNA4, of which
RDNA2 has no W4A4 product there), "triton" on Intel's, which has none of these ops.

What differs there, and what is done about it:
- it pads tokens to a multiple of 256: the result is cut back to M;
- it returns activation scales and h in x's dtype, inside buffers that its next call overwrites: so
  only whole linears go through it, never `quantize_down` alone;
- it leaves the unsigned shift to the caller: added here, to the main path only;
- it has no rotation: x is smoothed and rotated here, then quantized there with a smoothing factor
  of ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import reference
from ..optional import optional

if TYPE_CHECKING:
    from ..params import W4A4Params, W4A16Params

_OPS = {
    "linear_w4a4": ("quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"),
    "linear_w4a16": ("gemv_awq_w4a16",),
    "gemv_w4a16": ("gemv_awq_w4a16",),
    "gemm_w4a16": ("gemv_awq_w4a16",),
}
_BACKENDS = {"cuda": "CUDA", "hip": "HIP", "triton": "Triton"}


@functools.lru_cache(maxsize=1)
def module() -> ModuleType | None:
    """comfy_kitchen, imported at the first GPU tensor and not before, or None."""
    return optional("comfy_kitchen")[0]


def decide(op: str, device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether comfy_kitchen runs `op` for activations of `dtype` on `device`, and why or why not,
    in one sentence.
    """
    if device.type not in ("cuda", "xpu"):
        return False, f"comfy_kitchen is used on GPUs only, and this is {device.type}"
    if op not in _OPS:
        return False, f"comfy_kitchen has no separate {op} with float32 scales"
    if dtype not in (torch.float16, torch.bfloat16):
        return False, f"comfy_kitchen computes in float16 and bfloat16, not {dtype}"
    kitchen = module()
    if kitchen is None:
        return False, "comfy_kitchen is not installed"
    if device.type == "xpu":
        return _has(kitchen, "triton", op)
    if not torch.cuda.is_available():
        return False, "torch finds no CUDA device"
    if torch.version.hip:
        return _has(kitchen, "hip", op)
    return _decide_for_nvidia(kitchen, op, torch.cuda.get_device_capability(device))


def _has(kitchen: ModuleType, name: str, op: str) -> tuple[bool, str]:
    """Whether one of its backends is there and has what `op` needs."""
    words = f"comfy_kitchen's {_BACKENDS[name]} backend"
    backend = kitchen.list_backends().get(
        name, {"available": False, "unavailable_reason": "this version has none"}
    )
    if not backend["available"]:
        return False, f"{words} is not available: {backend['unavailable_reason']}"
    if backend["disabled"]:
        return False, f"{words} was disabled by the host program"
    missing = [function for function in _OPS[op] if function not in backend["capabilities"]]
    if missing:
        return False, f"{words} has no {' and '.join(missing)} for this GPU"
    return True, f"{words} has {' and '.join(_OPS[op])}"


def _decide_for_nvidia(
    kitchen: ModuleType, op: str, capability: tuple[int, int]
) -> tuple[bool, str]:
    use, why = _has(kitchen, "cuda", op)
    if not use:
        return False, why
    gpu = "compute capability {}.{}".format(*capability)
    if capability < (8, 0):
        return False, f"comfy_kitchen needs compute capability 8.0, this GPU has {gpu}"
    if op == "linear_w4a4" and capability[0] != 8:
        reason = f"comfy_kitchen's int4 instructions are emulated on {gpu}, slower than a 16-bit"
        return False, f"{reason} product"
    return True, f"comfy_kitchen's CUDA kernels are native on {gpu}"


def linear_w4a4(x: Tensor, p: W4A4Params) -> Tensor:
    """`reference.linear_w4a4` through comfy_kitchen's public ops. Shapes as there; x (M, K) with M
    > 0.
    """
    if p.unsigned_from:
        return sum_of_two(x, p, linear_w4a4)
    kitchen = _loaded()
    dtype = x.dtype
    x = x.contiguous()
    smooth = p.smooth_factor.to(dtype)
    main = x + reference.SHIFT if p.act_unsigned else x
    if p.rotation:
        main = reference.hadamard64(main.float() / p.smooth_factor.float()).to(dtype)
        smooth = torch.ones_like(smooth)
    q, ascales, h = kitchen.quantize_svdquant_w4a4(
        main, smooth=smooth, lora_down=p.proj_down.to(dtype), act_unsigned=p.act_unsigned, lora_x=x
    )
    y = kitchen.scaled_mm_svdquant_w4a4(
        act=q,
        wgt=p.weight,
        ascales=ascales,
        wscales=p.weight_scale.to(dtype),
        lora_act_in=h,
        lora_up=p.proj_up.to(dtype),
        bias=None if p.bias is None else p.bias.to(dtype),
        act_unsigned=p.act_unsigned,
    )
    return y[: x.shape[0]]


def sum_of_two(x: Tensor, p: W4A4Params, linear: Callable[[Tensor, W4A4Params], Tensor]) -> Tensor:
    """A linear whose codes change their sign at a column, by one that has no such: of the columns
    before it and of the others.
    """
    k, g = p.unsigned_from, p.unsigned_from // reference.GROUP

    def part(columns: slice, groups: slice, bias: Tensor | None, act_unsigned: bool) -> Tensor:
        halves = slice(columns.start // 2, columns.stop // 2)
        layer = p._replace(
            weight=p.weight[:, halves].contiguous(),
            weight_scale=p.weight_scale[groups],
            smooth_factor=p.smooth_factor[columns],
            proj_down=p.proj_down[columns],
            bias=bias,
            act_unsigned=act_unsigned,
            unsigned_from=0,
        )
        return linear(x[:, columns], layer)

    signed = part(slice(0, k), slice(0, g), None, False)
    return signed + part(slice(k, x.shape[1]), slice(g, None), p.bias, True)


def gemv_w4a16(x: Tensor, p: W4A16Params) -> Tensor:
    """`reference.gemv_w4a16` through comfy_kitchen's public op. Shapes as there; x (M, K) with M >
    0.
    """
    dtype = x.dtype
    zeros = torch.zeros_like(p.weight_scale) if p.weight_zeros is None else p.weight_zeros
    return _loaded().gemv_awq_w4a16(
        x.contiguous(),
        p.weight,
        p.weight_scale.to(dtype),
        zeros.to(dtype),
        bias=None if p.bias is None else p.bias.to(dtype),
    )


def _loaded() -> ModuleType:
    """comfy_kitchen, which `decide` has found."""
    kitchen = module()
    assert kitchen is not None
    return kitchen
