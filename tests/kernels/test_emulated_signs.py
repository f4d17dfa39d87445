"""Codes that change their sign at a column, and rows of x that lie apart, in the GPU's kernels, run
on the CPU by the emulator. Capability 90 is Hopper's wgmma product.
"""

import pytest
import torch

from cases import Case, make_input, make_w4a4
from compare import assert_same, assert_twice_plain
from nibble.kernels import reference
from nibble.quant.weights.packing import pack_int4, unpack_int4

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    (Case("half", 33, 256, 136, R=16), 128),
    (Case("one_signed_group", 5, 192, 70, R=3), 64),
    (Case("one_unsigned_group", 70, 192, 129, R=0), 128),
]
each_case = pytest.mark.parametrize(("case", "column"), CASES, ids=str)


def mixed_input(case: Case, column: int, dtype: torch.dtype) -> torch.Tensor:
    x = make_input(case)
    x[:, column:] = torch.nn.functional.gelu(x[:, column:])
    return x.to(dtype)


def as_bytes(q: torch.Tensor, column: int) -> torch.Tensor:
    """Packed codes as Hopper's product reads them: (half, t, i) of 32 columns holds column
    8t + 4 half + i.
    """
    sides = unpack_int4(q[:, : column // 2]), unpack_int4(q[:, column // 2 :], signed=False)
    codes = torch.cat(sides, 1).float().to(torch.float8_e4m3fn).view(torch.int8)
    return codes.unflatten(-1, (-1, 4, 2, 4)).transpose(-3, -2).flatten(-4).contiguous()


@each_case
@pytest.mark.parametrize("capability", [75, 80, 120])
@pytest.mark.parametrize(("dtype", "param"), [(BF16, BF16), (F32, F16)], ids=str)
def test_codes_are_the_references(emulated, case, column, capability, dtype, param):
    x, parameters = mixed_input(case, column, dtype), make_w4a4(case, param)
    smooth, down = parameters["smooth_factor"], parameters["proj_down"]
    q, ascales, h = emulated.quantize_down(
        x, smooth, down, unsigned_from=column, capability=capability
    )
    wide = x.float(), smooth.float(), down.float()
    expected = reference.quantize_down(*wide, unsigned_from=column)
    assert_same(q, expected[0])
    torch.testing.assert_close(ascales, expected[1], rtol=2e-7, atol=0)
    torch.testing.assert_close(h, expected[2], rtol=1e-5, atol=1e-5)


@each_case
def test_codes_for_hopper_are_bytes(emulated, case, column):
    x, parameters = mixed_input(case, column, BF16), make_w4a4(case, BF16)
    layer = (x, parameters["smooth_factor"], parameters["proj_down"])
    packed = emulated.quantize_down(*layer, unsigned_from=column, capability=90)
    wide = emulated.quantize_down(*layer, unsigned_from=column, capability=90, form=emulated.E4M3)
    assert_same(wide[0], as_bytes(packed[0], column))
    assert_same(wide[1], packed[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e-30], ids=str)
def test_numbers_that_need_care_on_either_side(emulated, bad):
    case, column = CASES[0]
    x, parameters = mixed_input(case, column, BF16), make_w4a4(case, BF16)
    x[2, 3] = x[3, 200] = bad
    x[4, 64:192] = 1e-30
    layer = (x, parameters["smooth_factor"], parameters["proj_down"])
    q, ascales, _ = emulated.quantize_down(*layer, unsigned_from=column, capability=80)
    expected = reference.quantize_down(*(t.float() for t in layer), unsigned_from=column)
    assert_same(q, expected[0])
    torch.testing.assert_close(ascales, expected[1], rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", [75, 80, 90, 120])
@pytest.mark.parametrize("column", [64, 128])
def test_integers_come_out_exact(emulated, capability, column):
    generator = torch.Generator().manual_seed(5)
    q = torch.randint(-8, 8, (37, 192), generator=generator)
    q[:, column:] = torch.randint(0, 16, (37, 192 - column), generator=generator)
    weight = torch.randint(-8, 8, (135, 192), generator=generator)
    q[0, :column], q[0, column:], weight[0] = -8, 15, -8  # the largest sums there are
    y = emulated.gemm_w4a4_up(
        q=pack_int4(q.to(torch.int8)),
        ascales=torch.ones(3, 37),
        h=torch.zeros(37, 0),
        weight=pack_int4(weight.to(torch.int8)),
        weight_scale=torch.ones(3, 135, dtype=BF16),
        proj_up=torch.zeros(135, 0, dtype=BF16),
        unsigned_from=column,
        capability=capability,
    )
    assert_same(y, (q @ weight.t()).float())


@each_case
@pytest.mark.parametrize("capability", [75, 80, 90, 120])
def test_a_product_is_within_twice_plain_torch(emulated, case, column, capability):
    parameters = make_w4a4(case, BF16)
    smooth, down = parameters.pop("smooth_factor").float(), parameters.pop("proj_down").float()
    x = mixed_input(case, column, F32)
    q, ascales, h = reference.quantize_down(x, smooth, down, unsigned_from=column)
    forms = {emulated.PACKED: q}
    if capability == 90:
        forms[emulated.E4M3] = as_bytes(q, column)
    wide = {n: t.double() if t.is_floating_point() else t for n, t in parameters.items()}
    exact = reference.gemm_w4a4_up(q, ascales.double(), h.double(), **wide, unsigned_from=column)
    plain = reference.gemm_w4a4_up(
        q, ascales, h.to(BF16).float(), **parameters, unsigned_from=column
    )
    for form, codes in forms.items():
        y = emulated.gemm_w4a4_up(
            codes,
            ascales,
            h,
            **parameters,
            unsigned_from=column,
            out_dtype=BF16,
            capability=capability,
            form=form,
        )
        assert_twice_plain(y, exact, plain.to(BF16))


@pytest.mark.parametrize("capability", [75, 80, 120])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_rows_of_x_may_lie_apart(emulated, capability, dtype):
    case = Case("part", 21, 128, 64, R=5)
    wide, parameters = torch.randn(21, 320).to(dtype), make_w4a4(case, BF16)
    part = wide[:, 64:192]
    layer = (parameters["smooth_factor"], parameters["proj_down"])
    apart = emulated.quantize_down(part, *layer, capability=capability)
    dense = emulated.quantize_down(part.contiguous(), *layer, capability=capability)
    for one, other in zip(apart, dense, strict=True):
        assert_same(one, other)
