"""Linears of weights that are read as int8 through Triton: their arithmetic in its interpreter, and
what it compiles them to for GPUs that are not here.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import check_triton
import triton_interpreted_w4a8 as interpreted
from cases import make_input
from compare import assert_same, assert_twice_plain, relative_error
from nibble.kernels.reference import w4a8 as reference
from nibble.quant.weights.packing import pack_int4

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: it comes with torch on Linux, on Windows as triton-windows",
)
FLOAT32_ROUNDING = 2e-7
PLAIN = [case for case in interpreted.CASES if not case.rotation]


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


def in_order(q):
    """Codes whose even columns come first of each 64, in the columns' own order."""
    return q.unflatten(1, (-1, 2, 32)).transpose(2, 3).flatten(1)


def wanted_codes(x, p):
    smoothed = reference.smoothed(x.float(), p.smooth_factor, p.rotation)
    codes, scale = reference.quantize_tokens(smoothed)
    return codes.nan_to_num(0).to(torch.int8), scale[:, 0]


def check(found, x, p):
    """Codes and scales to the bit, the product within twice the reference's own error."""
    (q, ascales, h), y = found
    codes, scale = wanted_codes(x, p)
    assert_same(ascales, scale)
    assert_same(in_order(q), codes)
    check_product(h, y, x, p)


def check_product(h, y, x, p):
    if p.proj_down is not None:
        assert relative_error(h, x.double() @ p.proj_down.double()) < FLOAT32_ROUNDING
    doubles = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in p]
    exact = reference.linear_w4a8(x.double(), *doubles)
    assert y.dtype == x.dtype
    assert_twice_plain(y, exact, reference.linear_w4a8(x, *p))


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_a_linear_is_the_references(case, dtype, results):
    x, p = make_input(case, dtype), interpreted.layer(case, dtype)
    check(results[case.name, dtype], x, p)


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
def test_a_rotated_code_differs_at_most_where_a_value_is_a_tie(dtype, results):
    case = next(case for case in interpreted.CASES if case.rotation)
    x, p = make_input(case, dtype), interpreted.layer(case, dtype)
    (q, ascales, h), y = results[case.name, dtype]
    codes, scale = wanted_codes(x, p)
    torch.testing.assert_close(ascales, scale, rtol=1e-6, atol=0)
    difference = (in_order(q).int() - codes.int()).abs()
    assert difference.max() <= 1 and (difference != 0).sum() <= 1 + 1e-3 * difference.numel()
    assert relative_error(y, reference.linear_w4a8(x, *p)) < 2e-3
    assert relative_error(h, x.double() @ p.proj_down.double()) < FLOAT32_ROUNDING


@pytest.mark.parametrize("group", interpreted.GROUPS)
def test_any_group_of_columns_may_share_a_scale(group, results):
    dtype = interpreted.DTYPES[0]
    x = make_input(interpreted.MIDDLE, dtype)
    check(results["group", group], x, interpreted.layer(interpreted.MIDDLE, dtype, group))


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
def test_rows_may_lie_apart_and_parameters_have_another_dtype(dtype, results):
    check(results["mixed", dtype], *interpreted.mixed(dtype))


def test_codes_multiplied_as_floats_give_the_same(results):
    x = make_input(interpreted.MIDDLE, torch.float32)
    check(results["floats"], x, interpreted.layer(interpreted.MIDDLE, torch.float32))


def test_what_is_not_finite_stays_in_its_token(results):
    x, p = interpreted.extremes()
    (q, ascales, _), y = results["extremes"]
    codes, scale = wanted_codes(x, p)
    assert_same(ascales.nan_to_num(-1, -2), scale.nan_to_num(-1, -2))
    assert_same(in_order(q)[3:], codes[3:])
    wanted = reference.linear_w4a8(x, *p)
    assert not y[[1, 2]].isfinite().any() and not wanted[[1, 2]].isfinite().any()
    torch.testing.assert_close(y[[0, 3, 4, 5]], wanted[[0, 3, 4, 5]])


# ---- the look-up in PTX --------------------------------------------------------------------------


def permuted(first: int, second: int, selector: int) -> int:
    """prmt.b32 of selectors that replicate no sign."""
    data = first.to_bytes(4, "little") + second.to_bytes(4, "little")
    return int.from_bytes([data[selector >> 4 * i & 15] for i in range(4)], "little")


def run_ptx(code: str, registers: dict[str, int]) -> dict[str, int]:
    """What shl, shr, and, or and prmt of 32 bits leave in the registers."""
    operators = {"shr": int.__rshift__, "and": int.__and__, "or": int.__or__, "prmt": permuted}
    for line in code.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name.startswith((".", "}")) and name:
            target, *others = operands.split(", ")
            values = [registers[o] if o in registers else int(o, 0) for o in others]
            registers[target] = operators[name.split(".")[0]](*values) & 0xFFFFFFFF
    return registers


def test_eight_levels_are_looked_up_at_once():
    from nibble.kernels.backends import triton_w4a8_kernels

    code = triton_w4a8_kernels.LEVELS.value
    table = torch.randperm(256)[:16].sub(128).to(torch.int8)
    words = [int(word) & 0xFFFFFFFF for word in table.view(torch.int32)]
    nibbles = torch.arange(512).view(64, 8) * 7 % 16
    for row in nibbles:
        four = int(pack_int4(row[None]).view(torch.int32)) & 0xFFFFFFFF
        after = run_ptx(
            code, dict(zip(("$2", "$3", "$7", "$11", "$15"), [four, *words], strict=True))
        )
        for name, columns in (("$0", row[0::2]), ("$1", row[1::2])):
            found = list(after[name].to_bytes(4, "little"))
            assert found == table[columns].view(torch.uint8).tolist()


@pytest.mark.parametrize(("arch", "instruction"), [("80", "IMMA"), ("90", "IGMMA")])
def test_a_product_compiles_to_integer_products_without_spills(
    arch, instruction, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    words, job = check_triton.w4a8_jobs(arch, everything=False)[0]
    found = check_triton.compiled(arch, *job)
    assert instruction in found.matrix and not found.spills, (words, found)
