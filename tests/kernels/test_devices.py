"""Every op gives on any device what the float64 reference gives on the CPU: the same file, the same
picture.
"""

import pytest
import torch

from cases import SMALL, make_input, make_w4a4, make_w4a16, options
from compare import assert_sqnr, assert_twice_plain
from nibble.kernels import ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(parameters: dict, device: str) -> dict:
    return {
        name: None if tensor is None else tensor.to(device) for name, tensor in parameters.items()
    }


def doubled(parameters: dict) -> dict:
    return {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in parameters.items()
    }


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_4_bit_linear_is_the_same_on_every_device(case, dtype, device):
    """35 dB: an input that lies on the border of two codes may round either way, and then one group
    differs by a step.
    """
    x, parameters = make_input(case, dtype), make_w4a4(case, dtype)
    exact = reference.linear_w4a4(x.double(), **doubled(parameters), **options(case))
    found = ops.linear_w4a4(x.to(device), **moved(parameters, device), **options(case))
    assert found.device.type == device and found.dtype == dtype
    assert_sqnr(found.cpu(), exact, 35)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_integer_product_is_the_same_on_every_device(case, dtype, device):
    x, parameters = make_input(case, dtype), make_w4a4(case, dtype)
    q, ascales, h = reference.quantize_down(
        x, parameters["smooth_factor"], parameters["proj_down"], **options(case)
    )
    rest = {name: parameters[name] for name in ("weight", "weight_scale", "proj_up", "bias")}
    exact = reference.gemm_w4a4_up(
        q, ascales.double(), h.double(), **doubled(rest), act_unsigned=case.act_unsigned
    )
    plain = reference.gemm_w4a4_up(q, ascales, h, **rest, act_unsigned=case.act_unsigned).to(dtype)
    operands = (tensor.to(device) for tensor in (q, ascales, h))
    found = ops.gemm_w4a4_up(
        *operands, **moved(rest, device), act_unsigned=case.act_unsigned, out_dtype=dtype
    )
    assert_twice_plain(found.cpu(), exact, plain)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_4_bit_weights_alone_are_the_same_on_every_device(case, dtype, device):
    x, parameters = make_input(case, dtype), make_w4a16(case, dtype)
    exact = reference.gemv_w4a16(x.double(), **doubled(parameters))
    found = ops.linear_w4a16(x.to(device), **moved(parameters, device))
    assert_sqnr(found.cpu(), exact, 45)


def test_the_same_input_gives_the_same_bits_twice(device):
    case = SMALL[0]
    x, parameters = make_input(case).to(device), moved(make_w4a4(case), device)
    assert torch.equal(ops.linear_w4a4(x, **parameters), ops.linear_w4a4(x, **parameters))
