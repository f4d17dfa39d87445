"""The W4A4 ops through Triton: their arithmetic in its interpreter, and what it compiles them to
for GPUs that are not here.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import check_triton
import triton_interpreted as interpreted
from cases import Case, make_input
from compare import assert_same, assert_twice_plain, relative_error
from nibble.kernels import reference
from nibble.kernels.params import Activations
from nibble.quant.weights.packing import unpack_int4

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: it comes with torch on Linux, on Windows as triton-windows",
)
FLOAT32_ROUNDING = 2e-7
PLAIN = [case for case in interpreted.CASES if not case.rotation]
ROTATED = [case for case in interpreted.CASES if case.rotation]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    script = Path(interpreted.__file__)
    done = subprocess.run(
        [sys.executable, script, path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=False)


def operands(case, dtype):
    """x, the layer, and the reference's activations."""
    x, p = make_input(case, dtype), interpreted.layer(case, dtype)
    return x, p, Activations(*reference.quantize_down(x, *p.quantizer), p.act_unsigned)


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_codes_and_scales_have_the_references_bits(case, dtype, results):
    x, p, wanted = operands(case, dtype)
    q, ascales, h = results[case.name, dtype]["quantized"]
    assert_same(q, wanted.q)
    assert_same(ascales, wanted.ascales)
    assert relative_error(h, x.double() @ p.proj_down.double()) < FLOAT32_ROUNDING


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
@pytest.mark.parametrize("case", ROTATED, ids=str)
def test_rotated_codes_differ_at_most_where_a_value_is_a_tie(case, dtype, results):
    wanted = operands(case, dtype)[2]
    q, ascales, _ = results[case.name, dtype]["quantized"]
    torch.testing.assert_close(ascales, wanted.ascales, rtol=1e-6, atol=0)
    difference = (unpack_int4(q) - unpack_int4(wanted.q)).abs()
    assert difference.max() <= 1 and (difference != 0).sum() <= 1 + 1e-3 * difference.numel()


