"""The compiled CPU ops against the reference, for each instruction set that this processor has.

Codes and scales equal the reference's bit for bit where nothing is rotated; everything else is held
to float64, and to itself: neither the number of threads nor a token's company changes a bit.
"""

import pytest
import torch

import flat_native
from cases import SMALL, Case, make_input, make_w4a4, make_w4a16, options, plain_w4a4
from compare import assert_same, assert_twice_plain, relative_error
from flat_native import dense_w4a16, double, product, quantized
from nibble.kernels import SHIFT, reference
from nibble.kernels.backends import native
from nibble.quant.weights.packing import pack_int4, unpack_int4

module, reason = native.module()
pytestmark = pytest.mark.skipif(module is None, reason=f"{reason}: pip install ./kernels")

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
RANKS = [1, 3, 16, 31, 32, 64, 160, 512]
CASES = [
    *SMALL,
    Case("several_tiles", 70, 704, 200, R=33),
    Case("more_tokens_than_a_chunk", 1030, 64, 40, R=3),
    *[Case(f"rank_{rank}", 5, 128, 37, R=rank) for rank in RANKS],
]


@pytest.fixture(params=module.cpu_isas() if module else ["portable"])
def isa(request) -> int:
    """Every instruction set of this processor; sanitize/test_fuzz.py runs AVX-512 on those that
    lack it.
    """
    return native.ISAS[request.param]


# ---- quantize_down -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_codes_and_scales_equal_the_reference(case, dtype, isa):
    x, parameters = make_input(case, dtype), make_w4a4(case, dtype)
    smooth, down = parameters["smooth_factor"], parameters["proj_down"]
    q, ascales, h = flat_native.quantize_down(dtype, x, smooth, down, **options(case), isa=isa)
    expected = reference.quantize_down(x, smooth, down, **options(case))
    # butterflies and a matrix product round differently: a value on the border of two codes may
    # take either
    if case.rotation:
        assert (unpack_int4(q) - unpack_int4(expected[0])).abs().max() <= 1
        assert relative_error(ascales, expected[1]) < 1e-6
    else:
        assert_same(q, expected[0])
        assert_same(ascales, expected[1])
    if case.R:
        assert_twice_plain(h, x.double() @ down.double(), x.float() @ down.float())


AWKWARD = {
    "outliers": lambda x: x * torch.where(torch.arange(x.shape[1]) % 37 == 0, 1e4, 1.0),
    "zeros": lambda x: x * 0,
    "one_value": lambda x: torch.zeros_like(x).index_fill_(1, torch.tensor([3]), 5.0),
    "subnormal": lambda x: x * 1e-39,
    "tiny": lambda x: x * 1e-37,
    "huge": lambda x: x * 1e37,
    "halves": lambda x: (x * 4).round() / 2,
    "below_the_shift": lambda x: -SHIFT - x.abs(),
}


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_values_quantize_like_the_reference(kind, unsigned, isa):
    x = AWKWARD[kind](torch.randn(9, 192, generator=torch.Generator().manual_seed(3)))
    smooth = torch.where(torch.arange(192) % 5 == 0, -1.5, 1.0)
    q, ascales, _ = flat_native.quantize_down(
        torch.float32, x, smooth, torch.ones(192, 1), unsigned, 0, isa=isa
    )
    expected = reference.quantize_down(x, smooth, torch.ones(192, 1), unsigned)
    assert_same(q, expected[0])
    assert_same(ascales, expected[1])


@pytest.mark.parametrize(
    "bad",
    [float("nan"), float("-nan"), float("inf"), float("-inf")],
    ids=["nan", "-nan", "inf", "-inf"],
)
@pytest.mark.parametrize("unsigned", [False, True])
def test_a_bad_value_stays_in_its_group_and_token(bad, unsigned, isa):
    case = Case("bad", 6, 128, 40, R=4)
    x, parameters = make_input(case), make_w4a4(case, torch.float32)
    smooth, down = parameters.pop("smooth_factor"), parameters.pop("proj_down")
    clean = flat_native.quantize_down(torch.float32, x, smooth, down, unsigned, 0, isa=isa)
    x[2, 70] = bad
    dirty = flat_native.quantize_down(torch.float32, x, smooth, down, unsigned, 0, isa=isa)
    expected = reference.quantize_down(x, smooth, down, unsigned)
    assert_same(dirty[0], expected[0])
    assert torch.equal(dirty[1].nan_to_num(), expected[1].nan_to_num()) and torch.equal(
        dirty[1].isnan(), expected[1].isnan()
    )
    assert not torch.isfinite(dirty[2][2]).any()
    y = [product(*parts, parameters, unsigned, torch.float32, isa) for parts in (clean, dirty)]
    others = torch.arange(6) != 2
    assert torch.equal(y[0][others], y[1][others])
    # an unsigned group forgives -inf: its largest value stays what it was
    spoiled = not torch.isfinite(dirty[1][1, 2])
    assert (
        spoiled == (not (unsigned and bad == float("-inf"))) and not torch.isfinite(y[1][2]).any()
    )


# ---- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_product_is_as_exact_as_plain_torch(case, dtype, isa):
    (q, ascales, h), parameters = quantized(case, dtype, isa)
    ours = product(q, ascales, h, parameters, case.act_unsigned, dtype, isa)
    truth = reference.gemm_w4a4_up(
        q, ascales.double(), h.double(), **double(parameters), act_unsigned=case.act_unsigned
    )
    assert ours.dtype == dtype
    assert_twice_plain(ours, truth, plain_w4a4(q, ascales, h, parameters, case.act_unsigned, dtype))


