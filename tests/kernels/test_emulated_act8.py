"""Activations of 8 bits in the GPU's kernels, run on the CPU by the emulator: codes and scales have
the reference's bits, sums are exact, and the product's error is that of one rounding a group.

Capability 75 is Turing's int8 product, 80 that of all later GPUs, 90 and 120 what Hopper and
Blackwell run.
"""

import itertools

import pytest
import torch

from cases import SMALL, Case, make_input, make_w4a4, options
from compare import assert_same, assert_twice_plain
from nibble.kernels import reference
from nibble.quant.weights.packing import pack_int4
from nibble.quant.weights.packing import unpack_int4 as unpacked

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
INT8 = 2
GPUS = [75, 80, 90, 120]
QUANTIZED = [
    Case("blocks_of_16", 21, 320, 1, R=32),
    Case("blocks_of_32", 77, 128, 1, R=24, act_unsigned=True),
    Case("blocks_of_40", 135, 832, 1, R=32),
    Case("rank_of_96", 135, 1152, 1, R=96),
    Case("rank_zero_rotated", 70, 64, 1, R=0, rotation=64),
]
PRODUCTS = [
    Case("three_groups", 33, 192, 136, R=16),
    Case("odd_columns", 5, 192, 129, R=1),
    Case("unsigned_odd", 34, 128, 131, R=3, act_unsigned=True),
    Case("tall_tile", 200, 192, 513, R=32),
]


def quantized(case: Case, x, parameters, **more):
    layer = (x, parameters["smooth_factor"].float(), parameters["proj_down"].float())
    return reference.quantize_down(*layer, **options(case), act_bits=8, **more)


@pytest.mark.parametrize("case", QUANTIZED + SMALL[:-1], ids=str)
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(("dtype", "param"), [(BF16, BF16), (F16, F16), (F32, BF16)], ids=str)
def test_codes_are_the_references(emulated, case, capability, dtype, param):
    x, parameters = make_input(case, dtype), make_w4a4(case, param)
    parameters["smooth_factor"][::9] *= -1
    layer = (x, parameters["smooth_factor"], parameters["proj_down"])
    q, ascales, h = emulated.quantize_down(
        *layer, **options(case), capability=capability, form=INT8
    )
    expected = quantized(case, x.float(), parameters)
    if case.rotation:  # sums in another order: a value between two codes may go either way
        steps = (q.int() - expected[0].int()).abs()
        assert steps.max() <= 1 and steps.count_nonzero() <= 1 + steps.numel() / 1000
    else:
        assert_same(q, expected[0])
    rounding = 1e-6 if case.rotation else 2e-7
    torch.testing.assert_close(ascales, expected[1], rtol=rounding, atol=0)
    torch.testing.assert_close(h, expected[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e-30], ids=str)
def test_numbers_that_need_care(emulated, bad):
    case, column = Case("half", 33, 256, 136, R=16), 128
    x, parameters = make_input(case, BF16), make_w4a4(case, BF16)
    x[2, 3] = x[3, 200] = bad
    x[4, 64:192] = 1e-30
    layer = (x, parameters["smooth_factor"], parameters["proj_down"])
    q, ascales, _ = emulated.quantize_down(*layer, unsigned_from=column, capability=80, form=INT8)
    expected = quantized(case, x.float(), parameters, unsigned_from=column)
    assert_same(q, expected[0])
    torch.testing.assert_close(ascales, expected[1], rtol=2e-7, atol=0, equal_nan=True)


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize("tokens", [5, 37, 200])
def test_integers_come_out_exact(emulated, capability, tokens):
    generator = torch.Generator().manual_seed(5)
    q = torch.randint(-127, 128, (tokens, 192), generator=generator)
    weight = torch.randint(-8, 8, (600, 192), generator=generator)
    q[0], weight[0] = -127, -8  # the largest sum there is
    y = emulated.gemm_w4a4_up(
        q.to(torch.int8),
        torch.ones(3, tokens),
        torch.zeros(tokens, 0),
        pack_int4(weight.to(torch.int8)),
        torch.ones(3, 600, dtype=BF16),
        torch.zeros(600, 0, dtype=BF16),
        capability=capability,
        form=INT8,
    )
    assert_same(y, (q @ weight.t()).float())