@pytest.mark.parametrize("way", interpreted.WAYS)
@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
@pytest.mark.parametrize("case", interpreted.CASES, ids=str)
def test_a_product_is_the_float64_references(case, dtype, way, results):
    _, p, act = operands(case, dtype)
    exact = [None if t is None else t.double() for t in (*p.product[1:],)]
    wanted = reference.gemm_w4a4_up(
        act.q, act.ascales.double(), act.h.double(), p.weight, *exact, act.act_unsigned
    )
    found = results[case.name, dtype]["products"][way]
    assert found.dtype == torch.float32 and relative_error(found, wanted) < FLOAT32_ROUNDING


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_whole_linear_is_the_references(case, dtype, results):
    x, p, _ = operands(case, dtype)
    found = results[case.name, dtype]["linear"]
    doubles = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in p]
    plain = reference.linear_w4a4(x, *p)
    assert found.dtype == dtype
    assert_twice_plain(found, reference.linear_w4a4(x.double(), *doubles), plain)


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
def test_parameters_of_another_dtype_lose_nothing(dtype, results):
    x, p = interpreted.mixed(dtype)
    q, ascales, h = results["mixed", dtype]
    wanted = reference.quantize_down(x, *p.quantizer)
    assert_same(q, wanted[0])
    assert_same(ascales, wanted[1])
    assert relative_error(h, x.double() @ p.proj_down.double()) < FLOAT32_ROUNDING


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
def test_signs_may_change_at_a_column_and_rows_may_lie_apart(dtype, results):
    x, p = interpreted.signs_of_both(dtype)
    found, wanted = results["both", dtype], reference.quantize_down(x, *p.quantizer)
    for ours, theirs in zip(found["quantized"][:2], wanted[:2], strict=True):
        assert_same(ours, theirs)
    doubles = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in p]
    exact = reference.linear_w4a4(x.double(), *doubles)
    assert_twice_plain(found["linear"], exact, reference.linear_w4a4(x, *p))


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
def test_codes_of_8_bits(dtype, results):
    x, p = interpreted.eight_bits(dtype)
    found, wanted = results["eight", dtype], reference.quantize_down(x, *p.quantizer)
    for ours, theirs in zip(found["quantized"][:2], wanted[:2], strict=True):
        assert_same(ours, theirs)
    doubles = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in p]
    exact = reference.linear_w4a4(x.double(), *doubles)
    assert_twice_plain(found["linear"], exact, reference.linear_w4a4(x, *p))
    wide = [None if t is None else t.double() for t in p.product[1:]]
    scaled = wanted[0], wanted[1].double(), wanted[2].double()
    sums = reference.gemm_w4a4_up(*scaled, p.weight, *wide, False, p.unsigned_from, 8)
    for way in interpreted.WAYS:
        assert relative_error(found["products"][way], sums) < FLOAT32_ROUNDING


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
def test_a_group_shares_one_quantization(dtype, results):
    x, p = make_input(interpreted.MIDDLE, dtype), interpreted.group(dtype)
    for found, wanted in zip(
        results["group", dtype], reference.linear_w4a4_grouped(x, *p), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
def test_an_mlps_middle_follows_its_reference(dtype, results):
    a = interpreted.gelu_arguments(dtype)
    wanted = reference.gemm_w4a4_up_gelu_quantize_down(*a[:12], dtype)
    q, ascales, h = results["gelu", dtype]
    # one rounding of `mid_dtype` may fall the other way
    torch.testing.assert_close(ascales, wanted[1], rtol=2e-3, atol=0)
    torch.testing.assert_close(h, wanted[2], rtol=2e-3, atol=2e-3)
    assert (unpack_int4(q) != unpack_int4(wanted[0])).float().mean() < 5e-3


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
def test_any_number_at_all_is_treated_as_the_reference_does(dtype, unsigned, results):
    x, p = interpreted.random_bits(dtype)
    wanted = reference.quantize_down(x, *p._replace(act_unsigned=unsigned))
    q, ascales, _ = results["bits", dtype, unsigned]
    assert wanted[1].isnan().any() and wanted[1].isinf().any()
    assert_same(q, wanted[0])
    assert_same(ascales.nan_to_num(-1), wanted[1].nan_to_num(-1))


def run_ptx(code: str, word: int) -> int:
    """What `shl`, `shr` and `and` of 32 bits make of $1."""
    registers = {"$1": word}
    for name, target, first, second in re.findall(r"(\w+)\.[bu]32 (\S+), (\S+), (\w+);", code):
        value, by = registers[first], int(second, 0)
        operator = {"shl": int.__lshift__, "shr": int.__rshift__, "and": int.__and__}[name]
        registers[target] = operator(value, by) & 0xFFFFFFFF
    return registers["$0"]


@pytest.mark.parametrize("half", ["LOW", "HIGH"])
@pytest.mark.parametrize("form", ["SIGNED", "UNSIGNED"])
def test_four_bytes_come_apart_into_codes(half, form):
    from nibble.kernels.backends import triton_kernels

    code = getattr(triton_kernels, f"{half}_{form}").value
    packed = torch.arange(256, dtype=torch.uint8)
    nibbles = unpack_int4(packed.view(torch.int8), form == "SIGNED").view(256, 2)
    wanted = nibbles[:, int(half == "HIGH")].int() * (16 if form == "SIGNED" else 1)
    words = packed.numpy().view("<u4").tolist()
    found = torch.tensor([list(run_ptx(code, word).to_bytes(4, "little")) for word in words])
    assert torch.equal(found.flatten().to(torch.uint8).view(torch.int8).int(), wanted)


@pytest.fixture
def ada(monkeypatch, tmp_path):
    """Triton as it is on an RTX 40, but for the last step: kernels are compiled and not started.
    Returns the kernels that were."""
    import triton
    from triton.backends.compiler import GPUTarget

    from nibble.kernels.backends import triton_w4a4
    from nibble.kernels.backends.triton import Gpu

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 89, 32))

    made = []

    def run(kernel, *arguments, **named):
        made.append(real(kernel, *arguments, **(named | {"warmup": True})))

    real = triton.runtime.jit.JITFunction.run
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", run)
    monkeypatch.setattr(triton_w4a4, "_gpu", lambda device: Gpu("cuda", "89", 128))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_arguments_of_a_launch_fit_the_kernels(bias, ada):
    from nibble.kernels.backends import triton_w4a4

    case = Case("", 70, 128, 72, R=1 if bias else 33, bias=bias, act_unsigned=bias)
    x, p = make_input(case, torch.bfloat16), interpreted.layer(case, torch.bfloat16)
    y = triton_w4a4.linear_w4a4(x, p)
    assert y.shape == (70, 72) and y.dtype == torch.bfloat16
    assert [made.metadata.name for made in ada] == ["quantize_down", "gemm_up"]
    assert "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32" in ada[1].asm["ptx"]


@pytest.mark.parametrize("arch", ["80", "89"])
def test_a_product_compiles_to_integer_mma_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from nibble.kernels.backends.triton_w4a4 import NVIDIA

    found = check_triton.compiled(arch, *check_triton.product(arch, NVIDIA[-1], "unsigned"))
    assert found.instructions["IMMA"] >= 16 and not found.spills
    assert not found.instructions.get("I2FP")  # integer sums become floats by an addition
