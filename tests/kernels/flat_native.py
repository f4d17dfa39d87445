"""The compiled ops with their tensors spelled out as in the reference, for tests that call one
instruction set of them. The dtype that parameters are brought to comes first.
"""

import torch

from cases import Case, make_input, make_w4a4, options
from nibble.kernels import reference
from nibble.kernels.backends import native_vq, native_w4a4, native_w4a8, native_w4a16
from nibble.kernels.params import (
    Activations,
    GeluArguments,
    ProductParams,
    QuantizeParams,
    VQParams,
    W4A8Params,
    W4A16Params,
)


def quantize_down(dtype, x, smooth, down, act_unsigned=False, rotation=0, **how):
    p = QuantizeParams(smooth, down, act_unsigned, rotation)
    return native_w4a4.quantize_down(dtype, x, p, **how)


def gemm_w4a4_up(dtype, q, ascales, h, *rest, isa=0):
    *product, act_unsigned, out_dtype = rest
    act = Activations(q, ascales, h, act_unsigned)
    return native_w4a4.gemm_w4a4_up(dtype, act, ProductParams(*product), out_dtype, isa)


def gemm_w4a4_up_gelu_quantize_down(dtype, *arguments, isa=0):
    return native_w4a4.gemm_w4a4_up_gelu_quantize_down(dtype, GeluArguments(*arguments), isa)


def w4a16(op, dtype, x, *parameters, isa=0):
    return native_w4a16.w4a16(op, dtype, x, W4A16Params(*parameters), isa)


def linear_w4a8(dtype, x, parameters: dict, isa=0):
    return native_w4a8.linear_w4a8(dtype, x, W4A8Params(**parameters), isa)


def gemm_vq(x, indices, codebook, scale, bias, *rest, isa=0):
    """`rest`: addend, out_dtype."""
    return native_vq.gemm_vq(x, VQParams(indices, codebook, scale, bias=bias), *rest, isa=isa)


def linear_vq(x, *parameters, isa=0):
    return native_vq.linear_vq(x, VQParams(*parameters), isa)


def double(parameters: dict) -> dict:
    return {
        name: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for name, t in parameters.items()
    }


def quantized(case: Case, dtype: torch.dtype, isa: int):
    """(q, ascales, h) from the module, and the parameters of the product that follows."""
    parameters = make_w4a4(case, dtype)
    smooth, down = parameters.pop("smooth_factor"), parameters.pop("proj_down")
    return (
        quantize_down(dtype, make_input(case, dtype), smooth, down, **options(case), isa=isa),
        parameters,
    )


def product(q, ascales, h, parameters: dict, unsigned: bool, dtype: torch.dtype, isa: int):
    names = ("weight", "weight_scale", "proj_up", "bias")
    return gemm_w4a4_up(
        dtype, q, ascales, h, *(parameters[name] for name in names), unsigned, dtype, isa=isa
    )


def dense_w4a16(parameters: dict):
    zeros = parameters["weight_zeros"]
    return reference.dequantize_w4_zeros(
        parameters["weight"],
        parameters["weight_scale"].double(),
        None if zeros is None else zeros.double(),
        torch.float64,
    )
