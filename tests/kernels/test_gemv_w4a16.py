"""gemv_w4a16 and linear_w4a16: 4-bit weights with zero points, 16-bit activations."""

import pytest
import torch

from cases import SMALL, make_input, make_w4a16
from compare import assert_twice_plain
from nibble.kernels import ops
from nibble.quant.weights.packing import pack_int4, unpack_int4


def test_the_zero_point_of_the_codes_is_eight():
    weight = pack_int4(torch.full((2, 128), 9, dtype=torch.int8))
    scale, zeros = torch.full((2, 2), 0.5), torch.full((2, 2), 0.25)
    y = ops.gemv_w4a16(torch.ones(1, 128), weight, scale, zeros, torch.tensor([0.0, 1.0]))
    assert y.tolist() == [[128 * 0.75, 128 * 0.75 + 1]]


def test_codes_span_zero_to_fifteen():
    weight = pack_int4((torch.arange(64) % 16).to(torch.int8)[None])
    y = ops.gemv_w4a16(torch.eye(64), weight, torch.ones(1, 1), torch.zeros(1, 1))
    assert torch.equal(y[:, 0], torch.arange(64.0) % 16 - 8)


def dense(parameters, dtype):
    codes = unpack_int4(parameters["weight"], signed=False).to(dtype).unflatten(-1, (-1, 64)) - 8
    scale = parameters["weight_scale"].to(dtype).t()[..., None]
    zeros = (
        0
        if parameters["weight_zeros"] is None
        else parameters["weight_zeros"].to(dtype).t()[..., None]
    )
    return (codes * scale + zeros).flatten(-2)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_error_is_at_most_twice_that_of_plain_torch(case, dtype):
    x, parameters = make_input(case, dtype), make_w4a16(case, dtype)
    bias = parameters["bias"]
    exact = torch.nn.functional.linear(
        x.double(), dense(parameters, torch.float64), None if bias is None else bias.double()
    )
    plain = torch.nn.functional.linear(x, dense(parameters, dtype), bias)
    ours = ops.gemv_w4a16(x, **parameters)
    assert ours.dtype == dtype
    assert_twice_plain(ours, exact, plain)


def test_leading_shapes_are_kept():
    parameters = make_w4a16(SMALL[3])
    x = make_input(SMALL[3], torch.bfloat16)
    flat = ops.gemv_w4a16(x, **parameters)
    assert torch.equal(ops.linear_w4a16(x[None, :, None], **parameters), flat[None, :, None])
    assert torch.equal(ops.linear_w4a16(x[0], **parameters), ops.gemv_w4a16(x[:1], **parameters)[0])
    assert ops.linear_w4a16(x[:0], **parameters).shape == (0, SMALL[3].N)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(2, 96)}, "K=96 is not a multiple of the group size 64"),
        ({"x": torch.randn(2, 1, 64)}, "linear_w4a16 takes any leading shape"),
        ({"weight": torch.zeros(3, 32)}, "packed int8"),
        (
            {"weight_zeros": torch.ones(3, 1)},
            r"weight_zeros is \(3, 1\) and must be \(K/64, N\) = \(1, 3\)",
        ),
        ({"bias": torch.ones(2)}, "bias is"),
    ],
)
def test_mistakes_are_named(change, words):
    groups = {"weight_scale": torch.ones(1, 3), "weight_zeros": torch.ones(1, 3)}
    good = {"x": torch.randn(2, 64), "weight": torch.zeros(3, 32, dtype=torch.int8)} | groups
    with pytest.raises(ValueError, match=words):
        ops.gemv_w4a16(**(good | change))
