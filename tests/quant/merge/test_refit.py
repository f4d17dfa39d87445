"""Changes folded into the layer's own format: joined exactly, fitted again at no cost, and what
each says it kept.
"""

from dataclasses import replace

import pytest
import torch

from intlora_bases import K, N, factors, normal, svdquant, w4a16
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.merge.refit import EXTRA, fold_into_branch, refit
from nibble.quant.weights.awq_w4a16 import W4A16Weight
from nibble.quant.weights.delta import WeightDelta, round_rank
from nibble.quant.weights.svdquant_w4a4 import SVDQuantWeight

KINDS = {
    "plain": {},
    "rotated": {"rotation": 64},
    "unsigned": {"act_unsigned": True},
    "half unsigned": {"unsigned_from": 64},
}


def space(weight) -> torch.Tensor:
    """The whole matrix in the space of the integers, where shares are counted."""
    base = IntBase.of(weight)
    return base.weight() + weight.proj_up.float() @ base.into(
        weight.proj_down.float().T.contiguous()
    )


def quantized(**options) -> SVDQuantWeight:
    """A weight as a quantizer would leave it: codes that fill their range, a branch that holds what
    is large.
    """
    return replace(
        svdquant(**options), smooth_factor=(normal(K, seed=5, size=0.3).exp()).bfloat16()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fitting_again_costs_nothing_and_keeps_more_than_cutting(kind):
    weight, (down, up) = quantized(**KINDS[kind]), factors(size=0.02).floats()
    new, kept = refit(weight, WeightDelta(down, up))
    _, cut = fold_into_branch(weight, WeightDelta(down, up), rank=weight.rank)
    assert new.nbytes == weight.nbytes
    assert new.facts() == weight.facts()
    assert kept > cut + 0.02
    change = IntBase.of(weight).into(up @ down.T)
    assert kept == pytest.approx(
        1 - ((space(new) - space(weight) - change).norm() / change.norm()).item(), abs=2e-3
    )
    torch.testing.assert_close(new.effective_bias(), weight.effective_bias(), rtol=0.02, atol=0.02)
    assert torch.equal(refit(weight, WeightDelta(down, up))[0].qweight, new.qweight)


def test_more_rounds_fit_no_worse():
    weight, (down, up) = quantized(), factors(size=0.02).floats()
    kept = [refit(weight, WeightDelta(down, up), rounds=rounds)[1] for rounds in (1, 2, 6)]
    assert kept[0] <= kept[1] + 5e-3 <= kept[2] + 1e-2


def test_a_change_that_the_branch_has_room_for_is_kept_whole():
    weight = replace(
        quantized(), proj_up=torch.zeros(N, 16).bfloat16(), proj_down=torch.zeros(K, 16).bfloat16()
    )
    down, up = factors(size=0.02).floats()
    assert refit(weight, WeightDelta(down, up))[1] > 0.99
    assert fold_into_branch(weight, WeightDelta(down, up), rank=16)[1] > 0.99


def test_nothing_asked_for_is_the_weight_itself():
    weight, (down, up) = quantized(), factors().floats()
    assert refit(weight, WeightDelta(down * 0, up)) == (weight, 1.0)
    assert (
        refit(weight, WeightDelta(torch.cat([down, down], 1), torch.cat([up, -up], 1)))[0] is weight
    ), "two that cancel each other"


@pytest.mark.parametrize("make", [quantized, w4a16])
def test_a_change_without_low_rank_gets_the_components_that_there_is_room_for(make):
    weight, delta = make(), normal(N, K, size=0.003, seed=20)
    joined, kept = fold_into_branch(weight, WeightDelta(dense=delta))
    assert joined.rank == round_rank(weight.rank + EXTRA), "48 components are all that there are"
    assert kept > 0.95, "48 components are all that there are"
    torch.testing.assert_close(
        joined.dequantize() - weight.dequantize(), delta, rtol=0.05, atol=2e-3
    )
    large = fold_into_branch(weight, WeightDelta(dense=delta), 16)
    assert large[0].rank == 16
    assert large[1] < kept
    if isinstance(weight, SVDQuantWeight):
        assert 0 <= refit(weight, WeightDelta(dense=delta))[1] < 1


@pytest.mark.parametrize("zeros", [True, False])
def test_a_plain_layer_takes_factors_beside_its_codes_and_round_trips(zeros):
    weight, (down, up), x = w4a16(zeros=zeros), factors(size=0.01).floats(), normal(5, K, size=1.0)
    joined, kept = fold_into_branch(weight, WeightDelta(down, up))
    assert kept > 0.99
    assert joined.rank == 16
    assert torch.equal(joined.qweight, weight.qweight)
    torch.testing.assert_close(
        joined.forward(x) - weight.forward(x), x @ down @ up.T, rtol=0.02, atol=5e-3
    )
    torch.testing.assert_close(
        joined.forward(x),
        torch.nn.functional.linear(x, joined.dequantize(), weight.bias.float()),
        rtol=1e-3,
        atol=1e-3,
    )
    again = W4A16Weight.from_tensors(joined.tensors("a.b"), "a.b")
    assert again.facts() == {"format": "awq_w4a16", "rank": 16}
    assert torch.equal(again.dequantize(), joined.dequantize())
    parts = [joined.rows(0, 16), joined.rows(16, N)]
    assert torch.equal(W4A16Weight.cat(parts).dequantize(), joined.dequantize())
    with pytest.raises(ValueError, match="one proj_down"):
        W4A16Weight.cat([parts[0], weight.rows(16, N)])
    twice, _ = fold_into_branch(joined, WeightDelta(down, up))
    torch.testing.assert_close(
        twice.dequantize() - weight.dequantize(), 2 * up @ down.T, rtol=0.03, atol=2e-3
    )


def _short(tensors):
    tensors["a.b.weight_proj_up"] = torch.zeros(N, 8)


def _none(tensors):
    del tensors["a.b.weight_proj_up"], tensors["a.b.weight_proj_down"]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda tensors: tensors.pop("a.b.weight_proj_up"), "go together"),
        (_short, "needs"),
        (_none, "says rank 16"),
    ],
)
def test_plain_layers_with_wrong_factors_are_refused(spoil, words):
    tensors = fold_into_branch(w4a16(), WeightDelta(*factors().floats()))[0].tensors("a.b")
    spoil(tensors)
    with pytest.raises(ValueError, match=words):
        W4A16Weight.from_tensors(tensors, "a.b")
