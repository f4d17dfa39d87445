"""Blackwell's kernels of 4-bit floats, run on the CPU by the emulator: the quantizer has the
reference's numbers, the product those of its decoded operands.

The emulated GPU has four multiprocessors, so that few tokens choose among all tiles.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compare import assert_same, assert_twice_plain, relative_error
from emulator import build
from nibble.kernels.params import NVFP4Params
from nibble.kernels.reference import nvfp4 as reference

if unavailable := build.unavailable():
    pytest.skip(unavailable, allow_module_level=True)

from emulator import emulated, emulated_nvfp4  # noqa: E402

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [
    # M, N, K, R: every tile, edges of each, odd groups, groups in fours
    (1, 8, 64, 0),
    (5, 129, 192, 1),
    (33, 136, 256, 16),
    (70, 64, 320, 37),
    (135, 200, 512, 32),
    (200, 513, 64, 3),
    (470, 200, 448, 17),
]


def operands(n: int, k: int, r: int, dtype: torch.dtype, rounded: bool = False) -> NVFP4Params:
    draw = torch.Generator().manual_seed(n + k + r)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    smooth = torch.rand(k, generator=draw) + 0.5
    smooth[::9] *= -1
    return NVFP4Params(
        torch.randint(-128, 128, (n, k // 2), generator=draw, dtype=torch.int8),
        (torch.rand(n, k // 16, generator=draw) * 30 + 0.01).to(torch.float8_e4m3fn),
        torch.rand(n, generator=draw) * 0.01 + 0.001,
        smooth.to(dtype),
        (normal(k, r) * 0.1).to(dtype),
        (normal(n, r) * 0.1).to(dtype),
        normal(n).to(dtype),
        rounded,
    )


def inputs(m: int, k: int, dtype: torch.dtype = F32) -> Tensor:
    """Rows of many sizes, some columns far out."""
    draw = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=draw) * torch.logspace(-3, 2, m)[:, None]
    x[:, ::37] *= 20
    return x.to(dtype)


def numbers(packed: Tensor, scale: Tensor) -> Tensor:
    return reference.decoded_weight(packed, scale, torch.float64)


@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, F16), (F32, BF16), (BF16, F16)], ids=str)
@pytest.mark.parametrize(("m", "k", "r"), [(21, 320, 37), (135, 832, 32), (70, 64, 0)])
def test_the_quantizer_has_the_reference_s_numbers(m, k, r, dtypes, rounded):
    x, p = inputs(m, k, dtypes[0]), operands(8, k, r, dtypes[1], rounded)
    q, scale, h = emulated_nvfp4.quantize_nvfp4_down(x, p)
    codes, wanted = reference.quantize_nvfp4(x.float() / p.smooth_factor.float(), rounded)
    assert torch.equal(scale.view(torch.uint8), wanted.view(torch.uint8))
    assert_same(numbers(q, scale), reference.dequantize_nvfp4(codes, wanted, torch.float64))
    exact = x.double() @ p.proj_down.double()
    assert_twice_plain(h, exact, x.float() @ p.proj_down.float())


def test_numbers_at_the_edges_of_a_code():
    """Every tie between two codes, its neighbours, what saturates, and both zeros."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    inf = torch.tensor(torch.inf)
    row = torch.cat([ties, ties.nextafter(inf), torch.tensor([6.0, 0.0])])
    x = torch.cat([row, -row, ties.nextafter(-inf), -ties, row[-2:]]).repeat(4, 2)[:, :64]
    x = x * torch.tensor([[1.0], [0.01], [448.0], [2.0**-20]])
    p = operands(8, 64, 0, BF16)._replace(smooth_factor=torch.ones(64, dtype=BF16))
    q, scale, _ = emulated_nvfp4.quantize_nvfp4_down(x, p)
    codes, wanted = reference.quantize_nvfp4(x)
    assert torch.equal(scale.view(torch.uint8), wanted.view(torch.uint8))
    assert_same(numbers(q, scale), reference.dequantize_nvfp4(codes, wanted, torch.float64))


@pytest.mark.parametrize("extreme", [torch.inf, -torch.inf, 3e38, -1e30, 1e-42, torch.nan])
def test_extreme_numbers_have_the_reference_s_scales(extreme):
    x, p = inputs(8, 128), operands(8, 128, 0, BF16)
    p.smooth_factor[70] = 2.0**-60
    x[2, 5], x[3, 70] = extreme, 1.0
    q, scale, _ = emulated_nvfp4.quantize_nvfp4_down(x, p)
    codes, wanted = reference.quantize_nvfp4(x / p.smooth_factor.float())
    assert torch.equal(scale.view(torch.uint8), wanted.view(torch.uint8))
    ours, theirs = numbers(q, scale), reference.dequantize_nvfp4(codes, wanted, torch.float64)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert_same(ours.nan_to_num(0), theirs.nan_to_num(0))