@pytest.mark.parametrize("case", PRODUCTS + SMALL, ids=str)
@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(("dtype", "out"), [(BF16, BF16), (F16, F16), (BF16, F32)], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(emulated, case, capability, dtype, out):
    parameters = make_w4a4(case, dtype)
    parameters["weight_scale"][:, ::3] *= -1
    q, ascales, h = quantized(case, make_input(case), parameters)
    parameters = {k: v for k, v in parameters.items() if k not in ("smooth_factor", "proj_down")}
    ours = emulated.gemm_w4a4_up(
        q,
        ascales,
        h,
        **parameters,
        act_unsigned=case.act_unsigned,
        out_dtype=out,
        capability=capability,
        form=INT8,
    )
    exact = product(q, ascales, h, parameters, torch.float64)
    assert_twice_plain(ours, exact, product(q, ascales, h, parameters, out))


def product(q, ascales, h, parameters, dtype):
    """Of given codes, in plain torch with all operands in `dtype`."""
    act = q.double().unflatten(-1, (-1, 64)) * ascales.double().t()[..., None]
    weight = unpacked(parameters["weight"]).double().unflatten(-1, (-1, 64))
    weight = weight * parameters["weight_scale"].double().t()[..., None]
    bias = parameters["bias"]
    y = act.flatten(-2).to(dtype) @ weight.flatten(-2).to(dtype).t()
    y = y + h.to(dtype) @ parameters["proj_up"].to(dtype).t()
    return y if bias is None else y + bias.to(dtype)


MIXES = list(itertools.product((0, INT8), (0, INT8)))[1:]


@pytest.mark.parametrize("capability", GPUS)
@pytest.mark.parametrize(("form", "form2"), MIXES, ids=str)
@pytest.mark.parametrize(("unsigned2", "rotation2"), [(True, 0), (False, 64)], ids=str)
def test_gelu_and_quantization_of_the_product(  # noqa: PLR0913 - a grid
    emulated, capability, form, form2, unsigned2, rotation2
):
    case = Case("first", 70, 128, 192, R=16)
    parameters, bits, bits2 = make_w4a4(case, BF16), 8 if form else 4, 8 if form2 else 4
    smooth, down = parameters.pop("smooth_factor").float(), parameters.pop("proj_down").float()
    act = reference.quantize_down(make_input(case), smooth, down, act_bits=bits)
    generator = torch.Generator().manual_seed(2)
    second = torch.rand(192, generator=generator) + 0.5, torch.randn(192, 40, generator=generator)
    second = tuple(part.to(BF16) for part in second)
    flags = (unsigned2, rotation2)
    where = {"capability": capability, "form": form, "form2": form2}
    q2, ascales2, h2 = emulated.gemm_w4a4_up_gelu_quantize_down(
        *act, *parameters.values(), False, *second, *flags, BF16, **where
    )
    where = {"capability": capability, "form": form}
    y = emulated.gemm_w4a4_up(*act, *parameters.values(), out_dtype=BF16, **where)
    hidden = torch.nn.functional.gelu(y.double(), approximate="tanh")
    wide = tuple(part.double() for part in second)
    expected = reference.quantize_down(hidden, *wide, *flags, act_bits=bits2)
    signed = not unsigned2
    codes = (q2, expected[0]) if form2 else (unpacked(part, signed) for part in (q2, expected[0]))
    ours, theirs = (part.int() for part in codes)
    steps = (ours - theirs).abs()
    # A value halfway between two codes, to the last bits, may go either way.
    assert steps.max() <= 1 and steps.count_nonzero() <= steps.numel() / 500
    torch.testing.assert_close(ascales2.double(), expected[1], rtol=2e-6, atol=0)
    assert_twice_plain(h2, expected[2], hidden.to(BF16) @ second[1])
