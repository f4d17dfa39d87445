"""Linears of 4-bit floats through Triton: their arithmetic in its interpreter, and what it compiles
them to for Blackwells that are not here.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import check_triton
import triton_interpreted_nvfp4 as interpreted
from compare import assert_same, assert_twice_plain, relative_error
from nibble.kernels.reference import nvfp4 as reference

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: it comes with torch on Linux, on Windows as triton-windows",
)


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


def same_numbers(found, x, p) -> None:
    q, scale, _ = found
    codes, wanted = reference.quantize_nvfp4(x.float() / p.smooth_factor.float(), p.rounded)
    assert torch.equal(scale, wanted.view(torch.uint8))
    ours = reference.decoded_weight(q.view(torch.int8), wanted, torch.float64)
    theirs = reference.dequantize_nvfp4(codes, wanted, torch.float64)
    assert_same(ours.nan_to_num(7), theirs.nan_to_num(7))


@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
@pytest.mark.parametrize("name", interpreted.SHAPES)
def test_a_linear_is_the_references(name, dtype, rounded, results):
    x, p = interpreted.layer(name, dtype, rounded)
    quantized, y = results[name, dtype, rounded]
    same_numbers(quantized, x, p)
    assert relative_error(quantized[2], x.double() @ p.proj_down.double()) < 2e-7
    floats = [None if t is None else t.double() for t in p[2:7]]
    codes, scale = reference.quantize_nvfp4(x.float() / p.smooth_factor.float(), rounded)
    numbers = reference.dequantize_nvfp4(codes, scale, torch.float64)
    product = numbers @ reference.decoded_weight(p.weight, p.weight_scale, torch.float64).t()
    exact = reference.finished(product, x.double(), floats[0], *floats[2:])
    assert_twice_plain(y, exact, reference.linear_nvfp4(x, *p))


def test_extreme_numbers_are_the_references(results):
    same_numbers(results["extremes"], *interpreted.extremes())


@pytest.mark.parametrize(("arch", "instruction"), [("120", "OMMA"), ("100", "UTCOMMA")])
def test_blackwell_multiplies_4_bit_floats_without_spills(arch, instruction):
    words, job = check_triton.nvfp4_jobs(arch, everything=False)[0]
    found = check_triton.compiled(arch, *job)
    assert instruction in found.matrix, found.instructions
    assert not found.spills, words
