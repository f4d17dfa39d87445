"""Cubins of 4-bit floats are started as the compiled extension starts its kernels: see
`test_cubin_plans`.
"""

from __future__ import annotations

import itertools

import pytest

from nibble.kernels.backends.cubins import kernels, plans_nvfp4, structs
from nibble.kernels.backends.cubins.plans import Gpu
from test_cubin_plans import SHAPES, compare, fill, known

GPUS = [Gpu(120, 4), Gpu(121, 48), Gpu(120, 170)]


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_quantizer(gpu):
    for (m, _, k), rank in itertools.product(SHAPES, (0, 32, 33, 160)):
        for x, param in itertools.product((0, 1, 2), (1, 2)):
            op = fill(structs.QuantizeNvfp4Down(), M=m, K=k, R=rank, x_stride=k + 8)
            op.x_dtype, op.param_dtype = x, param
            compare("quantize_nvfp4_down", plans_nvfp4.quantize_nvfp4_down, op, gpu)
            known(gpu, plans_nvfp4.quantize_nvfp4_down, op)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_product(gpu):
    for (m, n, k), rank, param in itertools.product(SHAPES, (0, 33), (1, 2)):
        op = fill(structs.GemmNvfp4Up(), M=m, N=n, K=k, R=rank, param_dtype=param, out_dtype=2)
        compare("gemm_nvfp4_up", plans_nvfp4.gemm_nvfp4_up, op, gpu)
        known(gpu, plans_nvfp4.gemm_nvfp4_up, op)


def test_other_gpus_are_refused_in_the_same_words():
    op = fill(structs.GemmNvfp4Up(), M=4, N=128, K=64, param_dtype=2)
    compare("gemm_nvfp4_up", plans_nvfp4.gemm_nvfp4_up, op, Gpu(100, 148))
    assert not any("nvfp4" in kernel.name for kernel in kernels.of("100f"))


def test_parameters_of_32_bits_are_refused():
    op = fill(structs.QuantizeNvfp4Down(), M=4, K=64, param_dtype=0)
    with pytest.raises(ValueError, match="not float32"):
        plans_nvfp4.quantize_nvfp4_down(op, Gpu(120, 4))


def test_a_tile_may_be_asked_for():
    op = fill(structs.GemmNvfp4Up(), M=300, N=200, K=128, param_dtype=2)
    heights = [plans_nvfp4.product(op, rows)[0].kernel.name for rows in kernels.NVFP4_ROWS]
    assert heights == [f"nvfp4::gemm_kernel<bf16, {rows}>" for rows in (64, 128, 256)]
