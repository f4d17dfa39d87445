"""The GPU's int4 products, run on the CPU by the emulator: for each family of GPUs, at the edges of
tiles, groups and numbers.

Capability 75 is Turing's path, 80 that of Ampere and Ada, 120 the int8 path of Blackwell. The
emulated GPU has four multiprocessors.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from cases import SMALL, Case, make_input, make_w4a4, options, plain_w4a4
from compare import assert_same, assert_twice_plain
from nibble.kernels import reference
from nibble.quant.weights.packing import pack_int4, unpack_int4

FAMILIES = [75, 80, 120]
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
EDGES = [
    Case("three_groups", 33, 192, 136, R=16),
    Case("odd_columns", 5, 192, 129, R=1),
    Case("two_wide_ranks", 3, 64, 24, R=160),
    Case("unsigned_odd", 34, 128, 131, R=3, act_unsigned=True),
    Case("tall_tile", 200, 64, 513, R=32),
    Case("tallest_tile_of_int4", 470, 448, 200, R=17),
]


@pytest.fixture(params=FAMILIES, ids=lambda family: f"sm{family}")
def family(request) -> int:
    return request.param


def operands(case: Case, dtype: torch.dtype):
    """(q, ascales, h, parameters) of `case`, a third of the weight scales negative."""
    parameters = make_w4a4(case, dtype)
    smooth, down = parameters.pop("smooth_factor").float(), parameters.pop("proj_down").float()
    flip = (
        torch.rand(parameters["weight_scale"].shape, generator=torch.Generator().manual_seed(3))
        < 1 / 3
    )
    parameters["weight_scale"] = torch.where(
        flip, -parameters["weight_scale"], parameters["weight_scale"]
    )
    return *reference.quantize_down(make_input(case), smooth, down, **options(case)), parameters


def exactly(q, ascales, h, parameters, unsigned: bool):
    wide = {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in parameters.items()
    }
    return reference.gemm_w4a4_up(q, ascales.double(), h.double(), **wide, act_unsigned=unsigned)


def simple(q, weight, ascales=None, weight_scale=None, dtype=BF16):
    """Arguments without a low-rank branch, from codes; scales are 1 by default."""
    (m, k), n = q.shape, weight.shape[0]
    ones = {"ascales": torch.ones(k // 64, m), "weight_scale": torch.ones(k // 64, n, dtype=dtype)}
    given = {
        name: value
        for name, value in (("ascales", ascales), ("weight_scale", weight_scale))
        if value is not None
    }
    empty = {"h": torch.zeros(m, 0), "proj_up": torch.zeros(n, 0, dtype=dtype)}
    return (
        {"q": pack_int4(q.to(torch.int8)), "weight": pack_int4(weight.to(torch.int8))}
        | ones
        | given
        | empty
    )


# ---- the product ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL + EDGES, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(emulated, family, case, dtype):
    q, ascales, h, parameters = operands(case, dtype)
    ours = emulated.gemm_w4a4_up(
        q,
        ascales,
        h,
        **parameters,
        act_unsigned=case.act_unsigned,
        out_dtype=dtype,
        capability=family,
    )
    plain = plain_w4a4(q, ascales, h, parameters, case.act_unsigned, dtype)
    assert_twice_plain(ours, exactly(q, ascales, h, parameters, case.act_unsigned), plain)


@pytest.mark.parametrize(
    ("dtype", "out"), [(BF16, F32), (F16, F32), (BF16, F16), (F16, BF16)], ids=str
)
def test_results_may_have_another_dtype_than_parameters(emulated, family, dtype, out):
    case = EDGES[0]
    q, ascales, h, parameters = operands(case, dtype)
    ours = emulated.gemm_w4a4_up(q, ascales, h, **parameters, out_dtype=out, capability=family)
    assert_twice_plain(
        ours,
        exactly(q, ascales, h, parameters, False),
        plain_w4a4(q, ascales, h, parameters, False, out),
    )


@pytest.mark.parametrize("unsigned", [False, True], ids=["signed", "unsigned"])
def test_integers_come_out_exact(emulated, family, unsigned):
    generator = torch.Generator().manual_seed(5)
    low, high = (0, 16) if unsigned else (-8, 8)
    q = torch.randint(low, high, (37, 192), generator=generator)
    weight = torch.randint(-8, 8, (135, 192), generator=generator)
    q[0], weight[0] = high - 1 if unsigned else low, -8  # the largest sum there is
    y = emulated.gemm_w4a4_up(**simple(q, weight), act_unsigned=unsigned, capability=family)
    assert_same(y, (q @ weight.t()).float())


@pytest.mark.parametrize(
    "scale",
    [2.0**-133, 3 * 2.0**-130, 1.9921875 * 2.0**-126, 2.0**-100, 255 * 2.0**90, -1.5],
    ids=str,
)
def test_a_scaled_sum_is_rounded_once_whatever_the_scale(emulated, family, scale):
    q, weight = torch.arange(-7, 8)[:, None].expand(15, 64), torch.full((3, 64), -7)
    # so that the result is a normal number
    unit = 2.0**60 if abs(scale) < 1 else 2.0**-60 if abs(scale) > 2 else 1.0
    scales = {
        "weight_scale": torch.full((1, 3), scale, dtype=BF16),
        "ascales": torch.full((1, 15), unit),
    }
    y = emulated.gemm_w4a4_up(**simple(q, weight, **scales), capability=family)
    exact = (q @ weight.t()).double() * scales["weight_scale"].double() * unit
    assert_same(y, exact.float())


def test_subnormal_float16_scales(emulated, family):
    q, weight = torch.full((2, 64), 7), torch.full((3, 64), -8)
    tiny = torch.full((1, 3), 2.0**-24, dtype=F16)
    y = emulated.gemm_w4a4_up(**simple(q, weight, weight_scale=tiny, dtype=F16), capability=family)
    assert_same(y, torch.full((2, 3), -64 * 56 * 2.0**-24))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=str)
def test_a_bad_scale_spoils_its_own_row_or_column(emulated, family, poison):
    m, n = 35, 131
    q, weight = torch.ones(m, 128), torch.ones(n, 128)
    ascales, weight_scale = torch.ones(2, m), torch.ones(2, n, dtype=BF16)
    ascales[1, m - 1], weight_scale[0, n - 1] = poison, poison
    y = emulated.gemm_w4a4_up(**simple(q, weight, ascales, weight_scale), capability=family)
    assert not y[-1].isfinite().any() and not y[:, -1].isfinite().any()
    assert_same(y[:-1, :-1], torch.full((m - 1, n - 1), 128.0))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e5, 1.5e7], ids=str)
def test_h_of_any_size(emulated, family, dtype, size):
    case = replace(EDGES[0], name="h", bias=False)
    q, ascales, h, parameters = operands(case, dtype)
    h = h * (size / h.abs().max()) * torch.logspace(0, -2, h.shape[0])[:, None]
    parameters["proj_up"] = (
        (parameters["proj_up"].double() / size).to(dtype) if size > 1 else parameters["proj_up"]
    )
    ours = emulated.gemm_w4a4_up(
        torch.zeros_like(q), ascales, h, **parameters, out_dtype=dtype, capability=family
    )
    truth = exactly(torch.zeros_like(q), ascales, h, parameters, False)
    # float16 itself cannot hold such an h
    wide = torch.bfloat16 if dtype == F16 and size > 65504 else dtype
    plain = plain_w4a4(
        torch.zeros_like(q), ascales, h, parameters, False, dtype if wide == dtype else F32
    ).to(dtype)
    assert_twice_plain(ours, truth, plain)


def test_h_may_be_a_slice_of_a_wider_one(emulated, family):
    q, ascales, h, parameters = operands(EDGES[0], BF16)
    wide = torch.full((h.shape[0], 3 * h.shape[1]), float("nan"))
    wide[:, 16:32] = h
    whole = emulated.gemm_w4a4_up(q, ascales, h, **parameters, capability=family)
    assert_same(
        emulated.gemm_w4a4_up(q, ascales, wide[:, 16:32], **parameters, capability=family), whole
    )


def test_the_order_of_warps_does_not_matter(emulated, family):
    q, ascales, h, parameters = operands(EDGES[3], BF16)
    results = []
    for order in range(3):
        emulated.seed(order)
        results.append(
            emulated.gemm_w4a4_up(q, ascales, h, **parameters, act_unsigned=True, capability=family)
        )
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


def test_families_agree_on_the_sums(emulated):
    q, ascales, _, parameters = operands(replace(EDGES[1], R=0), F16)
    found = [
        emulated.gemm_w4a4_up(q, ascales, torch.zeros(5, 0), **parameters, capability=family)
        for family in FAMILIES
    ]
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_nothing_to_do(emulated, family):
    empty = emulated.gemm_w4a4_up(
        **simple(torch.zeros(0, 64), torch.zeros(7, 64)), capability=family
    )
    assert empty.shape == (0, 7)


# ---- the product that quantizes for the next layer -----------------------------------------------


@pytest.mark.parametrize(
    ("m", "n", "r2", "dtype", "mid", "unsigned2", "rotation2"),
    [
        (37, 192, 20, BF16, BF16, False, 0),
        (20, 128, 72, F16, F16, True, 0),
        (5, 128, 9, F16, F32, False, 64),
        (33, 64, 3, BF16, F16, True, 0),
        (150, 320, 32, BF16, BF16, False, 64),
        (3, 64, 0, BF16, BF16, True, 0),
    ],
    ids=str,
)
def test_gelu_and_quantization_of_the_product(
    emulated, family, m, n, r2, dtype, mid, unsigned2, rotation2
):
    q, ascales, h, parameters = operands(Case("first", m, 128, n, R=16), dtype)
    generator = torch.Generator().manual_seed(9)
    smooth = (torch.rand(n, generator=generator) + 0.5).to(dtype)
    down = (torch.randn(n, r2, generator=generator) * n**-0.5).to(dtype)
    smooth[1] *= -1
    second = (smooth, down, unsigned2, rotation2, mid)
    q2, ascales2, h2 = emulated.gemm_w4a4_up_gelu_quantize_down(
        q, ascales, h, *parameters.values(), False, *second, capability=family
    )

    # the same y to the last bit
    y = emulated.gemm_w4a4_up(q, ascales, h, **parameters, out_dtype=mid, capability=family)
    hidden = torch.nn.functional.gelu(y.double(), approximate="tanh")
    expected = reference.quantize_down(hidden, smooth.double(), down.double(), unsigned2, rotation2)
    ours, theirs = unpack_int4(q2, not unsigned2), unpack_int4(expected[0], not unsigned2)
    steps = (ours - theirs).abs()
    # A value halfway between two codes, to the last bits, may go either way.
    assert steps.max() <= 1 and steps.count_nonzero() <= steps.numel() / 1000
    torch.testing.assert_close(ascales2.double(), expected[1], rtol=2e-6, atol=0)
    plain = torch.nn.functional.gelu(y, approximate="tanh").to(
        dtype if mid == dtype else F32
    ) @ down.to(dtype if mid == dtype else F32)
    assert_twice_plain(h2.to(plain.dtype), expected[2], plain)


def test_codes_for_the_next_layer_as_8_bit_floats(emulated, family):
    q, ascales, h, parameters = operands(Case("first", 9, 64, 128, R=4), BF16)
    second = (torch.ones(128, dtype=BF16), torch.zeros(128, 0, dtype=BF16), False, 0, BF16)
    arguments = (q, ascales, h, *parameters.values(), False, *second)
    packed, *_ = emulated.gemm_w4a4_up_gelu_quantize_down(*arguments, capability=family)
    floats, *_ = emulated.gemm_w4a4_up_gelu_quantize_down(
        *arguments, capability=family, form2=emulated.E4M3
    )
    # 32 columns: (half, t, i) holds column 8t + 4 half + i
    blocks = floats.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 2, 4, 4))
    assert_same(blocks.transpose(-3, -2).flatten(-4), unpack_int4(packed).float())


def test_a_nan_in_y_stays_in_its_token(emulated, family):
    q, ascales, h, parameters = operands(Case("first", 6, 64, 128, R=4), BF16)
    second = (torch.ones(128, dtype=BF16), torch.ones(128, 8, dtype=BF16), False, 0, BF16)
    clean = emulated.gemm_w4a4_up_gelu_quantize_down(
        q, ascales, h, *parameters.values(), False, *second, capability=family
    )
    ascales[0, 2] = float("nan")
    q2, ascales2, h2 = emulated.gemm_w4a4_up_gelu_quantize_down(
        q, ascales, h, *parameters.values(), False, *second, capability=family
    )
    others = [0, 1, 3, 4, 5]
    assert ascales2[:, 2].isnan().all() and h2[2].isnan().all() and not q2[2].any()
    for ours, before in ((q2, clean[0]), (h2, clean[2])):
        assert_same(ours[others], before[others])


# ---- the router ----------------------------------------------------------------------------------


def test_refusals_are_in_words(emulated):
    arguments = simple(torch.zeros(1, 64), torch.zeros(1, 64))
    with pytest.raises(emulated.Failed, match="7.0 have no 4-bit product; 7.5"):
        emulated.gemm_w4a4_up(**arguments, capability=70)
    wide = arguments | {name: arguments[name].float() for name in ("weight_scale", "proj_up")}
    with pytest.raises(emulated.Failed, match="not float32"):
        emulated.gemm_w4a4_up(**wide, capability=80)
    assert emulated.route("gemm_w4a4_up", 70, 1, 64, 64).startswith(
        "error: GPUs of compute capability 7.0"
    )


@pytest.mark.parametrize(
    ("capability", "m", "n", "words"),
    [
        (75, 1, 64, "sm75: int4 m8n8k32, tile 32x128"),
        (86, 64, 64, "sm80: int4 m16n8k64, tile 64x128"),
        (89, 4608, 3072, "128x128 on up to 432 multiprocessors"),
        (90, 1, 64, "sm90: wgmma"),
        (121, 1, 64, "sm100: int8 m16n8k32"),
    ],
)
def test_route_says_what_runs(emulated, capability, m, n, words):
    assert words in emulated.route("gemm_w4a4_up", capability, m, n, 64)


# ---- sanitizers ----------------------------------------------------------------------------------

SANITIZED = """
import sys
sys.path.append("../support")
import checkout
import torch
from emulator import emulated
SHAPES = ((3, 37, 192, 3, True), (33, 136, 64, 16, False), (40, 129, 128, 0, False),
          (130, 1026, 64, 1, False))  # M, N, K, R, unsigned
