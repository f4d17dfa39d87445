"""Codebook linears through Triton: their arithmetic in its interpreter, and what it compiles them
to for GPUs that are not here.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import check_triton
import triton_interpreted_vq as interpreted
from cases import make_input
from compare import assert_same, assert_twice_plain
from nibble.kernels.reference import vq as reference

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton is not installed: it comes with torch on Linux, on Windows as triton-windows",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton") / "results.pt"
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, Path(interpreted.__file__), path],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=False)


def check(found, x, p):
    doubles = [t.double() if torch.is_tensor(t) and t.is_floating_point() else t for t in p]
    exact = reference.linear_vq(x.double(), *doubles)
    dense = reference.dequantize_vq(p.indices, p.codebook, p.scale).to(x.dtype)
    act = reference.hadamard64(x) if p.rotation else x
    plain = act @ dense.t()
    if p.proj_down is not None:
        plain += (x @ p.proj_down.to(x.dtype)) @ p.proj_up.to(x.dtype).t()
    if p.bias is not None:
        plain += p.bias.to(x.dtype)
    assert found.dtype == x.dtype
    assert_twice_plain(found, exact, plain)


@pytest.mark.parametrize("layout", interpreted.LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
@pytest.mark.parametrize("case", interpreted.CASES, ids=str)
def test_a_linear_is_as_exact_as_plain_torch(case, dtype, layout, results):
    x, p = make_input(case, dtype), interpreted.layer(case, *layout, dtype)
    check(results[(case.name, dtype, *layout)], x, p)


@pytest.mark.parametrize("layout", interpreted.LAYOUTS, ids=str)
def test_every_codeword_at_every_place(layout, results):
    """One-hot tokens read weights back without any rounding."""
    assert_same(results[("places", *layout)], interpreted.places(*layout)[1].t().contiguous())


@pytest.mark.parametrize("dtype", interpreted.DTYPES, ids=str)
def test_rows_may_lie_apart_and_parameters_have_another_dtype(dtype, results):
    p = interpreted.layer(interpreted.CASES[1], 6, 4, torch.float32)
    check(results["columns", dtype], interpreted.columns(dtype), p)


def test_what_is_not_finite_stays_in_its_token(results):
    x, p = interpreted.extremes()
    found = results["extremes"]
    assert not found[[1, 2]].isfinite().any()
    rest = [row for row in range(len(x)) if row not in (1, 2)]
    weight = p.codebook[0].repeat(32)[None].expand(67, -1)
    wanted = x[rest].float() @ weight.float().t()
    torch.testing.assert_close(found[rest].float(), wanted, rtol=2e-3, atol=0.5)


@pytest.mark.parametrize(
    ("arch", "instruction"),
    [("80", "HMMA"), ("90", "HGMMA"), ("gfx1100", "v_wmma_f32_16x16x16_bf16")],
)
def test_a_product_compiles_to_matrix_products_without_spills(
    arch, instruction, tmp_path, monkeypatch
):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for words, job in check_triton.vq_jobs(arch, everything=False):
        found = check_triton.compiled(arch, *job)
        assert instruction in found.matrix and not found.spills, (words, found)
