"""Smoothing factors that are learned: on a layer whose best factors are known, and in what space
they leave a layer.
"""

from dataclasses import replace

import pytest
import torch

from decomposed import K, db, inputs, layer, recorded
from nibble.quant.svdquant.decompose import quantize_linear
from nibble.quant.svdquant.learned_smoothing import learned
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.svdquant.smooth import InputSpace


def normal(rows: int, spans: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, len(spans), generator=generator) * spans


@pytest.mark.parametrize("rotation", [0, 64])
def test_normal_inputs_and_weights_get_the_root_of_their_ratio(rotation):
    """J of normal values is sum (x/s)^2 * sum (W s)^2 in a rotated group, least for s^2 = x / W
    (Cauchy and Schwarz); without a rotation it is so nearly.
    """
    generator = torch.Generator().manual_seed(3)
    of_inputs, of_weights = torch.randn(2, 64, generator=generator).mul(0.5).exp()
    x, weight = normal(4000, of_inputs, 0), normal(256, of_weights, 1)
    best = (of_inputs / of_weights).sqrt()
    start = InputSpace(torch.ones(64), rotation)
    found = learned(start, weight, x, steps=300).smooth
    away = (found / best).log()
    assert (away - away.mean()).abs().max() < (0.15 if rotation else 0.5)


def test_signs_and_the_space_stay(signs=(1.0, -1.0)):
    smooth = torch.tensor(signs).repeat(K // 2)
    weight, _ = layer()
    space = InputSpace(smooth, 64, act_bits=8, label="none")
    found = learned(space, weight, inputs(64), steps=3)
    assert torch.equal(found.smooth.sign(), smooth)
    assert found == replace(space, smooth=found.smooth, label="none, learned")
    assert torch.equal(found.smooth, found.smooth.bfloat16().float())


def test_it_works_where_gradients_are_off():
    weight, _ = layer()
    with torch.inference_mode():
        space, x = InputSpace(torch.ones(K)), inputs(64)
        inside = learned(space, weight.clone(), x, steps=2).smooth
    outside = learned(InputSpace(torch.ones(K)), weight, inputs(64), steps=2).smooth
    assert torch.equal(inside, outside)


def test_a_layer_gains_and_never_loses_on_the_rows_it_is_chosen_by():
    weight, bias = layer()
    recipe = Recipe.from_preset("best", rank=16, iterations=2, smoothing_grid=2)
    stats = recorded(inputs(2000))
    unseen = inputs(512, seed=2)
    with_it, without = (
        db(weight, bias, quantize_linear(weight, bias, stats, changed)[0], unseen)
        for changed in (recipe, replace(recipe, smoothing_steps=0))
    )
    assert with_it > without - 0.05
