"""Recipes: presets, checks, JSON."""

import pytest

from nibble.quant.svdquant.recipe import PRESET_HELP, PRESETS, Recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    recipe = Recipe.from_preset(preset, rank=64, keep=["final.*"])
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.preset == preset
    assert PRESET_HELP[preset]


def test_none_leaves_a_preset_as_it_is():
    assert Recipe.from_preset("best", rank=None) == Recipe.from_preset("best")


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"rank": 20}, "rank=20 is not a multiple of 16"),
        ({"solver": "magic"}, "'magic' is not one of alternating, svd"),
        ({"rotation": True}, "not one of auto, on, off"),
        ({"smoothing_grid": 0}, "smoothing_grid=0"),
        ({"keep": "final"}, "not a list of name patterns"),
        ({"colour": 1}, "a recipe has no colour"),
        ({"seed": -1}, "seed=-1"),
        ({"act_bits": 6}, "act_bits=6 is not one of 4, 8"),
        ({"wide_share": 1.5}, "wide_share=1.5 is not a share"),
        ({"wide_share": 0.5, "act_bits": 8}, "wide_share=0.5 is not a share"),
        ({"wide_share": 0.5, "format": "svdquant_w4a8"}, "activations of 8 bits alone"),
    ],
    ids=str,
)
def test_wrong_values_are_refused_in_words(wrong, words):
    with pytest.raises(ValueError, match=words):
        Recipe.from_preset("fast", **wrong)


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match="'slow' is not one of fast, best"):
        Recipe.from_preset("slow")
    with pytest.raises(ValueError, match="JSON object"):
        Recipe.from_json("[]")


def test_patterns_match_whole_names():
    assert Recipe().matches(("double_blocks.*.img_mod.lin",), "double_blocks.3.img_mod.lin")
    assert not Recipe().matches(("lin",), "img_mod.lin")


def test_the_width_of_activations_is_told_where_it_is_not_4():
    assert "act_bits" not in Recipe.from_preset("best").to_json()
    wide = Recipe.from_preset("best", act_bits=8)
    assert Recipe.from_json(wide.to_json()) == wide
