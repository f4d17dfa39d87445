"""The compiled CPU ops give the same bits whatever else happens: other threads, other tokens, and
rounding as torch's own.
"""

import pytest
import torch

import flat_native
from cases import Case, make_input, make_w4a4, make_w4a16
from compare import assert_same
from flat_native import product, quantized
from nibble.kernels.backends import native

module, reason = native.module()
pytestmark = pytest.mark.skipif(module is None, reason=f"{reason}: pip install ./kernels")


@pytest.fixture(params=module.cpu_isas() if module else ["portable"])
def isa(request) -> int:
    """Every instruction set of this processor; sanitize/test_fuzz.py runs AVX-512 on those that
    lack it.
    """
    return native.ISAS[request.param]


@pytest.fixture
def threads(monkeypatch):
    """Sets what torch would say; torch itself stays as it is."""
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)


def everything(case: Case, isa: int) -> list[torch.Tensor]:
    dtype = torch.bfloat16
    (q, ascales, h), parameters = quantized(case, dtype, isa)
    y = product(q, ascales, h, parameters, case.act_unsigned, torch.float32, isa)
    names = ("weight", "weight_scale", "weight_zeros", "bias")
    w4a16 = make_w4a16(case, dtype)
    z = flat_native.w4a16(
        "gemm_w4a16", dtype, make_input(case, dtype), *(w4a16[name] for name in names), isa=isa
    )
    second = make_w4a4(Case("second", case.M, case.N, 64, R=5), dtype, seed=7)
    fused = flat_native.gemm_w4a4_up_gelu_quantize_down(
        dtype,
        q,
        ascales,
        h,
        *(parameters[name] for name in ("weight", "weight_scale", "proj_up", "bias")),
        second["smooth_factor"],
        second["proj_down"],
        case.act_unsigned,
        False,
        0,
        dtype,
        isa=isa,
    )
    return [q, ascales, h, y, z, *fused]


@pytest.mark.parametrize(
    "case", [Case("tall", 150, 128, 64, R=17), Case("wide", 3, 640, 448, R=40)], ids=str
)
def test_threads_and_repetition_change_no_bit(case, isa, threads):
    threads(1)
    first = everything(case, isa)
    for count in (1, 2, 3, 7, 64):
        threads(count)
        for one, other in zip(first, everything(case, isa), strict=True):
            assert_same(other, one)


@pytest.mark.parametrize(
    "case", [Case("tokens", 37, 320, 70, R=20), Case("one_more", 257, 64, 33, R=2)], ids=str
)
def test_a_token_alone_gets_the_bits_that_it_gets_in_company(case, isa):
    """In the W4A4 ops. W4A16 sums a few tokens' products in another order than many tokens'."""
    (q, ascales, h), parameters = quantized(case, torch.float32, isa)
    x, layer = make_input(case), make_w4a4(case, torch.float32)
    together = product(q, ascales, h, parameters, False, torch.float32, isa)
    for rows in (slice(0, 1), slice(5, 8), slice(case.M - 1, case.M)):
        alone = flat_native.quantize_down(
            torch.float32, x[rows], layer["smooth_factor"], layer["proj_down"], False, 0, isa=isa
        )
        for part, whole in zip(alone, (q[rows], ascales[:, rows], h[rows]), strict=True):
            assert_same(part, whole.contiguous())
        assert_same(
            product(*alone, parameters, False, torch.float32, isa), together[rows].contiguous()
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_results_round_to_the_nearest_even_number(dtype, isa):
    """The bias alone, in float32, against torch's own conversion: ties, subnormals, overflow,
    infinities and NaN.
    """
    values = torch.tensor(
        [
            1.00390625,
            1.01171875,
            1.00048828125,
            1.00146484375,
            65519.0,
            65520.0,
            3.4e38,
            1e-8,
            3e-8,
            6e-8,
            1e-40,
            0.0,
            -0.0,
            float("inf"),
            float("-inf"),
            float("nan"),
        ]
    )
    bias = torch.cat([values, -values, torch.randn(1000) * torch.logspace(-12, 12, 1000)])
    n = len(bias)
    parameters = {
        "weight": torch.zeros(n, 32, dtype=torch.int8),
        "weight_scale": torch.ones(1, n),
        "proj_up": torch.zeros(n, 0),
        "bias": bias,
    }
    names = ("weight", "weight_scale", "proj_up", "bias")
    y = flat_native.gemm_w4a4_up(
        torch.float32,
        torch.zeros(1, 32, dtype=torch.int8),
        torch.ones(1, 1),
        torch.zeros(1, 0),
        *(parameters[name] for name in names),
        False,
        dtype,
        isa=isa,
    )[0]
    expected = bias.to(dtype)
    assert torch.equal(y.isnan(), expected.isnan()) and torch.equal(
        y.nan_to_num(), expected.nan_to_num()
    )


def test_eight_bit_codes_are_refused(isa):
    with pytest.raises(ValueError, match="codes are packed"):
        flat_native.quantize_down(
            torch.float32,
            torch.ones(1, 64),
            torch.ones(64),
            torch.ones(64, 1),
            False,
            0,
            isa=isa,
            codes=native.E4M3,
        )
