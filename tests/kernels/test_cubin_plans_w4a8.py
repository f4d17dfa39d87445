"""Cubins of weights that are read as int8 are started as the compiled extension starts its kernels:
see `test_cubin_plans`.
"""

from __future__ import annotations

import itertools

import pytest

from emulator import emulated
from nibble.kernels.backends.cubins import kernels, plans_w4a8, structs
from nibble.kernels.backends.cubins.module import CubinModule
from nibble.kernels.backends.cubins.plans import Gpu
from test_cubin_plans import GPUS, SHAPES, compare, fill, known


def linear(m: int, n: int, k: int, rank: int, **values):
    given = {"x_dtype": 2, "param_dtype": 2, "group": 32, "x_stride": k + 8} | values
    return fill(structs.LinearW4A8(), M=m, N=n, K=k, R=rank, **given)


@pytest.mark.parametrize("gpu", GPUS, ids=str)
def test_a_whole_linear(gpu):
    for (m, n, k), rank in itertools.product(SHAPES, (0, 32, 33, 160)):
        for x, param, rotate in itertools.product((0, 1, 2), (1, 2), (False, True)):
            op = linear(m, n, k, rank, x_dtype=x, param_dtype=param, rotate=rotate)
            compare("linear_w4a8", plans_w4a8.linear_w4a8, op, gpu)
            known(gpu, plans_w4a8.linear_w4a8, op)


def test_scratch_is_as_large_as_the_extensions():
    for m, n, k, rank in ((1, 64, 64, 0), (77, 136, 192, 33), (4608, 3072, 3072, 32)):
        sizes = {"M": m, "N": n, "K": k, "R": rank, "codes": structs.INT8}
        mine = CubinModule.workspace_bytes("linear_w4a8", 90, **sizes)
        theirs = emulated._workspace("linear_w4a8", 90, m, n, k, rank, structs.INT8)
        assert mine == theirs.numel()


def test_parameters_of_32_bits_are_refused_in_the_same_words():
    op = linear(4, 128, 64, 0, param_dtype=0)
    compare("linear_w4a8", plans_w4a8.linear_w4a8, op, Gpu(89, 82))
    with pytest.raises(ValueError, match="float16 or bfloat16, not float32"):
        plans_w4a8.linear_w4a8(op, Gpu(89, 82))


def test_a_tile_may_be_asked_for():
    op = linear(300, 200, 128, 8)
    names = [
        plans_w4a8.linear_w4a8(op, Gpu(89, 82), rows)[-1].kernel.name for rows in kernels.W4A8_ROWS
    ]
    assert names == [f"w4a8::w4a8_gemm_kernel<false, bf16, {rows}>" for rows in (32, 64, 128)]
