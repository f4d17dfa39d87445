"""FEATHER's criterion and stages, with answers worked out by hand."""

import math

import pytest
import torch

from nibble.accel import feather
from nibble.accel.feather import Stage


def test_scores_worked_out_by_hand():
    """One head, d = 4: logits are q·k / 2 = (0, ln 3), so the softmax is (1/4, 3/4)."""
    query = torch.tensor([[2.0, 0, 0, 0]])
    keys = torch.tensor([[[0.0, 5, 0, 0], [math.log(3), 0, 7, 0]]])
    torch.testing.assert_close(feather.last_token_scores(query, keys), torch.tensor([0.25, 0.75]))


def test_heads_that_share_keys_are_averaged():
    """Four query heads over two key heads: heads 0, 1 read key head 0, heads 2, 3 key head 1, as
    grouped-query attention repeats keys.
    """
    generator = torch.Generator().manual_seed(0)
    query, keys = torch.randn(4, 8, generator=generator), torch.randn(2, 5, 8, generator=generator)
    repeated = keys.repeat_interleave(2, 0)
    expected = torch.stack(
        [torch.softmax(repeated[h] @ query[h] / math.sqrt(8), 0) for h in range(4)]
    ).mean(0)
    torch.testing.assert_close(feather.last_token_scores(query, keys), expected)
    with pytest.raises(ValueError, match="3 query heads"):
        feather.last_token_scores(query[:3], keys)


def test_the_grid_takes_every_third_token_in_both_directions():
    assert feather.grid(4, 5, 3).nonzero().flatten().tolist() == [0, 3, 15, 18]
    assert not feather.grid(4, 5, 0).any()
    assert feather.grid(27, 27, 3).sum() == 81, "the paper's 729 tokens"


def test_the_papers_first_stage():
    """729 tokens, R = 0.7: 218 by score and 81 of the grid, less those that are both."""
    scores = torch.rand(729, generator=torch.Generator().manual_seed(1))
    fixed = feather.grid(27, 27, 3)
    mask = feather.keep_mask(scores, torch.ones(729, dtype=torch.bool), Stage(8, 0.3, 3), fixed)
    top = torch.zeros(729, dtype=torch.bool)
    top[scores.topk(218).indices] = True
    assert torch.equal(mask, top | fixed)
    second = feather.keep_mask(scores, mask, Stage(16, 0.09))
    assert second.sum() == int(0.09 * mask.sum())
    assert not (second & ~mask).any()


def test_equal_scores_go_to_the_first_and_one_token_always_stays():
    left = torch.tensor([False, True, True, True, True])
    assert feather.keep_mask(torch.ones(5), left, Stage(1, 0.5)).tolist() == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert feather.keep_mask(torch.ones(5), left, Stage(1, 0.01)).sum() == 1
    assert torch.equal(feather.keep_mask(torch.rand(5), left, Stage(1, 1.0)), left), (
        "a share of 1 keeps all"
    )


def test_uniform_keeps_even_distances():
    assert feather.even_mask(10, 5).nonzero().flatten().tolist() == [0, 2, 4, 6, 8]
    assert feather.even_mask(7, 7).all()
    assert not feather.even_mask(7, 0).any()


def test_default_stages_are_a_quarter_and_a_half_of_the_depth():
    assert feather.stages(32) == (Stage(8, 0.3, 3), Stage(16, 0.09))
    assert feather.stages(28)[0].layer == 7
    assert feather.stages(28)[1].layer == 14
    assert [stage.layer for stage in feather.stages(8, least=3)] == [3, 4], (
        "DeepStack feeds the picture in until then"
    )
    assert [stage.layer for stage in feather.stages(28, first=20)] == [20, 21]
    for first, second in ((3, 3), (5, 2), (2, 28)):
        with pytest.raises(ValueError, match="rising order"):
            feather.stages(28, first=first, second=second)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(layer=0, keep=0.5), "layer 0"),
        (dict(layer=1, keep=0.0), "keep = 0.0"),
        (dict(layer=1, keep=1.1), "keep = 1.1"),
        (dict(layer=1, keep=1, stride=-1), "negative"),
    ],
)
def test_stages_out_of_range_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        Stage(**bad)


def test_operations_worked_out_by_hand():
    assert feather.layer_flops(2, 3, 5) == 4 * 2 * 9 + 2 * 4 * 3 + 2 * 2 * 3 * 5
    assert feather.flops([2, 2], 3, 5) == 2 * feather.layer_flops(2, 3, 5)


def test_mean_row():
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[0, 1] = mask[2, 3] = True
    assert feather.mean_row(mask.flatten(), 3, 4) == 0.5
    mask[2] = True
    assert feather.mean_row(mask.flatten(), 3, 4) == pytest.approx(0.8)
