"""Weights that are read as int8 in the GPU's kernels, run on the CPU by the emulator: codes and
scales have the reference's bits, sums are whole numbers.

Capability 75 is Turing's int8 product, 80 that of all later GPUs, 90 and 120 what Hopper and
Blackwell run.
"""

import pytest
import torch

from cases import Case, make_input, make_w4a8
from compare import assert_same, assert_twice_plain, relative_error
from emulator.emulated_w4a8 import linear_w4a8
from nibble.kernels.params import W4A8Params
from nibble.kernels.reference import w4a8 as reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
GPUS = [75, 80, 90, 120]
CASES = [
    Case("few_tokens", 5, 192, 136, R=16),
    Case("odd_columns", 34, 128, 129, R=1),
    Case("tall_tile", 200, 192, 513, R=32),
    Case("no_rank", 70, 320, 144, R=0, bias=False),
    Case("rank_40", 33, 832, 48, R=40),
]


def layer(case: Case, dtype: torch.dtype, group: int = 32) -> W4A8Params:
    return W4A8Params(**make_w4a8(case, dtype, group), rotation=case.rotation)


def wanted_codes(x, p):
    smoothed = reference.smoothed(x.float(), p.smooth_factor.float(), p.rotation)
    codes, scale = reference.quantize_tokens(smoothed)
    return codes.nan_to_num(0).to(torch.int8), scale[:, 0]


def check_product(y, x, p):
    doubles = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in p]
    exact = reference.linear_w4a8(x.double(), *doubles)
    assert_twice_plain(y, exact, reference.linear_w4a8(x, *p))


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(("dtype", "param"), [(BF16, BF16), (F16, F16), (F32, BF16)], ids=str)
def test_a_linear_is_the_references(emulated, case, capability, dtype, param):
    x, p = make_input(case, dtype), layer(case, param)
    p.smooth_factor[::9] *= -1
    y, codes, scales, h = linear_w4a8(x, p, capability)
    expected = wanted_codes(x, p)
    assert_same(codes, expected[0])
    assert_same(scales, expected[1])
    if case.R:
        assert relative_error(h, x.double() @ p.proj_down.double()) < 1e-6
    check_product(y, x, p)


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("capability", [75, 80])
def test_weights_are_the_references(emulated, group, capability):
    """x picks columns: each output is a weight times 127 / 127."""
    case = Case("columns", 128, 128, 144, R=0, bias=False)
    p = layer(case, BF16, group)
    p = p._replace(smooth_factor=torch.ones(128, dtype=BF16), weight_channel_scale=torch.ones(144))
    y = linear_w4a8(torch.eye(128) * 127, p, capability)[0]
    whole = reference.decode_w4a8(p.weight, p.weight_scale, p.weight_table)
    assert_same(y, whole.t().float() * 127)


@pytest.mark.parametrize("capability", [75, 120])
def test_rotated_codes(emulated, capability):
    case = Case("rotated", 45, 256, 80, R=8, rotation=64)
    x, p = make_input(case, BF16), layer(case, BF16, 64)
    y, codes, scales, _ = linear_w4a8(x, p, capability)
    expected = wanted_codes(x, p)
    # sums in another order: a value between two codes may go either way
    steps = (codes.int() - expected[0].int()).abs()
    assert steps.max() <= 1 and steps.count_nonzero() <= 1 + steps.numel() / 1000
    torch.testing.assert_close(scales, expected[1], rtol=1e-6, atol=0)
    assert relative_error(y, reference.linear_w4a8(x, *p)) < 4e-3


@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e-30, 1e30], ids=str)
def test_numbers_that_need_care_stay_in_their_token(emulated, bad, rotation):
    case = Case("care", 37, 256, 48, R=8, rotation=rotation)
    x, p = make_input(case, BF16), layer(case, BF16)
    clean = linear_w4a8(x, p, 80)
    x[3, 200] = bad
    x[4] = 1e-30
    x[5] = 0
    found, expected = linear_w4a8(x, p, 80), wanted_codes(x, p)
    rest = [row for row in range(37) if row not in (3, 4, 5)]
    for ours, theirs in zip(found, clean, strict=True):
        assert_same(ours[rest], theirs[rest])
    torch.testing.assert_close(found[2], expected[1], rtol=1e-6, atol=0, equal_nan=True)
    if not rotation:
        assert_same(found[1], expected[0])
    assert not found[1][5].any() and (bad == bad or found[0][3].isnan().all())


def test_rows_of_x_may_lie_apart(emulated):
    case = Case("apart", 40, 128, 64, R=16)
    wide, p = make_input(Case("", 40, 192, 1), BF16), layer(case, BF16)
    apart, dense = linear_w4a8(wide[:, :128], p, 80), linear_w4a8(wide[:, :128].clone(), p, 80)
    for ours, theirs in zip(apart, dense, strict=True):
        assert_same(ours, theirs)


def test_an_order_of_warps_changes_nothing(emulated):
    case = CASES[2]
    x, p = make_input(case, BF16), layer(case, BF16)
    first = linear_w4a8(x, p, 80)
    emulated.seed(7)
    for ours, theirs in zip(linear_w4a8(x, p, 80), first, strict=True):
        assert_same(ours, theirs)
