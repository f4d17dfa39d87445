"""The GPU kernels that a model can ask for, known from its layers before its first step.

`plans` is asked about every layer and a range of tokens, so that nothing is said twice of which
kernel runs what.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import NamedTuple

from . import plans, plans_nvfp4, plans_w4a8, plans_w16, structs
from .kernels import VQ_LAYOUTS, Kernel
from .plans import Gpu, Launch
from .structs import E4M3, F16, GROUP, INT8, PACKED

_IMAGE = (256, 512, 1024, 2048, 4096, 4608, 9216, 16384, 32768)
TOKENS = {
    "linear_w4a4": _IMAGE,
    "mlp_w4a4": _IMAGE,
    "linear_w4a8": _IMAGE,
    "linear_nvfp4": (64, *_IMAGE),
    "linear_w4a16": (1, 2, 4),
    "linear_vq": (1, 2, 4, *_IMAGE),
}
"""Tokens that a layer is expected to see: text, pictures, films; modulation sees one of each
picture of a batch.
"""

_OF_A_LORA = 32
"""Columns that a LoRA adds to a branch after the model was loaded: enough to change the kernel."""


class LayerKind(NamedTuple):
    """What decides which kernels a layer runs. op: a key of TOKENS; mlp_w4a4 is the first layer of
    a fused MLP. param_dtype: that which its parameters are brought to, by number.
    """

    op: str
    n: int
    k: int
    rank: int
    param_dtype: int
    act_unsigned: bool = False
    rotated: bool = False
    bits: int = 0
    vector: int = 0
    act_bits: int = 4


def of_model(layers: Iterable[LayerKind], x_dtype: int, gpu: Gpu) -> list[Kernel]:
    """Each kernel once, in the order in which layers ask for them."""
    found: dict[Kernel, None] = {}
    for layer in dict.fromkeys(layers):
        for tokens in TOKENS[layer.op]:
            for launch in _launches(layer, tokens, x_dtype, gpu):
                found[launch.kernel] = None
    return list(found)


def _launches(layer: LayerKind, m: int, x_dtype: int, gpu: Gpu) -> list[Launch]:
    if layer.op == "linear_w4a16":
        return plans_w16.w4a16(_w4a16(layer, m, x_dtype), gpu)
    if layer.op == "linear_vq":
        known = (layer.bits, layer.vector) in VQ_LAYOUTS and layer.k % GROUP == 0
        return plans_w16.gemm_vq(_vq(layer, m, x_dtype), gpu) if known else []
    if layer.op == "linear_nvfp4":
        return _nvfp4(layer, m, x_dtype, gpu)
    if layer.op == "linear_w4a8":
        return _w4a8(layer, m, x_dtype, gpu)
    quantizer, product = _w4a4(layer, m, x_dtype, gpu)
    launches = plans.quantize_down(quantizer, gpu)
    quantizer.R += _OF_A_LORA
    launches += plans.quantize_down(quantizer, gpu)
    if layer.op == "mlp_w4a4":
        fused = structs.GemmW4A4UpGeluQuantizeDown(first=product, R2=1)
        return launches + plans.gemm_w4a4_up_gelu_quantize_down(fused, gpu)
    return launches + plans.gemm_w4a4_up(product, gpu)


def _w4a4(
    layer: LayerKind, m: int, x_dtype: int, gpu: Gpu
) -> tuple[ctypes.Structure, ctypes.Structure]:
    shared = {"M": m, "K": layer.k, "R": layer.rank, "param_dtype": layer.param_dtype}
    codes = INT8 if layer.act_bits == 8 else E4M3 if gpu.hopper else PACKED
    shared |= {"codes": codes, "act_unsigned": layer.act_unsigned}
    quantizer = structs.QuantizeDown(**shared, x_dtype=x_dtype, rotate=layer.rotated)
    product = structs.GemmW4A4Up(**shared, N=layer.n, h_stride=layer.rank, out_dtype=x_dtype)
    return quantizer, product


def _w4a8(layer: LayerKind, m: int, x_dtype: int, gpu: Gpu) -> list[Launch]:
    shared = {"M": m, "N": layer.n, "K": layer.k, "param_dtype": layer.param_dtype}
    shared |= {"x_dtype": x_dtype, "rotate": layer.rotated, "group": GROUP}
    op = structs.LinearW4A8(**shared, R=layer.rank)
    with_a_lora = structs.LinearW4A8(**shared, R=layer.rank + _OF_A_LORA)
    return plans_w4a8.linear_w4a8(op, gpu) + plans_w4a8.linear_w4a8(with_a_lora, gpu)


def _nvfp4(layer: LayerKind, m: int, x_dtype: int, gpu: Gpu) -> list[Launch]:
    shared = {"M": m, "K": layer.k, "R": layer.rank, "param_dtype": layer.param_dtype}
    quantizer = structs.QuantizeNvfp4Down(**shared, x_dtype=x_dtype)
    product = structs.GemmNvfp4Up(**shared, N=layer.n, out_dtype=x_dtype)
    launches = plans_nvfp4.quantize_nvfp4_down(quantizer, gpu)
    return launches + plans_nvfp4.gemm_nvfp4_up(product, gpu)


def _w4a16(layer: LayerKind, m: int, x_dtype: int) -> ctypes.Structure:
    return structs.W4A16(M=m, N=layer.n, K=layer.k, x_dtype=x_dtype, param_dtype=layer.param_dtype)


def _vq(layer: LayerKind, m: int, x_dtype: int) -> ctypes.Structure:
    return structs.GemmVQ(
        M=m,
        N=layer.n,
        K=layer.k,
        bits=layer.bits,
        vector=layer.vector,
        x_dtype=x_dtype,
        out_dtype=x_dtype,
        codebook_dtype=F16,
        param_dtype=layer.param_dtype,
    )
