"""quantize_down: codes, scales and h, in the reference and through the op."""

import pytest
import torch

from cases import SMALL, make_input, make_w4a4, options
from compare import assert_same, assert_sqnr, assert_twice_plain
from nibble.kernels import SHIFT, hadamard64, ops, reference
from nibble.quant.weights.packing import pack_int4, unpack_int4

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def plain(m, k, r=2, dtype=torch.float32):
    """No smoothing, any low-rank branch."""
    return torch.ones(k, dtype=dtype), torch.randn(k, r, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_on_the_grid_come_back_exactly(dtype):
    codes = torch.randint(-7, 8, (5, 128), dtype=torch.int8)
    codes[:, ::64] = 7
    step = torch.tensor([0.5, 0.25, 2.0, 1.0, 8.0]).to(dtype)[:, None]
    q, ascales, _ = ops.quantize_down(codes.to(dtype) * step, *plain(5, 128))
    assert_same(q, pack_int4(codes))
    assert torch.equal(ascales, step.to(ascales.dtype).t().expand(2, 5))


def test_halves_round_to_even():
    x = torch.tensor([7.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, -3.5, 6.5] + [0.0] * 54)[None]
    q, ascales, _ = ops.quantize_down(x, *plain(1, 64))
    assert ascales.item() == 1
    assert unpack_int4(q)[0, :10].tolist() == [7, 0, 2, 2, 4, 0, -2, -2, -4, 6]


def test_signed_codes_never_reach_minus_eight():
    x = torch.randn(64, 256) * torch.logspace(-30, 30, 64)[:, None]
    codes = unpack_int4(ops.quantize_down(x, *plain(64, 256))[0])
    assert codes.min() == -7 and codes.max() == 7


def test_unsigned_codes_cover_zero_to_fifteen():
    x = torch.arange(64.0)[None] % 16 - SHIFT
    q, ascales, _ = ops.quantize_down(x, *plain(1, 64), act_unsigned=True)
    assert ascales.item() == 1
    assert_same(unpack_int4(q, signed=False), (torch.arange(64) % 16).to(torch.int8)[None])


def test_unsigned_groups_below_the_shift_become_zero():
    q, ascales, _ = ops.quantize_down(torch.full((2, 64), -3.0), *plain(2, 64), act_unsigned=True)
    assert not q.any() and not ascales.any()


def test_zero_rows_have_zero_scale_and_zero_codes():
    x = torch.randn(4, 128)
    x[1] = 0
    x[2, 64:] = 0
    q, ascales, h = ops.quantize_down(x, *plain(4, 128))
    assert not q[1].any() and not ascales[:, 1].any() and not h[1].any()
    assert not q[2, 32:].any() and ascales[1, 2] == 0 and ascales[0, 2] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("unsigned", [False, True])
def test_a_bad_value_spoils_its_own_token_and_no_other(bad, unsigned):
    clean = torch.randn(6, 128)
    dirty = clean.clone()
    dirty[2, 70] = bad
    parameters = plain(6, 128)
    q, ascales, h = ops.quantize_down(dirty, *parameters, act_unsigned=unsigned)
    expected = ops.quantize_down(clean, *parameters, act_unsigned=unsigned)
    others = torch.arange(6) != 2
    assert torch.equal(q[others], expected[0][others])
    assert torch.equal(ascales[:, others], expected[1][:, others])
    assert torch.equal(h[others], expected[2][others])
    assert not torch.isfinite(h[2]).any()
    assert torch.equal(ascales[0], expected[1][0])


def test_the_low_rank_branch_sees_raw_x():
    x, down = torch.randn(3, 64), torch.randn(64, 5)
    smooth = torch.rand(64) + 0.5
    for kwargs in ({"act_unsigned": True}, {"rotation": 64}, {}):
        torch.testing.assert_close(ops.quantize_down(x, smooth, down, **kwargs)[2], x @ down)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dequantized_activations_are_near_the_smoothed_input(case, dtype):
    x, parameters = make_input(case, dtype), make_w4a4(case, torch.float32)
    smooth, down = parameters["smooth_factor"], parameters["proj_down"]
    q, ascales, h = ops.quantize_down(x, smooth, down, **options(case))
    assert (
        q.shape == (case.M, case.K // 2)
        and ascales.shape == (case.K // 64, case.M)
        and h.shape == (case.M, case.R)
    )
    codes = unpack_int4(q, not case.act_unsigned).double().unflatten(-1, (-1, 64))
    back = (codes * ascales.double().t()[..., None]).flatten(-2)
    target = (x.double() + SHIFT * case.act_unsigned) / smooth.double()
    assert_sqnr(back, hadamard64(target) if case.rotation else target, case.db)
    if case.R:
        assert_twice_plain(h, x.double() @ down.double(), x.float() @ down)


def test_float64_input_is_computed_in_float64():
    q, ascales, h = ops.quantize_down(
        torch.randn(2, 64, dtype=torch.float64), *plain(2, 64, dtype=torch.bfloat16)
    )
    assert ascales.dtype == h.dtype == torch.float64 and q.dtype == torch.int8


def test_strided_input_gives_the_same_bits():
    x = torch.randn(64, 9).t()
    parameters = plain(9, 64)
    for actual, expected in zip(
        ops.quantize_down(x, *parameters),
        ops.quantize_down(x.contiguous(), *parameters),
        strict=True,
    ):
        assert torch.equal(actual, expected)


def test_no_tokens_give_empty_results():
    q, ascales, h = ops.quantize_down(torch.empty(0, 128), *plain(0, 128))
    assert q.shape == (0, 64) and ascales.shape == (2, 0) and h.shape == (0, 2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_hadamard_transform_is_orthonormal_and_its_own_inverse(dtype):
    x = torch.randn(3, 192).to(dtype)
    back = hadamard64(hadamard64(x))
    assert back.dtype == dtype
    torch.testing.assert_close(back, x, rtol=0, atol=40 * torch.finfo(dtype).eps)
    assert_sqnr(hadamard64(x).double().norm(dim=-1), x.double().norm(dim=-1), 45)


def test_the_hadamard_transform_is_in_sylvester_order():
    matrix = torch.ones(1, 1)
    for _ in range(6):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    assert torch.equal(hadamard64(torch.eye(64)), matrix / 8)
    assert torch.equal(
        hadamard64(torch.full((1, 128), 3.0))[0].nonzero().flatten(), torch.tensor([0, 64])
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(2, 100)}, "K=100 is not a multiple of the group size 64"),
        ({"x": torch.randn(2, 2, 64)}, "takes x"),
        ({"x": torch.ones(2, 64, dtype=torch.int8)}, "floating-point"),
        ({"smooth_factor": torch.ones(128)}, "smooth_factor"),
        ({"proj_down": torch.ones(128, 4)}, "proj_down"),
        ({"rotation": 32}, "rotation=32"),
        ({"rotation": 64, "act_unsigned": True}, "exclude one another"),
    ],
)
def test_mistakes_are_named(change, words):
    good = {
        "x": torch.randn(2, 64),
        "smooth_factor": torch.ones(64),
        "proj_down": torch.ones(64, 4),
    }
    with pytest.raises(ValueError, match=words):
        ops.quantize_down(**(good | change))


def test_the_reference_refuses_rotated_unsigned_codes_too():
    with pytest.raises(ValueError, match="exclude one another"):
        reference.quantize_down(torch.randn(1, 64), *plain(1, 64), act_unsigned=True, rotation=64)
