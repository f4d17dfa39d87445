"""A change of a weight: what it does to the weight is what it does to the layer's output."""

import pytest
import torch

from nibble.quant.weights.delta import WeightDelta, append_factors, pad_rank, round_rank

N, K, R = 6, 8, 3


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


LOW_RANK = WeightDelta(down=normal(K, R), up=normal(N, R, seed=1))
DENSE = WeightDelta(dense=normal(N, K, seed=2))
SCALED = WeightDelta(
    down=normal(K, 2, seed=3), up=normal(N, 2, seed=4), row_scale=normal(N, seed=5)
)
KINDS = {"nothing": WeightDelta(), "low rank": LOW_RANK, "dense": DENSE, "scaled": SCALED}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [None, normal(N, seed=9)], ids=["no bias", "bias"])
def test_the_output_is_that_of_the_changed_weight(kind, bias):
    change, weight, x = KINDS[kind], normal(N, K, seed=6), normal(4, K, seed=7)
    plain = torch.nn.functional.linear(x, weight, bias)
    wanted = torch.nn.functional.linear(x, change.on_weight(weight), bias)
    torch.testing.assert_close(change.on_output(plain, x, bias), wanted)


def test_a_known_change_has_the_known_weight():
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    change = WeightDelta(
        down=torch.tensor([[1.0], [0.0]]),
        up=torch.tensor([[10.0], [20.0]]),
        dense=torch.tensor([[0.0, 100.0], [0.0, 0.0]]),
        row_scale=torch.tensor([2.0, -1.0]),
    )
    wanted = torch.tensor([[12.0, 104.0], [17.0, -4.0]])
    assert torch.equal(change.on_weight(weight), wanted)


def test_a_row_scale_leaves_alone_what_unsigned_activations_folded_into_the_output():
    weight, x, fold = normal(N, K, seed=6), normal(4, K, seed=7), normal(N, seed=8)
    change = WeightDelta(row_scale=normal(N, seed=5), row_fold=fold)
    plain = torch.nn.functional.linear(x, weight, fold)
    wanted = torch.nn.functional.linear(x, change.on_weight(weight), fold)
    torch.testing.assert_close(change.on_output(plain, x), wanted)


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_one_after_another_is_one(first, second):
    weight, before, after = normal(N, K, seed=6), KINDS[first], KINDS[second]
    both = before.then(after)
    assert both.rank == before.rank + after.rank
    torch.testing.assert_close(both.on_weight(weight), after.on_weight(before.on_weight(weight)))


def test_what_changes_nothing_is_empty():
    assert WeightDelta().is_empty
    assert not any(change.is_empty for change in (LOW_RANK, DENSE, SCALED))
    assert (WeightDelta().rank, LOW_RANK.rank) == (0, R)


def test_moving_keeps_what_is_not_there():
    moved = LOW_RANK.to(torch.float64)
    assert moved.up.dtype == moved.down.dtype == torch.float64
    assert moved.dense is None
    assert moved.row_scale is None


@pytest.mark.parametrize("rank, rounded", [(0, 0), (1, 16), (16, 16), (17, 32)])
def test_ranks_are_rounded_up_with_zeros(rank, rounded):
    factor = normal(N, rank)
    padded = pad_rank(factor)
    assert round_rank(rank) == padded.shape[1] == rounded
    assert torch.equal(padded[:, :rank], factor)
    assert not padded[:, rank:].any()


def test_appended_factors_stand_behind_the_branch_s_own():
    down, up = normal(K, 2, seed=10), normal(N, 2, seed=11)
    long_down, long_up = append_factors(down, up, LOW_RANK, torch.float64)
    assert long_down.dtype == long_up.dtype == torch.float64
    assert torch.equal(long_down[:, :2].float(), down)
    torch.testing.assert_close(
        (long_up @ long_down.T).float(), up @ down.T + LOW_RANK.up @ LOW_RANK.down.T
    )
