"""Inputs recorded on few pictures: which rows are held out, and how far they are trusted."""

import pytest
import torch

from nibble.quant.calibration.hessian import covariance
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.svdquant.decompose import quantize_linear
from nibble.quant.svdquant.problem import layer_problem
from nibble.quant.svdquant.recipe import Recipe

K, ROWS = 64, 32


def inputs(pictures: int, seed: int = 0) -> torch.Tensor:
    """(pictures, ROWS, K): rows of a picture are alike, pictures differ."""
    draw = torch.Generator().manual_seed(seed)
    of_picture = torch.randn(pictures, 1, K, generator=draw)
    return of_picture + 0.1 * torch.randn(pictures, ROWS, K, generator=draw)


def recorded(x: torch.Tensor, told: bool, at_once: bool = False) -> InputStats:
    stats = InputStats.empty(K, samples=4096, hessian_block=64)
    if at_once:
        stats.update(x, 0 if told else None)
        return stats
    for number, picture in enumerate(x):
        stats.update(picture[None], number if told else None)
    return stats


def problem(stats: InputStats):
    weight = torch.randn(32, K, generator=torch.Generator().manual_seed(3))
    return layer_problem(weight, None, stats, False, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("at_once", [True, False])
def test_a_row_belongs_to_its_picture(at_once):
    x = torch.arange(5.0)[:, None, None].expand(5, ROWS, K)
    stats = recorded(x, told=True, at_once=at_once)
    assert stats.pictures == 5
    assert torch.equal(stats.owners, stats.samples[:, 0].long())
    assert torch.equal(recorded(x, told=False).samples, recorded(x, told=True).samples)


@pytest.mark.parametrize("pictures, held", [(2, {1}), (3, {2}), (8, {6, 7}), (12, {9, 10, 11})])
def test_whole_pictures_are_held_out(pictures, held):
    x = torch.arange(float(pictures))[:, None, None] + torch.rand(pictures, ROWS, K) / 2
    found = problem(recorded(x, told=True))
    assert set(found.held_out[:, 0].floor().tolist()) == held
    assert set(found.x[:, 0].floor().tolist()) == set(range(pictures)) - held


def test_one_picture_has_nothing_to_hold_out_but_rows():
    found = problem(recorded(inputs(1), told=True))
    assert (len(found.x), len(found.held_out)) == (ROWS * 3 // 4, ROWS // 4)


def test_few_pictures_are_trusted_less_and_a_dozen_wholly():
    for pictures, share in ((1, 11 / 12), (3, 1 / 4), (ENOUGH_PICTURES, 0.0), (20, 0.0)):
        stats = recorded(inputs(pictures), told=True)
        plain = covariance(stats, False, torch.device("cpu"))
        expected = (1 - share) * plain + share * torch.diag(stats.mean_square)
        found = problem(stats).covariance
        torch.testing.assert_close(found, expected)
        assert torch.equal(found, plain) == (share == 0)
    unknown = recorded(inputs(1), told=False)
    found = problem(unknown).covariance
    assert torch.equal(found, covariance(unknown, False, torch.device("cpu")))


def test_a_layer_measured_on_one_picture_serves_other_pictures():
    """The error of other pictures, with the correlations of one taken as they are, and not."""
    draw = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(128, K, generator=draw), torch.zeros(128)
    others = inputs(32, seed=9).flatten(0, 1)
    errors = []
    for told in (False, True):
        best = Recipe.from_preset("best", rank=16, iterations=2, smoothing_grid=1)
        made, _ = quantize_linear(weight, bias, recorded(inputs(1), told), best)
        errors.append((made.forward(others) - others @ weight.T).norm().item())
    assert errors[1] < 0.7 * errors[0]
