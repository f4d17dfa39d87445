"""The GPU's quantize_down, run on the CPU: codes and scales have the reference's bits, h is a
float32 product.

The emulator has four multiprocessors, so that few tokens choose among the blocks of 16, 32 and 40
tokens.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases import SMALL, Case, make_input, make_w4a4, options
from compare import assert_same, assert_twice_plain
from nibble.kernels import reference
from nibble.quant.weights.packing import unpack_int4

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
HALVES = FLOATS[:2]
CAPABILITIES = [75, 80, 90, 120]

BLOCKS = [
    Case("blocks_of_16", 21, 320, 1, R=32),
    Case("blocks_of_32", 77, 128, 1, R=24, act_unsigned=True),
    Case("blocks_of_40", 135, 832, 1, R=32),
    Case("ragged_rank", 70, 128, 1, R=37),
    Case("rank_of_96_in_blocks_of_40", 135, 1152, 1, R=96),
    Case("a_second_read_in_blocks_of_32", 77, 1152, 1, R=161, act_unsigned=True),
    Case("rank_zero", 70, 64, 1, R=0),
]


def operands(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, smoothing factors of both signs, proj_down."""
    parameters = make_w4a4(case, parameter_dtype)
    smooth = parameters["smooth_factor"]
    smooth[::9] *= -1
    return make_input(case, dtype), smooth, parameters["proj_down"]