def test_rows_may_lie_apart():
    wide, p = inputs(20, 256, BF16), operands(8, 128, 16, BF16)
    apart = emulated_nvfp4.quantize_nvfp4_down(wide[:, 64:192], p)
    dense = emulated_nvfp4.quantize_nvfp4_down(wide[:, 64:192].contiguous(), p)
    assert all(torch.equal(a.view(torch.int8), b.view(torch.int8))
               for a, b in zip(apart, dense, strict=True))  # fmt: skip


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_product_is_at_most_twice_as_far_as_plain_torch(shape, dtype):
    m, n, k, r = shape
    x, p = inputs(m, k, dtype), operands(n, k, r, dtype)
    q, scale, h = emulated_nvfp4.quantize_nvfp4_down(x, p)
    ours = emulated_nvfp4.gemm_nvfp4_up(q, scale, h, p, dtype)
    main = numbers(q, scale) @ numbers(p.weight, p.weight_scale).t() * p.weight_scale_2.double()
    exact = main + h.double() @ p.proj_up.double().t() + p.bias.double()
    low_rank = (h.to(dtype).float() @ p.proj_up.float().t()).to(dtype)
    plain = (main.float() + low_rank.float() + p.bias.float()).to(dtype)
    assert_twice_plain(ours, exact, plain)


@pytest.mark.parametrize(("dtype", "out"), [(BF16, F32), (F16, F32), (BF16, F16)], ids=str)
def test_results_may_have_another_dtype_than_parameters(dtype, out):
    x, p = inputs(33, 192), operands(136, 192, 16, dtype)
    ours = emulated_nvfp4.gemm_nvfp4_up(*emulated_nvfp4.quantize_nvfp4_down(x, p), p, out)
    wanted = reference.linear_nvfp4(x, *p)
    rounding = torch.finfo(out).eps + 4 * torch.finfo(F32).eps  # groups are added one by one
    assert ours.dtype == out and relative_error(ours, wanted) < rounding


@pytest.mark.parametrize("rows", [40, 140, 300])
def test_every_pair_of_codes_and_every_place_of_a_scale(rows):
    """Sums of few bits come out exact: a scale or code of another row, column or block would
    show.
    """
    draw = torch.Generator().manual_seed(rows)
    k, n = 320, 520
    p = operands(n, k, 0, BF16)._replace(bias=None, weight_scale_2=torch.ones(n))
    powers = 2.0 ** torch.randint(-2, 3, (rows + n, k // 16), generator=draw)
    scale = powers.to(torch.float8_e4m3fn)
    p = p._replace(weight_scale=scale[rows:].contiguous())
    q = torch.randint(-128, 128, (rows, k // 2), generator=draw, dtype=torch.int8)
    ascales, h = scale[:rows].contiguous(), torch.zeros(rows, 0)
    ours = emulated_nvfp4.gemm_nvfp4_up(q, ascales, h, p, F32)
    wanted = numbers(q, ascales) @ numbers(p.weight, p.weight_scale).t()
    assert_same(ours.double(), wanted)


def test_float16_holds_branches_of_any_size():
    p = operands(72, 64, 16, F16)._replace(bias=None)
    q, scale = torch.zeros(4, 32, dtype=torch.int8), torch.zeros(4, 4).to(torch.float8_e4m3fn)
    h = torch.randn(4, 16) * torch.tensor([[1e6], [1.0], [1e-9], [1e-30]])
    ours = emulated_nvfp4.gemm_nvfp4_up(q, scale, h, p, F16).double()
    exact = h.double() @ p.proj_up.double().t()
    assert torch.allclose(ours[1], exact[1], rtol=2e-3, atol=1e-3)
    assert torch.isfinite(ours[1:]).all()
    assert (ours[2:] - exact[2:]).abs().max() < 1e-7


def test_a_column_without_a_scale_keeps_its_branch():
    x, p = inputs(9, 64, BF16), operands(16, 64, 16, BF16)
    p.weight_scale_2[3] = 0.0
    act = emulated_nvfp4.quantize_nvfp4_down(x, p)
    y = emulated_nvfp4.gemm_nvfp4_up(*act, p, F32)
    wanted = act[2] @ p.proj_up.float().t() + p.bias.float()
    assert torch.allclose(y[:, 3], wanted[:, 3], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capability", [75, 90, 100])
def test_gpus_without_the_instruction_are_refused(capability):
    x, p = inputs(2, 64), operands(8, 64, 0, BF16)
    with pytest.raises(emulated.Failed, match=r"12\.0 and 12\.1 only"):
        emulated_nvfp4.quantize_nvfp4_down(x, p, capability)


def test_the_order_of_warps_does_not_matter():
    x, p = inputs(300, 192, BF16), operands(200, 192, 16, BF16)
    found = []
    for seed in (1, 2):
        emulated.seed(seed)
        act = emulated_nvfp4.quantize_nvfp4_down(x, p)
        found.append(emulated_nvfp4.gemm_nvfp4_up(*act, p, BF16))
    emulated.seed(0)
    assert torch.equal(*found)