for capability in (75, 80):
    for m, n, k, r, unsigned in SHAPES:
        q, weight = (torch.randint(-128, 128, (rows, k // 2), dtype=torch.int8) for rows in (m, n))
        ascales, h = torch.rand(k // 64, m), torch.randn(m, r)
        layer = torch.rand(k // 64, n), torch.randn(n, r), torch.randn(n)
        first = (q, ascales, h, weight, *(part.bfloat16() for part in layer), unsigned)
        for dtype in (torch.bfloat16, torch.float32)[: 1 if m > 100 else 2]:
            assert emulated.gemm_w4a4_up(*first, dtype, capability=capability).isfinite().all()
            if unsigned:
                emulated.gemm_w4a4_up(*first[:-1], False, dtype, 64, capability=capability)
    q, weight = torch.zeros(5, 32, dtype=torch.int8), torch.zeros(192, 32, dtype=torch.int8)
    half = lambda *shape: torch.rand(*shape).bfloat16()
    emulated.gemm_w4a4_up_gelu_quantize_down(
        q, torch.ones(1, 5), torch.ones(5, 2), weight, half(1, 192), half(192, 2), None, False,
        half(192) + 1, half(192, 5), False, 64, torch.bfloat16, capability=capability)
print("clean")
"""


def test_no_access_out_of_bounds_and_nothing_undefined(emulated):
    from emulator import build

    sources = "router gemm_w4a4/sm75 gemm_w4a4/sm80"  # 12.0 differs from 8.0 in arithmetic only
    # here, because the compiler should not run under the sanitizer too
    build.library(sources.split())
    environment = os.environ | {
        "NIBBLE_SANITIZED": sources,
        "LD_PRELOAD": build.asan(),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED],
        cwd=build.HERE.parent,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "clean" in done.stdout, done.stderr[-4000:]
