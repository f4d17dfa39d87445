"""GPTQ's columns gone over once more: what the definition of coordinate descent gives, on every
grid.
"""

import pytest
import torch

from nibble.quant.svdquant.gptq import gptq_on
from nibble.quant.svdquant.grid import EvenGrid, TableGrid
from nibble.quant.svdquant.stock.formats import FORMATS

N, K = 12, 256  # two blocks of the Hessian
GRIDS = ["int4", "table", *FORMATS]


def problem(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=draw)
    x = torch.randn(400, 40, generator=draw) @ torch.randn(40, K, generator=draw)
    x += torch.randn(400, K, generator=draw)
    parts = x.reshape(400, 2, K // 2).transpose(0, 1)
    return weight, parts.mT @ parts / 400


def grid_of(name, weight):
    if name == "int4":
        return EvenGrid()
    if name == "table":
        return TableGrid.fitted(weight, 32).for_rows_of(weight)
    return FORMATS[name].grid(weight)


def errors(weight, dense, hessian):
    """Squared output error of each output, float64 (N,)."""
    d = (weight - dense).double().reshape(N, 2, K // 2).transpose(0, 1)
    return ((d @ hessian.double()) * d).sum((0, 2))


@pytest.mark.parametrize("name", GRIDS)
def test_no_output_gets_worse_and_most_get_better(name):
    weight, hessian = problem()
    grid = grid_of(name, weight)
    once, twice = (gptq_on(grid, weight, hessian, twice=twice) for twice in (False, True))
    assert torch.equal(once.scale, twice.scale)
    before, after = (errors(weight, found.dense(), hessian) for found in (once, twice))
    assert (after <= before * (1 + 1e-5)).all()
    assert (after < before).sum() > N / 2


@pytest.mark.parametrize("name", GRIDS)
def test_each_column_takes_its_best_value_beside_all_others(name):
    """Column by column in float64, from the whole matrix: q + [H (w - q)] / H_jj, rounded."""
    weight, hessian = problem(1)
    grid = grid_of(name, weight)
    once, twice = (gptq_on(grid, weight, hessian, twice=twice) for twice in (False, True))
    whole = torch.block_diag(*hessian).double()
    values = once.dense().double()
    for j in range(K):
        pull = (weight.double() - values) @ whole[:, j] / whole[j, j]
        best = (values[:, j] + pull).float()[None]
        scale = once.scale[j // grid.group][None]
        values[:, j] = grid.values(grid.codes(best, scale), scale).double()[0]
    assert (twice.dense() != values.float()).float().mean() < 0.002  # float32 may tie otherwise