@pytest.mark.parametrize(
    ("unsigned", "code", "weight", "per_group"),
    [
        (False, 0x88, 0x88, 64 * 64),
        (False, 0x77, 0x88, -64 * 56),
        (False, 0x99, 0x77, -64 * 49),
        (True, 0xFF, 0x88, -64 * 120),
        (True, 0xFF, 0x77, 64 * 105),
        (True, 0x00, 0x88, 0),
    ],
)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 12])
def test_the_largest_sums_are_exact(unsigned, code, weight, per_group, tokens, isa):
    n, groups = 35, 9
    q = torch.full((tokens, groups * 32), code, dtype=torch.uint8).view(torch.int8)
    parameters = {
        "weight": torch.full((n, groups * 32), weight, dtype=torch.uint8).view(torch.int8),
        "weight_scale": torch.ones(groups, n),
        "proj_up": torch.zeros(n, 0),
        "bias": None,
    }
    y = product(
        q,
        torch.ones(groups, tokens),
        torch.zeros(tokens, 0),
        parameters,
        unsigned,
        torch.float32,
        isa,
    )
    assert torch.equal(y, torch.full((tokens, n), float(per_group * groups)))


def test_every_code_lands_in_its_place(isa):
    """A token per column: row k of the product is column k of the weights."""
    k, n = 128, 40
    weight = torch.randint(
        -8, 8, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0)
    )
    scale = torch.rand(k // 64, n) - 0.5
    parameters = {
        "weight": pack_int4(weight),
        "weight_scale": scale,
        "proj_up": torch.zeros(n, 0),
        "bias": None,
    }
    y = product(
        pack_int4(torch.eye(k, dtype=torch.int8)),
        torch.ones(k // 64, k),
        torch.zeros(k, 0),
        parameters,
        False,
        torch.float32,
        isa,
    )
    assert torch.equal(y.t(), weight * scale.t().repeat_interleave(64, 1))
    flipped = parameters | {"weight": pack_int4(weight ^ -8)}
    for tokens in (torch.eye(k), torch.eye(k)[70:71], torch.eye(k)[5:8]):
        y = flat_native.w4a16(
            "gemm_w4a16", torch.float32, tokens, flipped["weight"], scale, None, None, isa=isa
        )
        assert torch.equal(y, tokens @ (weight * scale.t().repeat_interleave(64, 1)).t())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9])
def test_w4a16_is_as_exact_as_plain_torch(case, tokens, dtype, isa):
    check_w4a16(case, tokens, dtype, isa)


def test_w4a16_of_more_tokens_than_a_chunk(isa):
    check_w4a16(Case("two_chunks", 300, 320, 40), 300, torch.bfloat16, isa)


def check_w4a16(case: Case, tokens: int, dtype: torch.dtype, isa: int) -> None:
    x = make_input(Case(case.name, tokens, case.K, case.N), dtype)
    parameters = make_w4a16(case, dtype)
    names = ("weight", "weight_scale", "weight_zeros", "bias")
    y = flat_native.w4a16("gemv_w4a16", dtype, x, *(parameters[name] for name in names), isa=isa)
    dense, bias = dense_w4a16(parameters), parameters["bias"]
    plain = torch.nn.functional.linear(x, dense.to(dtype), bias)
    assert_twice_plain(
        y,
        torch.nn.functional.linear(x.double(), dense, None if bias is None else bias.double()),
        plain,
    )


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-30, 1e30, 1e36])
@pytest.mark.parametrize("tokens", [1, 4, 9])
def test_w4a16_keeps_very_small_and_very_large_tokens(size, tokens, isa):
    case = Case("range", tokens, 128, 24)
    x, parameters = make_input(case) * size, make_w4a16(case, torch.float32)
    y = flat_native.w4a16(
        "gemv_w4a16",
        torch.float32,
        x,
        parameters["weight"],
        parameters["weight_scale"],
        None,
        None,
        isa=isa,
    )
    dense = dense_w4a16(parameters | {"weight_zeros": None})
    assert_twice_plain(y, x.double() @ dense.t(), x @ dense.float().t())


@pytest.mark.parametrize("mid", FLOATS, ids=str)
@pytest.mark.parametrize(("unsigned2", "rotation2"), [(False, 0), (True, 0), (False, 64)])
def test_the_fused_mlp_follows_its_reference(mid, unsigned2, rotation2, isa):
    case, second = (
        Case("first", 133, 192, 128, R=9),
        make_w4a4(Case("second", 133, 128, 64, R=5), torch.bfloat16, seed=7),
    )
    (q, ascales, h), parameters = quantized(case, torch.bfloat16, isa)
    names = ("weight", "weight_scale", "proj_up", "bias")
    rest = (second["smooth_factor"], second["proj_down"], False, unsigned2, rotation2, mid)
    ours = flat_native.gemm_w4a4_up_gelu_quantize_down(
        torch.bfloat16, q, ascales, h, *(parameters[name] for name in names), *rest, isa=isa
    )
    theirs = reference.gemm_w4a4_up_gelu_quantize_down(
        q, ascales, h, *(parameters[name] for name in names), *rest
    )
    codes = [unpack_int4(parts[0], not unsigned2) for parts in (ours, theirs)]
    # A y on the border of two 16-bit numbers may round to either, which moves a whole group's scale
    # by up to a unit of that dtype.
    assert (codes[0] != codes[1]).float().mean() < 0.002 and (codes[0] - codes[1]).abs().max() <= 1
    unit = torch.finfo(mid).eps
    assert (
        relative_error(ours[1], theirs[1]) < 0.1 * unit + 1e-6
        and relative_error(ours[2], theirs[2]) < 0.1 * unit + 1e-6
    )