def expected(x: Tensor, smooth: Tensor, down: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and scales in float32, as the reference has them; h exactly."""
    q, ascales, _ = reference.quantize_down(x, smooth, down, **options(case))
    return q, ascales, x.double() @ down.double()


def assert_same_or_nan(actual: Tensor, wanted: Tensor) -> None:
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert_same(
        actual.nan_to_num(0, float("inf"), -float("inf")),
        wanted.nan_to_num(0, float("inf"), -float("inf")),
    )


@pytest.mark.parametrize("case", BLOCKS + SMALL[:-1], ids=str)
@pytest.mark.parametrize("parameter_dtype", HALVES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_codes_and_scales_have_the_references_bits(emulated, case, dtype, parameter_dtype):
    given = operands(case, dtype, parameter_dtype)
    wanted = expected(*given, case)
    plain = given[0].float() @ given[2].float()
    for capability in CAPABILITIES[:2]:
        q, ascales, h = emulated.quantize_down(*given, **options(case), capability=capability)
        assert_same(q, wanted[0])
        assert_same(ascales, wanted[1])
        assert_twice_plain(h, wanted[2], plain)


@pytest.mark.parametrize(
    "case", [replace(case, act_unsigned=False, rotation=64) for case in BLOCKS], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rotated_codes_differ_at_most_where_a_value_is_a_tie(emulated, case, dtype):
    given = operands(case, dtype, torch.bfloat16)
    wanted = expected(*given, case)
    for capability in CAPABILITIES[:2]:
        q, ascales, _ = emulated.quantize_down(*given, **options(case), capability=capability)
        torch.testing.assert_close(ascales, wanted[1], rtol=1e-6, atol=0)
        difference = (unpack_int4(q) - unpack_int4(wanted[0])).abs()
        assert difference.max() <= 1 and (difference != 0).sum() <= 1 + 1e-3 * difference.numel()


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_number_at_all_is_treated_as_the_reference_does(emulated, dtype, unsigned):
    """Random bits: subnormal, huge, infinite, NaN. Also rows of few bits, whose quotients are ties,
    and factors of any size.
    """
    generator = torch.Generator().manual_seed(5)
    integers, digits = (torch.int32, 31) if dtype == torch.float32 else (torch.int16, 15)
    x = (
        torch.randint(-(2**digits), 2**digits, (96, 256), generator=generator)
        .to(integers)
        .view(dtype)
    )
    x[32:64] = torch.randint(-14, 15, (32, 256), generator=generator) * torch.logspace(
        -4, 3, 32, base=2
    )[:, None].to(dtype)
    x[64:] = torch.randn(32, 256, generator=generator) * torch.logspace(-45, 38, 32)[:, None]
    x[3] = 0
    smooth = torch.where(
        torch.rand(256, generator=generator) < 0.5, 1.0, torch.randn(256, generator=generator)
    )
    smooth[70], smooth[140] = 1e-30, -1e30
    down = torch.randn(256, 8, generator=generator).bfloat16()
    for m in (30, 96):  # the last row of a block may lack its neighbours
        given = x[-m:].contiguous(), smooth.bfloat16(), down
        wanted = reference.quantize_down(*given, act_unsigned=unsigned)
        q, ascales, _ = emulated.quantize_down(*given, act_unsigned=unsigned, capability=80)
        assert_same(q, wanted[0])
        assert_same_or_nan(ascales, wanted[1])


def test_quotients_next_to_a_tie_round_as_divisions_do(emulated):
    """Values one unit around (code + 1/2) * scale, for scales of random digits: what a product with
    a reciprocal would get wrong.
    """
    generator = torch.Generator().manual_seed(6)
    top = torch.rand(256, 1, generator=generator) + 0.5
    halves = torch.arange(-6.5, 7, 1).repeat(3)[:42] * (top / 7)
    steps = torch.arange(-1, 2).repeat_interleave(14)
    x = torch.zeros(256, 64)
    x[:, :1] = top
    x[:, 1:43] = (halves.view(torch.int32) + steps.to(torch.int32)).view(torch.float32)
    one = torch.ones(64, dtype=torch.bfloat16), torch.zeros(64, 0, dtype=torch.bfloat16)
    q, ascales, _ = emulated.quantize_down(x, *one, capability=80)
    wanted = reference.quantize_down(x, *one)
    assert_same(ascales, wanted[1])
    assert_same(q, wanted[0])
    near = torch.round(x.double() / ascales.t().double()).to(torch.int8)
    assert (unpack_int4(q) != near).any(), (
        "no value was near enough to a tie to tell a division from an exact quotient"
    )


@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("m", [9, 137])
def test_a_bad_value_spoils_its_own_group_and_the_h_of_its_token(emulated, m, bad, rotation):
    case = Case("bad", m, 192, 1, R=8, rotation=rotation)
    x, *parameters = operands(case, torch.bfloat16, torch.bfloat16)
    clean = emulated.quantize_down(x, *parameters, rotation=rotation, capability=80)
    dirty = x.clone()
    dirty[3, 70] = bad
    q, ascales, h = emulated.quantize_down(dirty, *parameters, rotation=rotation, capability=80)
    others = torch.arange(m) != 3
    assert torch.equal(q[others], clean[0][others]) and torch.equal(h[others], clean[2][others])
    assert torch.equal(ascales[:, others], clean[1][:, others]) and torch.equal(
        ascales[::2, 3], clean[1][::2, 3]
    )
    assert (
        not torch.isfinite(ascales[1, 3])
        and not torch.isfinite(h[3]).any()
        and not q[3, 32:64].any()
    )


@pytest.mark.parametrize("rank", [1, 8, 33, 64, 130])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_rank(emulated, rank, dtype):
    case = Case("rank", 67, 128, 1, R=rank)
    x, smooth, down = operands(case, dtype, torch.bfloat16)
    _, _, exact = expected(x, smooth, down, case)
    for capability in CAPABILITIES[:2] if rank > 8 else CAPABILITIES:
        assert_twice_plain(
            emulated.quantize_down(x, smooth, down, capability=capability)[2],
            exact,
            x.float() @ down.float(),
        )


def test_h_keeps_outliers_and_small_numbers(emulated):
    """No type between x and the product is narrower than both: 1e5 in bfloat16 times a float16
    parameter, and 1e-30.
    """
    x = torch.randn(17, 64)
    x[0], x[1, ::2] = 1e5, 3e38
    x[2] *= 1e-30
    down = torch.randn(64, 8).half()
    for dtype in (torch.bfloat16, torch.float32):
        for capability in (75, 80):
            h = emulated.quantize_down(
                x.to(dtype), torch.ones(64).half(), down, capability=capability
            )[2]
            for row in (0, 2, 5):
                assert_twice_plain(
                    h[row],
                    x[row].to(dtype).double() @ down.double(),
                    x[row].to(dtype).float() @ down.float(),
                )


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("m", [5, 70])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hoppers_codes_are_the_same_numbers_in_its_order(emulated, dtype, m, unsigned):
    case = Case("hopper", m, 128, 1, act_unsigned=unsigned)
    given = operands(case, dtype, torch.bfloat16)
    given[0][2, 5] = float("nan")
    q, ascales, h = emulated.quantize_down(*given, unsigned, capability=90, form=emulated.E4M3)
    wanted = emulated.quantize_down(*given, unsigned, capability=90)
    codes = unpack_int4(wanted[0], not unsigned).view(m, 4, 4, 2, 4).transpose(2, 3).reshape(m, 128)
    assert torch.equal(q.view(torch.float8_e4m3fn).float(), codes.float())
    assert_same_or_nan(ascales, wanted[1])
    assert_same_or_nan(h, wanted[2])
    with pytest.raises(emulated.Failed, match="9.0 only"):
        emulated.quantize_down(*given, unsigned, capability=80, form=emulated.E4M3)


def test_the_order_of_warps_does_not_matter(emulated):
    case = Case("order", 135, 1280, 1, R=40)
    given = operands(case, torch.bfloat16, torch.bfloat16)
    results = []
    for seed in range(4):
        emulated.seed(seed)
        results.append(emulated.quantize_down(*given, capability=80))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_to_do(emulated):
    one = torch.ones(64, dtype=torch.bfloat16), torch.ones(64, 4, dtype=torch.bfloat16)
    assert [t.numel() for t in emulated.quantize_down(torch.zeros(0, 64), *one, capability=80)] == [
        0,
        0,
        0,
    ]
    empty = torch.zeros(0, dtype=torch.bfloat16), torch.zeros(0, 4, dtype=torch.bfloat16)
    assert_same(
        emulated.quantize_down(torch.zeros(3, 0), *empty, capability=80)[2], torch.zeros(3, 4)
    )
    with pytest.raises(emulated.Failed, match="bfloat16 or float16"):
        emulated.quantize_down(torch.zeros(3, 64), torch.ones(64), torch.ones(64, 4), capability=80)
