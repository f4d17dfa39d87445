"""The GPU's 4-bit-weight linears, run on the CPU, against the float64 reference.

The emulator has four multiprocessors, so that a few hundred tokens and outputs already choose the
large tile.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import SMALL, Case, make_input, make_w4a16
from compare import assert_same, assert_sqnr, assert_twice_plain
from nibble.kernels import reference

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
HALVES = FLOATS[:2]
OPS = ["gemv_w4a16", "gemm_w4a16"]

SHAPES = [
    Case("one_token", 1, 64, 40),
    Case("one_token_many_steps", 1, 2112, 37),
    Case("more_than_shared_memory", 1, 8256, 9),
    Case("two_tokens", 2, 1088, 40, bias=False),
    Case("three_tokens", 3, 192, 70),
    Case("five_tokens", 5, 320, 129),
    Case("small_tile", 16, 448, 66),
    Case("several_blocks_of_tokens", 19, 64, 70, bias=False),
    Case("middle_tile", 61, 320, 130, bias=False),
    Case("middle_tile_ragged", 67, 64, 35),
    Case("large_tile", 130, 192, 258),
    Case("large_tile_ragged", 257, 64, 135, bias=False),
]


def operands(
    case: Case, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> dict[str, Tensor | None]:
    """Under the reference's argument names; scales of both signs."""
    parameters = make_w4a16(case, parameter_dtype)
    parameters["weight_scale"][:, ::3] *= -1
    return {"x": make_input(case, dtype)} | parameters


def exact(given: dict[str, Tensor | None]) -> Tensor:
    return reference.gemv_w4a16(
        **{
            name: t.double() if t is not None and t.is_floating_point() else t
            for name, t in given.items()
        }
    )


def plain(given: dict[str, Tensor | None]) -> Tensor:
    """The layer as ordinary torch runs it: weights and bias rounded to x's dtype."""
    x, bias = given["x"], given["bias"]
    dense = reference.dequantize_w4_zeros(
        given["weight"], given["weight_scale"], given["weight_zeros"]
    )
    return torch.nn.functional.linear(
        x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype)
    )


@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("parameter_dtype", HALVES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_as_exact_as_plain_torch(emulated, case, dtype, parameter_dtype):
    given = operands(case, dtype, parameter_dtype)
    wanted, ordinary = exact(given), plain(given)
    for capability in (75, 80):
        multiplies = dtype == torch.float16 or (dtype == torch.bfloat16 and capability >= 80)
        if case.M > 20 and not multiplies:
            continue  # four tokens after four others, which the cases with fewer show
        found = emulated.w4a16(
            "gemv_w4a16" if case.M <= 8 else "gemm_w4a16", **given, capability=capability
        )
        assert found.dtype == dtype
        assert_twice_plain(found, wanted, ordinary)
        assert_sqnr(found, wanted, 45)


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("capability", [75, 80, 90, 120])
def test_both_ops_are_one(emulated, case, capability):
    for dtype in FLOATS:
        given = operands(case, dtype, torch.bfloat16)
        gemv, gemm = (emulated.w4a16(op, **given, capability=capability) for op in OPS)
        assert_same(gemv, gemm)
        assert_sqnr(gemm, exact(given), 45)


def test_every_code_at_every_place(emulated):
    """One-hot tokens read single weights back: each of 16 codes in each of 64 columns, without any
    rounding.
    """
    codes = (torch.arange(64)[:, None] + torch.arange(16)).t() % 16
    weight = reference.pack_nibbles(codes.contiguous())
    scale = torch.full((1, 16), 0.5, dtype=torch.bfloat16)
    wanted = (codes - 8).t() * 0.5
    for dtype in FLOATS:
        eye = torch.eye(64, dtype=dtype)
        assert_same(
            emulated.w4a16("gemm_w4a16", eye, weight, scale, capability=80), wanted.to(dtype)
        )
        for m in (1, 2, 3):
            found = emulated.w4a16(
                "gemv_w4a16", eye[9 : 9 + m].contiguous(), weight, scale, capability=75
            )
            assert_same(found, wanted[9 : 9 + m].to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    ("m", "dtype"),
    [(2, torch.float32), (4, torch.float32), (9, torch.bfloat16), (130, torch.float16)],
)
def test_a_bad_value_spoils_its_own_token(emulated, m, dtype, bad):
    given = operands(Case("bad", m, 128, 130), dtype, torch.bfloat16)
    clean = emulated.w4a16("gemm_w4a16", **given, capability=80)
    given["x"] = given["x"].clone()
    given["x"][1, 70] = bad
    dirty = emulated.w4a16("gemm_w4a16", **given, capability=80)
    others = torch.arange(m) != 1
    assert torch.equal(dirty[others], clean[others])
    assert not torch.isfinite(dirty[1]).any()


def test_scales_keep_their_range(emulated):
    """Scales that float16 cannot hold, for float16 tokens: a weight is never made in the tokens'
    dtype.
    """
    given = operands(Case("range", 20, 128, 40, bias=False), torch.float16, torch.bfloat16)
    for factor in (1e-6, 1e6):
        scaled = given | {
            "weight_scale": given["weight_scale"] * factor,
            "x": given["x"] * (1 if factor < 1 else 2**-13),
        }
        for m in (1, 20):
            some = scaled | {"x": scaled["x"][:m].contiguous()}
            wanted = exact(some)
            error = (
                (emulated.w4a16("gemm_w4a16", **some, capability=80).double() - wanted).abs().max()
            )
            # What is left is the rounding of the result, which for small ones is coarse.
            assert error <= wanted.abs().max() * 2**-11 + 2**-25


def test_the_order_of_warps_does_not_matter(emulated):
    for case in (SHAPES[1], SHAPES[6], SHAPES[9]):
        given = operands(case, torch.bfloat16, torch.bfloat16)
        results = []
        for seed in range(3):
            emulated.seed(seed)
            results.append(emulated.w4a16("gemm_w4a16", **given, capability=80))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("m", [1, 4, 20])
def test_nothing_to_do(emulated, m):
    bias = torch.randn(6).bfloat16()
    nothing = (
        torch.zeros(6, 0, dtype=torch.int8),
        torch.zeros(0, 6, dtype=torch.bfloat16),
        None,
        bias,
    )
    assert_same(
        emulated.w4a16("gemm_w4a16", torch.zeros(m, 0).bfloat16(), *nothing, capability=80),
        bias.expand(m, 6),
    )
    given = operands(Case("empty", m, 64, 6), torch.bfloat16, torch.bfloat16)
    assert emulated.w4a16("gemm_w4a16", **given | {"x": given["x"][:0]}, capability=80).shape == (
        0,
        6,
    )
    with pytest.raises(emulated.Failed, match="bfloat16 or float16"):
        emulated.w4a16(
            "gemm_w4a16", given["x"], given["weight"], given["weight_scale"].float(), capability=80
        )
