"""The compiled gemm_vq on the CPU against float64, for each instruction set of this processor, by
tables and by panels.
"""

import pytest
import torch

import flat_native
from cases import SMALL, VQ_LAYOUTS, Case, make_input, make_vq
from compare import assert_same, assert_twice_plain
from nibble.kernels.backends import native
from nibble.kernels.reference import vq as reference_vq
from nibble.quant.weights.packing import pack_indices

module, reason = native.module()
pytestmark = pytest.mark.skipif(
    module is None or not hasattr(module, "gemm_vq"), reason=f"{reason}: pip install ./kernels"
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [
    *VQ_LAYOUTS.values(),
    (12, 4),
    (8, 8),
    (4, 2),
    (4, 1),
    (5, 2),
    (7, 4),
    (11, 2),
    (1, 8),
    (9, 1),
]
SHAPES = [
    *SMALL[:8],
    Case("more_outputs_than_codewords", 3, 320, 300),
    Case("ragged_everything", 21, 72, 517),
    Case("several_tasks_of_tokens", 150, 128, 260),
    Case("many_outputs", 2, 64, 4200),
    Case("two_chunks_of_tokens", 260, 64, 24),
]


@pytest.fixture(params=module.cpu_isas() if module else ["portable"])
def isa(request) -> int:
    """sanitize/test_fuzz.py runs AVX-512 on processors that lack it."""
    return native.ISAS[request.param]


def product(case: Case, bits: int, vector: int, dtype: torch.dtype):
    """Arguments of the op for a case, and of the same layer in float64."""
    p = make_vq(case, bits, vector, dtype)
    names = ("indices", "codebook", "scale", "bias")
    given = [p[name] for name in names]
    return (
        make_input(case, dtype),
        given,
        [t.double() if t is not None and t.is_floating_point() else t for t in given],
    )


def fits(case: Case, bits: int, vector: int) -> bool:
    return case.K // vector * bits % 8 == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize(("bits", "vector"), LAYOUTS, ids=str)
def test_as_exact_as_plain_torch(case, bits, vector, dtype, isa):
    if not fits(case, bits, vector):
        pytest.skip("a row of this layout does not fill whole bytes")
    x, given, exact = product(case, bits, vector, dtype)
    y = flat_native.gemm_vq(x, *given, isa=isa)
    dense = reference_vq.dequantize_vq(*exact[:3], torch.float64)
    plain = torch.nn.functional.linear(x, dense.to(dtype), given[3])
    assert y.dtype == dtype
    assert_twice_plain(y, torch.nn.functional.linear(x.double(), dense, exact[3]), plain)


@pytest.mark.parametrize(("bits", "vector"), LAYOUTS, ids=str)
def test_every_codeword_lands_in_its_place(bits, vector, isa):
    """A token per column reads the weights back without any rounding."""
    k, n = 128, 2 * (1 << min(bits, 8)) + 3
    indices = torch.arange(n)[:, None] * 5 + torch.arange(k // vector) * 3
    codebook = torch.randn(1 << bits, vector, generator=torch.Generator().manual_seed(0)).half()
    packed = pack_indices(indices % (1 << bits), bits)
    y = flat_native.gemm_vq(torch.eye(k), packed, codebook, None, None, isa=isa)
    assert torch.equal(y.t(), codebook.float()[indices % (1 << bits)].flatten(1))


@pytest.mark.parametrize("addend_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out_dtype", FLOATS, ids=str)
def test_scale_bias_and_addend_come_before_one_rounding(out_dtype, addend_dtype, isa):
    for case in (Case("by_tables", 5, 64, 300), Case("by_panels", 5, 64, 100)):
        x, given, exact = product(case, 8, 4, torch.bfloat16)
        addend = torch.randn(case.M, case.N).to(addend_dtype)
        y = flat_native.gemm_vq(x, *given, addend, out_dtype, isa=isa)
        wanted = reference_vq.gemm_vq(x.double(), *exact) + addend.double()
        assert y.dtype == out_dtype
        plain = reference_vq.gemm_vq(x.float(), *given) + addend
        assert_twice_plain(y, wanted, plain.to(out_dtype))


@pytest.mark.parametrize("codebook_dtype", FLOATS, ids=str)
def test_a_codebook_may_have_any_of_the_three_dtypes(codebook_dtype, isa):
    x, given, _ = product(Case("words", 4, 64, 300), 8, 4, torch.float32)
    given[1] = given[1].to(codebook_dtype)
    wanted = reference_vq.gemm_vq(
        x.double(), *(t.double() if t.is_floating_point() else t for t in given)
    )
    assert_twice_plain(
        flat_native.gemm_vq(x, *given, isa=isa), wanted, reference_vq.gemm_vq(x, *given)
    )


@pytest.mark.parametrize(("bits", "vector"), VQ_LAYOUTS.values(), ids=VQ_LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [Case("tall", 150, 128, 300), Case("wide", 3, 640, 2100), Case("narrow", 9, 192, 70)],
    ids=str,
)
def test_threads_and_company_change_no_bit(case, bits, vector, isa, monkeypatch):
    x, given, _ = product(case, bits, vector, torch.float32)
    found = []
    for threads in (1, 2, 3, 7, 64):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(flat_native.gemm_vq(x, *given, isa=isa))
    for other in found[1:]:
        assert_same(other, found[0])
    # One or two tokens are summed in another order; more of them may come in any company.
    for rows in () if case.M == 3 else (slice(0, 3), slice(case.M - 5, case.M)):
        assert_same(flat_native.gemm_vq(x[rows], *given, isa=isa), found[0][rows].contiguous())


@pytest.mark.parametrize("n", [40, 300])
def test_a_bad_value_stays_in_its_token_and_nothing_to_do_is_nothing(n, isa):
    x, given, _ = product(Case("bad", 6, 128, n), 8, 4, torch.float32)
    clean = flat_native.gemm_vq(x, *given, isa=isa)
    x[2, 70] = float("inf")
    dirty = flat_native.gemm_vq(x, *given, isa=isa)
    others = torch.arange(6) != 2
    assert torch.equal(dirty[others], clean[others]) and not torch.isfinite(dirty[2]).any()
    assert flat_native.gemm_vq(x[:0], *given, isa=isa).shape == (0, n)
    empty = flat_native.gemm_vq(
        torch.zeros(3, 0),
        torch.zeros(n, 0, dtype=torch.uint8),
        given[1],
        given[2],
        given[3],
        isa=isa,
    )
    assert torch.equal(empty, given[3].expand(3, n))
