"""Inputs recorded on few pictures: which rows are held out, and how far they are trusted."""

from dataclasses import replace

import pytest
import torch

from nibble.quant.calibration.hessian import covariance
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.svdquant import problem as layer_problems
from nibble.quant.svdquant.choice import closer
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
    count = len(x) if told else 0
    stats = InputStats.empty(K, samples=4096, hessian_block=64, pictures=count)
    if at_once:
        stats.update(x, range(count) if told else None)
        return stats
    for number, picture in enumerate(x):
        stats.update(picture, range(number, number + 1) if told else None)
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


@pytest.mark.parametrize(
    "pictures, chosen_by, told",
    [(2, {1}, {1}), (3, {2}, {2}), (6, {5}, {5}), (8, {3}, {7}), (13, {4}, {8, 12})],
)
def test_whole_pictures_are_held_out(pictures, chosen_by, told):
    x = torch.arange(float(pictures))[:, None, None] + torch.rand(pictures, ROWS, K) / 2
    found = problem(recorded(x, told=True))
    assert set(found.judges[:, 0].floor().tolist()) == chosen_by
    assert set(found.held_out[:, 0].floor().tolist()) == told
    assert set(found.x[:, 0].floor().tolist()) == set(range(pictures)) - chosen_by - told


def test_one_picture_has_nothing_to_hold_out_but_rows():
    found = problem(recorded(inputs(1), told=True))
    assert (len(found.x), len(found.held_out)) == (ROWS * 3 // 4, ROWS // 4)


@pytest.mark.parametrize("tokens", [32, 1024])
def test_the_fewer_tokens_the_less_correlations_count(tokens):
    stats = InputStats.empty(K, hessian_block=64)
    stats.update(inputs(tokens // ROWS))
    plain = covariance(stats, False, torch.device("cpu"))
    share = 2 * K / (2 * K + tokens)
    expected = (1 - share) * plain + share * torch.diag(stats.mean_square)
    torch.testing.assert_close(problem(stats).covariance, expected)


def test_nothing_is_fitted_to_pictures_that_are_held_out():
    x = inputs(8)
    whole = recorded(x, told=True)
    seen = InputStats.empty(K, samples=4096, hessian_block=64)
    for number in (0, 1, 2, 4, 5, 6):
        seen.update(x[number])
    assert whole.count == seen.count
    for moments in ("mean", "mean_square", "hessian"):
        torch.testing.assert_close(getattr(whole, moments), getattr(seen, moments))


@pytest.mark.parametrize("at_once", [True, False])
def test_the_last_fit_is_to_all_pictures(at_once):
    x = inputs(8)
    found = recorded(x, told=True, at_once=at_once).whole()
    rows = x.flatten(0, 1)
    assert found.count == len(rows) and not found.held_out.any()
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.mean_square, rows.square().mean(0))
    torch.testing.assert_close(found.hessian, (rows.T @ rows / len(rows))[None])
    alone = recorded(inputs(1), told=True)
    assert alone.whole() is alone


def test_a_layer_measured_on_one_picture_serves_other_pictures(monkeypatch):
    """The error of other pictures, with the correlations of one taken as they are, and not."""
    draw = torch.Generator().manual_seed(5)
    weight, bias = torch.randn(128, K, generator=draw), torch.zeros(128)
    others = inputs(32, seed=9).flatten(0, 1)
    errors = []
    for share in (0.0, None):
        with monkeypatch.context() as patched:
            if share is not None:
                patched.setattr(layer_problems, "shrinkage", lambda tokens, inputs: 0.0)
            best = Recipe.from_preset("best", rank=16, iterations=2, smoothing_grid=1)
            made, _ = quantize_linear(weight, bias, recorded(inputs(1), told=False), best)
        errors.append((made.forward(others) - others @ weight.T).norm().item())
    assert errors[1] < 0.7 * errors[0]


def test_where_a_calibrated_layer_is_worse_on_held_out_pictures_the_data_free_one_is_kept():
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(32, K, generator=draw)
    stats = recorded(inputs(8), told=True)
    good, _ = quantize_linear(weight, None, None, Recipe.from_preset("fast", rank=16))
    bad = replace(good, scale=good.scale * 1.5)
    asked: list[int] = []

    def data_free():
        asked.append(1)
        return good

    found = closer(weight, None, stats, bad, data_free)
    assert found is not None and found[0] is good
    assert closer(weight, None, stats, good, lambda: bad) is None
    assert closer(weight, None, recorded(inputs(8), told=False), bad, data_free) is None
    assert closer(weight, None, None, bad, data_free) is None
    assert len(asked) == 1
