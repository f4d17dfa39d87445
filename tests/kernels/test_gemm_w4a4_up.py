"""gemm_w4a4_up: the int4 product on given codes, with the low-rank branch and the bias added."""

import pytest
import torch

from cases import SMALL, Case, make_input, make_w4a4, options, plain_w4a4
from compare import assert_twice_plain
from nibble.kernels import ops
from nibble.quant.weights.packing import pack_int4


def empty_branch(m, n):
    return {"h": torch.zeros(m, 0), "proj_up": torch.zeros(n, 0)}


@pytest.mark.parametrize(("unsigned", "per_group"), [(False, -64.0), (True, 960.0)])
def test_all_ones_bytes_times_weight_one(unsigned, per_group):
    m, n, groups = 3, 5, 4
    q = torch.full((m, groups * 32), -1, dtype=torch.int8)
    weight = torch.full((n, groups * 32), 0x11, dtype=torch.int8)
    ones = {"ascales": torch.ones(groups, m), "weight_scale": torch.ones(groups, n)}
    y = ops.gemm_w4a4_up(q, weight=weight, act_unsigned=unsigned, **ones, **empty_branch(m, n))
    assert torch.equal(y, torch.full((m, n), groups * per_group))


def test_the_most_negative_weight_is_minus_eight():
    q = pack_int4(torch.full((1, 64), 7, dtype=torch.int8))
    weight = torch.full((1, 32), -120, dtype=torch.int8)
    y = ops.gemm_w4a4_up(
        q, torch.ones(1, 1), weight=weight, weight_scale=torch.ones(1, 1), **empty_branch(1, 1)
    )
    assert y.item() == 64 * 7 * -8


def test_each_group_has_its_own_scales():
    q = pack_int4(torch.ones(2, 128, dtype=torch.int8))
    weight = pack_int4(torch.ones(3, 128, dtype=torch.int8))
    ascales = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    weight_scale = torch.tensor([[1.0, 0.5, 0.25], [2.0, 16.0, 32.0]])
    y = ops.gemm_w4a4_up(q, ascales, weight=weight, weight_scale=weight_scale, **empty_branch(2, 3))
    assert torch.equal(y, 64 * ascales.t() @ weight_scale)


def test_even_columns_are_low_nibbles():
    q = torch.zeros(1, 32, dtype=torch.int8)
    q[0, 3] = 0x05
    weight = pack_int4(torch.arange(64, dtype=torch.int8)[None] % 8)
    y = ops.gemm_w4a4_up(
        q, torch.ones(1, 1), weight=weight, weight_scale=torch.ones(1, 1), **empty_branch(1, 1)
    )
    assert y.item() == 5 * (6 % 8)


def test_low_rank_branch_and_bias_are_added():
    h, up, bias = (
        torch.tensor([[2.0, -1.0]]),
        torch.tensor([[1.0, 3.0], [0.5, 0.0]]),
        torch.tensor([10.0, 20.0]),
    )
    q, weight = torch.zeros(1, 32, dtype=torch.int8), torch.zeros(2, 32, dtype=torch.int8)
    y = ops.gemm_w4a4_up(q, torch.ones(1, 1), h, weight, torch.ones(1, 2), up, bias)
    assert y.tolist() == [[9.0, 21.0]]


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(case, dtype):
    parameters = make_w4a4(case, dtype)
    smooth, down = parameters.pop("smooth_factor"), parameters.pop("proj_down")
    q, ascales, h = ops.quantize_down(make_input(case, dtype), smooth, down, **options(case))
    exact = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in parameters.items()
    }
    truth = ops.gemm_w4a4_up(
        q, ascales.double(), h.double(), **exact, act_unsigned=case.act_unsigned
    )
    ours = ops.gemm_w4a4_up(
        q, ascales, h, **parameters, act_unsigned=case.act_unsigned, out_dtype=dtype
    )
    assert ours.dtype == dtype
    assert_twice_plain(ours, truth, plain_w4a4(q, ascales, h, parameters, case.act_unsigned, dtype))


def test_no_tokens_give_an_empty_result():
    parameters = make_w4a4(Case("empty", 0, 64, 7, R=2), torch.float32)
    del parameters["smooth_factor"], parameters["proj_down"]
    y = ops.gemm_w4a4_up(
        torch.empty(0, 32, dtype=torch.int8), torch.empty(1, 0), torch.empty(0, 2), **parameters
    )
    assert y.shape == (0, 7)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q": torch.zeros(2, 32)}, "q must be packed int8"),
        (
            {"q": torch.zeros(2, 31, dtype=torch.int8)},
            "K=62 is not a multiple of the group size 64",
        ),
        ({"weight": torch.zeros(3, 64, dtype=torch.int8)}, "holds K=128 columns and x has K=64"),
        ({"ascales": torch.ones(2, 1)}, r"ascales is \(2, 1\) and must be \(K/64, M\) = \(1, 2\)"),
        (
            {"weight_scale": torch.ones(3, 1)},
            r"weight_scale is \(3, 1\) and must be \(K/64, N\) = \(1, 3\)",
        ),
        ({"h": torch.ones(2, 5)}, "h is"),
        ({"bias": torch.ones(4)}, "bias is"),
    ],
)
def test_mistakes_are_named(change, words):
    good = {
        "q": torch.zeros(2, 32, dtype=torch.int8),
        "ascales": torch.ones(1, 2),
        "h": torch.ones(2, 4),
        "weight": torch.zeros(3, 32, dtype=torch.int8),
        "weight_scale": torch.ones(1, 3),
        "proj_up": torch.ones(3, 4),
    }
    with pytest.raises(ValueError, match=words):
        ops.gemm_w4a4_up(**(good | change))
