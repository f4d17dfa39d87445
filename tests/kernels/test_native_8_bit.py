"""Activations of 8 bits in the compiled CPU ops, and `linear_w4a8`, against the reference, for each
instruction set that this processor has.
"""

import pytest
import torch

import flat_native
from cases import SMALL, Case, make_input, make_w4a4, make_w4a8, options
from compare import assert_same, assert_twice_plain, relative_error
from flat_native import double
from nibble.kernels import hadamard64, ops, reference
from nibble.kernels.backends import native, native_w4a4
from nibble.kernels.params import Activations, GeluArguments, ProductParams, QuantizeParams
from nibble.kernels.reference import w4a8
from nibble.quant.weights.packing import pack_int4

module, reason = native.module()
pytestmark = pytest.mark.skipif(module is None, reason=f"{reason}: pip install ./kernels")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    *SMALL,
    Case("several_tiles", 70, 704, 200, R=33),
    Case("more_tokens_than_a_chunk", 1030, 64, 40, R=3),
    Case("rank_96", 5, 128, 37, R=96),
    Case("rank_32", 300, 576, 100, R=32),
]
PRODUCT = ("weight", "weight_scale", "proj_up", "bias")


@pytest.fixture(params=module.cpu_isas() if module else ["portable"])
def isa(request) -> int:
    """Every instruction set of this processor; sanitize/ runs AVX-512 on those that lack it."""
    return native.ISAS[request.param]


# ---- activations of 8 bits through the W4A4 ops --------------------------------------------------


def quantizer(p: dict, act_unsigned=False, rotation=0, unsigned_from=0) -> QuantizeParams:
    signs = act_unsigned, rotation, unsigned_from
    return QuantizeParams(p["smooth_factor"], p["proj_down"], *signs, act_bits=8)


def product(dtype, act, p: dict, isa: int, signs=(False, 0)):
    operands = ProductParams(*(p[name] for name in PRODUCT))
    return native_w4a4.gemm_w4a4_up(dtype, Activations(*act, *signs, 8), operands, dtype, isa)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_equal_the_reference_and_the_product_is_as_exact_as_plain_torch(case, dtype, isa):
    x, p = make_input(case, dtype), make_w4a4(case, dtype)
    how = quantizer(p, **options(case))
    act = native_w4a4.quantize_down(dtype, x, how, isa)
    expected = reference.quantize_down(x, *how)
    if case.rotation:  # butterflies round otherwise than a matrix product
        assert (act[0].int() - expected[0].int()).abs().max() <= 1
        assert relative_error(act[1], expected[1]) < 1e-6
    else:
        assert_same(act[0], expected[0])
        assert_same(act[1], expected[1])
    q, ascales, h = act
    operands = {name: p[name] for name in PRODUCT}
    truth = reference.gemm_w4a4_up(q, ascales.double(), h.double(), **double(operands), act_bits=8)
    plain = reference.gemm_w4a4_up(q, ascales, h, **operands, act_bits=8).to(dtype)
    ours = product(dtype, act, p, isa, (case.act_unsigned, 0))
    assert ours.dtype == dtype
    assert_twice_plain(ours, truth, plain)


def test_columns_that_follow_a_gelu_get_their_shift_alone(isa):
    case = Case("half", 9, 192, 64)
    x, p = make_input(case), make_w4a4(case, torch.float32)
    how = quantizer(p, unsigned_from=64)
    act, expected = (
        native_w4a4.quantize_down(torch.float32, x, how, isa),
        reference.quantize_down(x, *how),
    )
    assert_same(act[0], expected[0])
    assert_same(act[1], expected[1])
    with_signs = product(torch.float32, act, p, isa, (False, 64))
    assert_same(with_signs, product(torch.float32, act, p, isa))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("size", [1.0, 1e-39, 1e37])
def test_awkward_values_quantize_like_the_reference(bad, size, isa):
    x = torch.randn(9, 192, generator=torch.Generator().manual_seed(3)) * size
    x[2, 70], x[4] = bad, 0
    how = QuantizeParams(torch.ones(192), torch.ones(192, 1), act_bits=8)
    ours, theirs = (
        native_w4a4.quantize_down(torch.float32, x, how, isa),
        reference.quantize_down(x, *how),
    )
    assert_same(ours[0], theirs[0])
    assert_same(ours[1].nan_to_num(), theirs[1].nan_to_num())


