"""The decomposition: quality floors in dB, exact cases, and inputs that break careless code.

Floors are on a layer whose inputs are correlated, off-centre and have outlier channels, as a
transformer's are; 256 x 256, rank 16.
"""

import math
from dataclasses import replace

import pytest
import torch

from decomposed import K, N, db, inputs, layer, recorded
from nibble.kernels.reference import SHIFT
from nibble.quant.svdquant.decompose import quantize_linear
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.svdquant.space_search import shared_smoothing
from nibble.quant.svdquant.w4a16 import quantize_w4a16
from nibble.quant.weights.packing import dequantize_groups, group_absmax, quantize_groups


def rtn_db(weight, x) -> float:
    def rounded(t):
        scale = group_absmax(t) / 7
        return dequantize_groups(quantize_groups(t, scale).clamp(-7, 7), scale)

    y = x @ weight.T
    return (
        10 * torch.log10(y.square().sum() / (rounded(x) @ rounded(weight).T - y).square().sum())
    ).item()


@pytest.fixture(scope="module")
def case():
    weight, bias = layer()
    return weight, bias, recorded(inputs(2000)), inputs(512, seed=2)


@pytest.mark.parametrize(
    "preset, statistics, floor",
    [("fast", False, 18.0), ("fast", True, 21.0), ("best", True, 21.5)],
    ids=["fast without samples", "fast", "best"],
)
def test_quality_floor_on_unseen_inputs(case, preset, statistics, floor):
    weight, bias, stats, x = case
    recipe = Recipe.from_preset(preset, rank=16, smoothing_grid=4, iterations=2)
    result, error = quantize_linear(weight, bias, stats if statistics else None, recipe)
    measured = db(weight, bias, result, x)
    assert measured > floor
    assert measured > rtn_db(weight, x) + 3
    assert error.inputs == ("held-out samples" if statistics else "synthetic inputs")
    if statistics:
        assert error.db == pytest.approx(measured, abs=0.7)


def test_more_effort_is_never_worse(case):
    weight, bias, stats, x = case

    def value(**changes):
        recipe = Recipe.from_preset(
            "best", **{"rank": 16, "smoothing_grid": 2, "iterations": 2} | changes
        )
        return db(weight, bias, quantize_linear(weight, bias, stats, recipe)[0], x)

    best = value()
    assert best > value(gptq=False) - 0.05
    assert best > value(solver="svd") - 0.05
    assert value(rank=64) > best + 0.5


def test_weights_of_low_rank_are_nearly_lossless():
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(N, 16, generator=g) @ torch.randn(16, K, generator=g)
    for stats in (None, recorded(inputs(1000))):
        result, error = quantize_linear(weight, None, stats, Recipe.from_preset("fast", rank=16))
        assert error.db > 45
        assert db(weight, None, result, inputs(64, seed=3)) > 45


