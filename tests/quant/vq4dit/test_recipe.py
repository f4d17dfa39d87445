"""Recipes of codewords: what is wrong is named, and they survive JSON."""

import json

import pytest

from nibble.quant.vq4dit.recipe import Recipe

FAST = Recipe.from_preset("fast", codewords=16, vector=4)  # one bit a weight: quick to fit


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bits": 5}, "bits=5 is not one of 2, 3, 4"),
        ({"codewords": 100, "vector": 2}, "power of two"),
        ({"codewords": 64}, "go together"),
        ({"candidates": 0}, "candidates=0"),
        ({"budget_gb": -1.0}, "budget_gb"),
        ({"keep": "x"}, "list of name patterns"),
        ({"sparkle": 1}, "no sparkle"),
        ({"rotation": 32}, "rotation=32"),
        ({"steps": -1}, "steps=-1"),
    ],
)
def test_recipes_name_what_is_wrong(changes, words):
    with pytest.raises(ValueError, match=words):
        Recipe.from_preset("best", **changes)


def test_recipes_survive_json_and_presets_differ():
    recipe = Recipe.from_preset("vq4dit", bits=2, keep=["a.*"], candidates=3)
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())["candidates"] == 3
    assert recipe.calibrated
    assert not FAST.calibrated
    assert not recipe.scaled
    assert Recipe.from_preset("best").scaled
    assert recipe.layout((3072, 3072)) == (256, 4)
    assert recipe.layout((16, 64))[0] == 64
    with pytest.raises(ValueError, match="preset='slow' is not one of fast, vq4dit, best"):
        Recipe.from_preset("slow")
