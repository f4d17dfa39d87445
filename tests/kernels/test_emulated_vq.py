"""The GPU's codebook linears, run on the CPU, against the float64 reference.

The emulator has four multiprocessors, so that a few hundred tokens and outputs already choose the
large tile.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import VQ_LAYOUTS, Case, make_input, make_vq
from compare import assert_same, assert_sqnr, assert_twice_plain
from nibble.kernels.reference import vq as reference_vq
from nibble.quant.weights.packing import pack_indices

FLOATS = [torch.bfloat16, torch.float16, torch.float32]
LAYOUTS = pytest.mark.parametrize(("bits", "vector"), VQ_LAYOUTS.values(), ids=VQ_LAYOUTS)

SHAPES = [
    Case("one_token", 1, 64, 40),
    Case("one_token_many_steps", 1, 2112, 37),
    Case("more_than_shared_memory", 1, 4160, 9, bias=False),
    Case("two_tokens", 2, 1088, 40),
    Case("five_tokens", 5, 320, 129, bias=False),
    Case("small_tile", 16, 448, 66),
    Case("middle_tile", 61, 320, 130, bias=False),
    Case("middle_tile_ragged", 67, 64, 35),
    Case("large_tile", 130, 192, 258),
    Case("large_tile_ragged", 257, 64, 135, bias=False),
]


def operands(
    case: Case,
    bits: int,
    vector: int,
    dtype: torch.dtype,
    parameter_dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor | None]:
    """Under the op's argument names; scales of both signs."""
    p = make_vq(case, bits, vector, parameter_dtype)
    given = {"x": make_input(case, dtype)} | {
        name: p[name] for name in ("indices", "codebook", "scale", "bias")
    }
    if given["scale"] is not None:
        given["scale"][::3] *= -1
    return given


def exact(given: dict[str, Tensor | None]) -> Tensor:
    return reference_vq.gemm_vq(
        **{
            name: t.double() if t is not None and t.is_floating_point() else t
            for name, t in given.items()
        }
    )


def plain(given: dict[str, Tensor | None]) -> Tensor:
    """The layer as ordinary torch runs it: weights and bias rounded to x's dtype."""
    x, bias = given["x"], given["bias"]
    dense = reference_vq.dequantize_vq(given["indices"], given["codebook"], given["scale"])
    return torch.nn.functional.linear(
        x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype)
    )


@LAYOUTS
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_as_exact_as_plain_torch(emulated, case, dtype, bits, vector):
    given = operands(case, bits, vector, dtype)
    wanted, ordinary = exact(given), plain(given)
    for capability in (75, 80):
        multiplies = dtype == torch.float16 or (dtype == torch.bfloat16 and capability >= 80)
        if case.M > 20 and not multiplies:
            continue  # four tokens after four others, which the cases with fewer show
        found = emulated.gemm_vq(**given, capability=capability)
        assert found.dtype == dtype
        assert_twice_plain(found, wanted, ordinary)
        assert_sqnr(found, wanted, 45)


@LAYOUTS
@pytest.mark.parametrize("capability", [75, 80, 90, 120])
def test_every_codeword_at_every_place(emulated, capability, bits, vector):
    """One-hot tokens read weights back without any rounding: codewords that both 16-bit floats
    hold.
    """
    n = 67
    indices = (torch.arange(n)[:, None] * 61 + torch.arange(64 // vector) * 5) % (1 << bits)
    codebook = torch.randint(
        -128, 129, (1 << bits, vector), generator=torch.Generator().manual_seed(0)
    ).half()
    wanted = codebook[indices].flatten(1).t()
    for dtype in FLOATS:
        for tokens in (slice(0, 64), slice(9, 10), slice(20, 23)):
            eye = torch.eye(64, dtype=dtype)[tokens].contiguous()
            assert_same(
                emulated.gemm_vq(eye, pack_indices(indices, bits), codebook, capability=capability),
                wanted[tokens].to(dtype).contiguous(),
            )


@pytest.mark.parametrize("parameter_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 5, 20])
def test_scale_bias_and_addend_of_every_dtype(emulated, m, parameter_dtype):
    for dtype in FLOATS:
        given = operands(Case("parameters", m, 128, 70), 6, 2, dtype, parameter_dtype)
        addend = torch.randn(m, 70, generator=torch.Generator().manual_seed(3)).to(dtype)
        found = emulated.gemm_vq(**given, addend=addend, capability=80)
        assert_twice_plain(found, exact(given) + addend.double(), plain(given) + addend)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("m", "dtype"), [(2, torch.float32), (9, torch.bfloat16), (130, torch.float16)]
)
def test_a_bad_value_spoils_its_own_token(emulated, m, dtype, bad):
    given = operands(Case("bad", m, 128, 130), 8, 4, dtype)
    clean = emulated.gemm_vq(**given, capability=80)
    given["x"] = given["x"].clone()
    given["x"][1, 70] = bad
    dirty = emulated.gemm_vq(**given, capability=80)
    others = torch.arange(m) != 1
    assert torch.equal(dirty[others], clean[others])
    assert not torch.isfinite(dirty[1]).any()


def test_the_order_of_warps_does_not_matter(emulated):
    for case in (SHAPES[1], SHAPES[5], SHAPES[8]):
        given, results = operands(case, 6, 2, torch.bfloat16), []
        for seed in range(3):
            emulated.seed(seed)
            results.append(emulated.gemm_vq(**given, capability=80))
        assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("m", [1, 4, 20])
def test_nothing_to_do_and_what_is_refused(emulated, m):
    book, bias = torch.randn(256, 4).half(), torch.randn(6).bfloat16()
    nothing = torch.zeros(m, 0).bfloat16(), torch.zeros(6, 0, dtype=torch.uint8), book, None, bias
    assert_same(emulated.gemm_vq(*nothing, capability=80), bias.expand(m, 6).contiguous())
    given = operands(Case("empty", m, 64, 6), 8, 4, torch.bfloat16)
    assert emulated.gemm_vq(**given | {"x": given["x"][:0]}, capability=80).shape == (0, 6)
    with pytest.raises(emulated.Failed, match="codebook in float16"):
        emulated.gemm_vq(**given | {"codebook": book.float()}, capability=80)
    with pytest.raises(emulated.Failed, match="no kernel for indices of 4 bits and 4 columns"):
        emulated.gemm_vq(
            given["x"], given["indices"][:, :8].contiguous(), book[:16].contiguous(), capability=80
        )
    with pytest.raises(emulated.Failed, match="x's dtype"):
        emulated.gemm_vq(**given, addend=torch.zeros(m, 6), capability=80)