def gelu_inputs(tokens: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.gelu(
        1.5 * torch.randn(tokens, K, generator=torch.Generator().manual_seed(seed))
    )


def test_unsigned_activations_win_behind_a_gelu_and_their_fold_is_exact():
    weight, bias = layer()
    result, error = quantize_linear(
        weight,
        bias,
        recorded(gelu_inputs(1000, 1)),
        Recipe.from_preset("fast", rank=16),
        post_gelu=True,
    )
    assert result.act_unsigned
    assert error.act_unsigned
    fold = SHIFT * result.residual().sum(1)
    torch.testing.assert_close(result.effective_bias(), result.bias.float() + fold)
    x = gelu_inputs(512, 2)
    plain = Recipe.from_preset("fast", rank=16, act_unsigned=False, rotation="off")
    signed, _ = quantize_linear(weight, bias, recorded(gelu_inputs(1000, 1)), plain)
    assert not signed.act_unsigned
    assert db(weight, bias, result, x) > db(weight, bias, signed, x) + 1
    mean_error = (x @ result.dequantize().T + result.effective_bias() - x @ weight.T - bias).mean(0)
    assert mean_error.abs().max() < 0.05 * (x @ weight.T).std()


def test_without_a_bias_nothing_is_folded():
    result, error = quantize_linear(
        layer()[0],
        None,
        recorded(gelu_inputs(500, 1)),
        Recipe.from_preset("fast", rank=16),
        post_gelu=True,
    )
    assert result.bias is None
    assert not error.act_unsigned


@pytest.mark.parametrize("rotation, expected", [("on", 64), ("off", 0)])
def test_rotation_can_be_asked_for_or_forbidden(case, rotation, expected):
    weight, bias, stats, x = case
    result, _ = quantize_linear(
        weight, bias, stats, Recipe.from_preset("fast", rank=16, rotation=rotation)
    )
    assert result.rotation == expected
    assert db(weight, bias, result, x) > rtn_db(weight, x)


def test_the_matrix_that_a_rotated_layer_stands_for_is_the_weight(case):
    weight, bias, _, _ = case
    result, _ = quantize_linear(
        weight, bias, None, Recipe.from_preset("fast", rank=16, rotation="on")
    )
    assert (result.dequantize() - weight).norm() < 0.1 * weight.norm()
    assert torch.equal(result.bias, bias.bfloat16())


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_same_seed_same_tensors(case, preset):
    weight, bias, stats, _ = case
    recipe = Recipe.from_preset(preset, rank=16, smoothing_grid=2, iterations=1)
    one, two = (quantize_linear(weight, bias, stats, recipe)[0].tensors("x") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def finite(result) -> bool:
    return all(t.float().isfinite().all() for t in result.tensors("x").values())


@pytest.mark.parametrize("preset", ["fast", "best"])
@pytest.mark.parametrize(
    "kind",
    [
        "dead inputs",
        "dead weight columns",
        "zero weight",
        "constant inputs",
        "zero inputs",
        "one token",
        "huge outlier",
    ],
)
def test_degenerate_layers_give_finite_tensors(kind, preset):
    (weight, bias), x = layer(n=32, k=128), inputs(300, k=128)
    if kind == "dead inputs":
        x[:, :70] = 0
    elif kind == "dead weight columns":
        weight[:, 3:90] = 0
    elif kind == "zero weight":
        weight = torch.zeros_like(weight)
    elif kind in ("constant inputs", "zero inputs"):
        x = (x[:1] if kind == "constant inputs" else x[:1] * 0).expand(300, 128)
    elif kind == "one token":
        x = x[:1]
    else:
        x[:, 5] *= 1e4
    result, error = quantize_linear(
        weight,
        bias,
        recorded(x),
        Recipe.from_preset(preset, rank=16, smoothing_grid=2, iterations=1),
    )
    assert finite(result)
    assert math.isfinite(error.db)
    assert result.forward(x).isfinite().all()
    floor = {"constant inputs": 30, "huge outlier": 25}.get(kind, 12)
    if kind not in ("zero weight", "zero inputs", "one token"):
        assert db(weight, bias, result, x) > floor


def test_wrong_input_is_refused_in_words():
    recipe = Recipe.from_preset("fast", rank=16)
    with pytest.raises(ValueError, match="K=100 is not a multiple of the group size 64"):
        quantize_linear(torch.zeros(64, 100), None, None, recipe)
    with pytest.raises(ValueError, match="does not fit a 64 x 128 linear"):
        quantize_linear(torch.zeros(64, 128), torch.zeros(63), None, recipe)
    with pytest.raises(ValueError, match="64 x 128 weight holds NaN"):
        quantize_linear(torch.full((64, 128), torch.nan), None, None, recipe)
    with pytest.raises(ValueError, match="statistics of 64 inputs do not fit a linear with 128"):
        quantize_linear(torch.ones(64, 128), None, recorded(torch.ones(20, 64)), recipe)


def test_shared_smoothing_is_used_as_given(case):
    weight, bias, stats, x = case
    recipe = Recipe.from_preset("fast", rank=16)
    smooth = shared_smoothing([weight[:64], weight[64:]], stats, recipe)
    parts = [
        quantize_linear(w, b, stats, recipe, smooth=smooth)[0]
        for w, b in ((weight[:64], bias[:64]), (weight[64:], bias[64:]))
    ]
    assert all(torch.equal(part.smooth_factor, smooth.bfloat16()) for part in parts)
    assert all(
        db(w, b, part, x) > 20
        for part, w, b in zip(
            parts, (weight[:64], weight[64:]), (bias[:64], bias[64:]), strict=True
        )
    )


@pytest.mark.parametrize("statistics", [False, True], ids=["weights alone", "recorded inputs"])
def test_weights_alone_at_four_bits_keep_20_db(case, statistics):
    weight, bias, stats, x = case
    recipe = Recipe.from_preset("best" if statistics else "fast")
    result, error = quantize_w4a16(weight, bias, stats if statistics else None, recipe)
    assert db(weight, bias, result, x) > 20
    assert error > 20
    # a group of two values that are codes needs no rounding
    top = torch.tensor([-8.0, 7.0]).repeat(32)[None] * 0.25
    exact, error = quantize_w4a16(top, None, None, recipe)
    torch.testing.assert_close(exact.dequantize(), top)


def test_a_layer_quantizes_on_its_device(device):
    weight, bias = layer(n=64, k=128)
    stats = recorded(inputs(200, k=128))
    recipe = Recipe.from_preset("best", rank=16, smoothing_grid=2, iterations=1)
    result, error = quantize_linear(weight.to(device), bias.to(device), stats, recipe)
    assert result.qweight.device.type == device
    assert error.db > 15


# ---- activations of 8 bits -----------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "gain"), [("fast", 0), ("best", 0.2)])
def test_a_layer_fitted_for_8_bits_is_closer_and_says_so(preset, gain):
    weight, bias = layer()
    stats, held_out = recorded(inputs(2048)), inputs(256, seed=2)
    found = {}
    for bits in (4, 8):
        recipe = Recipe.from_preset(preset, rank=16, act_bits=bits)
        result, _ = quantize_linear(weight, bias, stats, recipe)
        found[bits] = result
        assert result.act_bits == bits
        assert result.facts().get("act_bits", 4) == bits
    four, eight = (db(weight, bias, found[bits], held_out) for bits in (4, 8))
    assert eight > four + 3
    # the same tensors, other numbers: each is best with the width that it was fitted for
    assert eight > db(weight, bias, replace(found[4], act_bits=8), held_out) + gain


def test_8_bits_have_no_use_for_unsigned_codes():
    weight, bias = layer()
    x = torch.nn.functional.gelu(inputs(1024))
    recipe = Recipe.from_preset("best", rank=16, rotation="off", act_bits=8)
    result, error = quantize_linear(weight, bias, recorded(x), recipe, post_gelu=True)
    assert not result.act_unsigned and not error.act_unsigned