@pytest.mark.parametrize(("code", "weight"), [(127, -8), (-127, -8), (127, 7), (-127, 7)])
@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 12])
def test_the_largest_sums_are_exact(code, weight, tokens, isa):
    n, groups = 35, 9
    p = {
        "weight": pack_int4(torch.full((n, groups * 64), weight, dtype=torch.int8)),
        "weight_scale": torch.ones(groups, n),
        "proj_up": torch.zeros(n, 0),
        "bias": None,
    }
    q = torch.full((tokens, groups * 64), code, dtype=torch.int8)
    act = q, torch.ones(groups, tokens), torch.zeros(tokens, 0)
    y = product(torch.float32, act, p, isa)
    assert torch.equal(y, torch.full((tokens, n), float(64 * groups * code * weight)))


def test_every_code_lands_in_its_place(isa):
    """A token per column: row k of the product is column k of the weights."""
    k, n = 128, 40
    weight = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    p = {
        "weight": pack_int4(weight),
        "weight_scale": torch.ones(k // 64, n),
        "proj_up": torch.zeros(n, 0),
        "bias": None,
    }
    act = torch.eye(k, dtype=torch.int8) * -127, torch.ones(k // 64, k), torch.zeros(k, 0)
    assert torch.equal(product(torch.float32, act, p, isa), weight.t() * -127.0)


@pytest.mark.parametrize("widths", [(8, 8), (8, 4), (4, 8)])
def test_the_fused_mlp_follows_its_reference(widths, isa):
    case, after = Case("first", 133, 192, 128, R=9), Case("second", 133, 128, 64, R=5)
    p, p2 = make_w4a4(case, torch.bfloat16), make_w4a4(after, torch.bfloat16, seed=7)
    how = quantizer(p)._replace(act_bits=widths[0])
    act = native_w4a4.quantize_down(torch.bfloat16, make_input(case, torch.bfloat16), how, isa)
    second = (p2["smooth_factor"], p2["proj_down"])
    mid = torch.float32
    a = GeluArguments(*act, *(p[name] for name in PRODUCT), *second, False, False, 0, mid, *widths)
    ours = native_w4a4.gemm_w4a4_up_gelu_quantize_down(torch.bfloat16, a, isa)
    theirs = reference.gemm_w4a4_up_gelu_quantize_down(*a)
    codes = [
        parts[0].int() if widths[1] == 8 else reference.unpack_nibbles(parts[0], True, torch.int32)
        for parts in (ours, theirs)
    ]
    assert (codes[0] != codes[1]).float().mean() < 0.002 and (codes[0] - codes[1]).abs().max() <= 1
    assert relative_error(ours[1], theirs[1]) < 1e-6 and relative_error(ours[2], theirs[2]) < 1e-6


# ---- W4A8 ----------------------------------------------------------------------------------------


def w4a8_layer(case: Case, dtype: torch.dtype, group: int) -> dict:
    return make_w4a8(case, dtype, group) | {"rotation": case.rotation}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("group", [16, 32, 64])
def test_w4a8_is_as_exact_as_plain_torch(case, group, dtype, isa):
    x, p = make_input(case, dtype), w4a8_layer(case, dtype, group)
    ours = flat_native.linear_w4a8(dtype, x, p, isa)
    plain = w4a8.linear_w4a8(x, **p)
    assert ours.dtype == dtype
    if case.rotation:  # a value on the border of two codes may take either
        assert relative_error(ours, plain) < 2e-3 + torch.finfo(dtype).eps
        return
    codes, ascale = w4a8.quantize_tokens(w4a8.smoothed(x.float(), p["smooth_factor"].float(), 0))
    wide = double(p)
    dense = w4a8.decode_w4a8(p["weight"], p["weight_scale"], p["weight_table"])
    truth = codes.double() @ dense.double().T * ascale.double() * wide["weight_channel_scale"]
    if case.R:
        truth += x.double() @ wide["proj_down"] @ wide["proj_up"].T
    if case.bias:
        truth += wide["bias"]
    assert_twice_plain(ours, truth, plain)


@pytest.mark.parametrize("group", [16, 32, 64])
def test_every_weight_lands_in_its_place_and_is_its_formula(group, isa):
    """A token per column, and no rounding: bit for bit."""
    case = Case("places", 320, 320, 37, R=0, bias=False)
    p = w4a8_layer(case, torch.float32, group)
    p |= {"smooth_factor": torch.ones(320), "weight_channel_scale": torch.ones(37)}
    y = flat_native.linear_w4a8(torch.float32, torch.eye(320) * 127, p, isa)
    dense = w4a8.decode_w4a8(p["weight"], p["weight_scale"], p["weight_table"])
    assert torch.equal(y, dense.T * 127.0)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_whole_numbers_are_exact(sign, isa):
    tokens, k, n = 9, 960, 33
    p = {
        "weight": pack_int4(torch.full((n, k), 15)),
        "weight_scale": torch.full((k // 16, n), 127 * sign, dtype=torch.int8),
        "weight_channel_scale": torch.ones(n),
        "weight_table": torch.full((16,), 127, dtype=torch.int8),
        "smooth_factor": torch.ones(k),
    }
    y = flat_native.linear_w4a8(torch.float32, torch.full((tokens, k), 127.0), p, isa)
    assert torch.equal(y, torch.full((tokens, n), 127.0 * 126 * k * sign))


def test_the_reference_sums_whole_numbers_alike(isa):
    """With K so small that float32 sums are exact: bit for bit, but for one rounding."""
    case = Case("exact", 40, 64, 70, R=0, bias=False)
    x, p = make_input(case), w4a8_layer(case, torch.float32, 16)
    p["weight_channel_scale"] = torch.ones(70)
    assert_same(flat_native.linear_w4a8(torch.float32, x, p, isa), w4a8.linear_w4a8(x, **p))


def test_what_is_not_finite_stays_in_its_token(isa):
    case = Case("bad", 6, 128, 40, R=4)
    x, p = make_input(case), w4a8_layer(case, torch.float32, 32)
    clean = flat_native.linear_w4a8(torch.float32, x, p, isa)
    x[2, 70], x[4, 1], x[5] = float("nan"), float("inf"), 0
    y, wanted = flat_native.linear_w4a8(torch.float32, x, p, isa), w4a8.linear_w4a8(x, **p)
    assert not y[[2, 4]].isfinite().any() and not wanted[[2, 4]].isfinite().any()
    assert_same(y[[0, 1, 3]], clean[[0, 1, 3]])
    torch.testing.assert_close(y[5], wanted[5])


@pytest.mark.parametrize("case", [Case("company", 300, 320, 70, R=20)], ids=str)
def test_neither_threads_nor_company_change_a_bit(case, isa, monkeypatch):
    x, p = make_input(case), w4a8_layer(case, torch.float32, 32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    together = flat_native.linear_w4a8(torch.float32, x, p, isa)
    for count in (2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert_same(flat_native.linear_w4a8(torch.float32, x, p, isa), together)
    for rows in (slice(0, 1), slice(5, 12), slice(299, 300)):
        assert_same(flat_native.linear_w4a8(torch.float32, x[rows], p, isa), together[rows])


def test_rows_of_x_may_lie_apart_and_parameters_differ(isa):
    case = Case("apart", 8, 128, 48)
    wide, p = torch.randn(8, 256), w4a8_layer(case, torch.bfloat16, 32)
    p["bias"] = p["bias"].double()
    x = wide[:, 128:]
    y = flat_native.linear_w4a8(torch.float32, x, p, isa)
    assert_same(y, flat_native.linear_w4a8(torch.float32, x.contiguous(), p, isa))
    assert flat_native.linear_w4a8(torch.float32, wide[:0, 128:], p, isa).shape == (0, 48)


def test_a_rotated_layer_is_its_16_bit_self(isa):
    case = Case("rotated", 20, 192, 50, rotation=64)
    x, p = make_input(case), w4a8_layer(case, torch.float32, 32)
    wide = double(p)
    dense = w4a8.decode_w4a8(p["weight"], p["weight_scale"], p["weight_table"]).double()
    dense *= wide["weight_channel_scale"][:, None]
    wanted = hadamard64(x.double() / wide["smooth_factor"]) @ dense.T
    wanted += x.double() @ wide["proj_down"] @ wide["proj_up"].T + wide["bias"]
    assert relative_error(flat_native.linear_w4a8(torch.float32, x, p, isa), wanted) < 0.02


def test_w4a8_is_traced_and_checked_as_every_op():
    case = Case("traced", 5, 128, 40)
    x, p = make_input(case), make_w4a8(case, torch.float32)

    def layer(x):
        return ops.linear_w4a8(x, **p)

    assert_same(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    torch.library.opcheck(torch.ops.nibble.linear_w4a8.default, (x, *p.values()))
