"""Layers of 16 free levels: the grid, a whole checkpoint in the format, and that it is worth its
bits.
"""

import pytest
import torch
from safetensors.torch import save_file

from decomposed import db, inputs, layer, recorded
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.interop.convert import convert
from nibble.quant.merge.integer_grid import IntBase
from nibble.quant.merge.refit import fold_into_branch
from nibble.quant.svdquant.decompose import quantize_linear
from nibble.quant.svdquant.gptq import gptq_on, nearest_on
from nibble.quant.svdquant.grid import EvenGrid, TableGrid, fit_table
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights.delta import WeightDelta
from nibble.quant.weights.formats import weight_of
from nibble.quant.weights.packing import pack_int4
from nibble.quant.weights.svdquant_w4a8 import W4A8Weight

SHAPES = flux1_shapes(1, 1, 128, 64, 64)


def normal(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(weight, found) -> float:
    return ((found - weight).norm() / weight.norm()).item()


# ---- the grid ------------------------------------------------------------------------------------


def test_a_table_is_16_ordered_whole_numbers_up_to_127():
    table = fit_table(normal(64, 256), 32)
    assert table.shape == (16,) and torch.equal(table, table.round())
    assert table[-1] == 127 and (table.diff() > 0).all() and table[0] > -128


def test_a_weight_on_16_levels_gets_these():
    levels = torch.linspace(-120, 127, 16).round() + torch.tensor([0, 3, -3, 0] * 4)
    levels[-1] = 127
    weight = levels[torch.randint(16, (64, 256), generator=torch.Generator().manual_seed(0))]
    weight[:, ::32] = 127  # of every group, so that its scale is known
    assert (fit_table(weight / 127, 32) - levels).abs().max() <= 1


@pytest.mark.parametrize("group", [16, 32, 64])
def test_values_are_those_that_the_op_reads(group):
    weight = normal(48, 128) * normal(48, 1, seed=1).exp()
    grid = TableGrid.fitted(weight, group).for_rows_of(weight)
    found = nearest_on(grid, weight, torch.ones(128))
    stored = W4A8Weight(
        qweight=pack_int4(found.codes),
        scale=found.scale.to(torch.int8),
        channel_scale=grid.channel_scale,
        table=grid.table.to(torch.int8),
        smooth_factor=torch.ones(128).bfloat16(),
    )
    assert torch.equal(stored.dequantize(), found.dense())
    assert found.scale.abs().max() <= 127


def test_finer_scales_and_free_levels_are_closer():
    weight, ones = normal(96, 256), torch.ones(256)
    even = relative(weight, nearest_on(EvenGrid(), weight, ones).dense())
    errors = []
    for group in (64, 32, 16):
        grid = TableGrid.fitted(weight, group).for_rows_of(weight)
        errors.append(relative(weight, nearest_on(grid, weight, ones).dense()))
    assert even > errors[0] > errors[1] > errors[2]
    assert errors[1] < 0.85 * even  # at the same bits a weight


def test_gptq_moves_errors_to_where_inputs_do_not_point():
    weight, x = normal(64, 128), normal(500, 20, seed=1) @ normal(20, 128, seed=2)
    hessian = (x.T @ x / 500)[None] + 0.01 * torch.eye(128)
    grid = TableGrid.fitted(weight, 32).for_rows_of(weight)

    def error(rounded):
        return (x @ (weight - rounded.dense()).T).norm()

    nearest = nearest_on(grid, weight, hessian[0].diagonal())
    assert error(gptq_on(grid, weight, hessian)) < 0.75 * error(nearest)


def test_rows_of_zeros_and_of_all_sizes():
    weight = normal(4, 64)
    weight[0], weight[1], weight[2] = 0, weight[1] * 1e-12, weight[2] * 1e12
    grid = TableGrid.fitted(weight, 16).for_rows_of(weight)
    found = nearest_on(grid, weight, torch.ones(64)).dense()
    assert found.isfinite().all() and not found[0].any()
    for row in (1, 2, 3):
        assert relative(weight[row], found[row]) < 0.15


# ---- a layer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["fast", "best"])
def test_at_the_same_rank_it_is_closer_than_an_even_grid(preset):
    weight, bias = layer()
    stats, held_out = recorded(inputs(2048)), inputs(256, seed=2)
    found = []
    for options in ({"act_bits": 8}, {"format": "svdquant_w4a8", "group": 32}):
        recipe = Recipe.from_preset(preset, rank=16, **options)
        found.append(quantize_linear(weight, bias, stats, recipe)[0])
    even, table = (db(weight, bias, result, held_out) for result in found)
    assert table > even + 0.5


def test_a_layer_without_a_branch():
    weight, bias = layer()
    recipe = Recipe.from_preset("fast", format="svdquant_w4a8", rank=0)
    result, _ = quantize_linear(weight, bias, None, recipe)
    assert result.rank == 0 and result.factors is None
    x = inputs(32)
    wanted = x @ result.dequantize().T + result.effective_bias()
    assert relative(wanted, result.forward(x)) < 0.02


def test_a_recipe_says_what_it_cannot():
    assert Recipe.from_preset("fast", format="svdquant_w4a8").act_bits == 8
    recipe = Recipe.from_preset("best", format="svdquant_w4a8", rank=0, group=16)
    assert Recipe.from_json(recipe.to_json()) == recipe
    with pytest.raises(ValueError, match="rank=0 is not a multiple"):
        Recipe.from_preset("fast", rank=0)
    with pytest.raises(ValueError, match="group=48 is not one of 16, 32, 64"):
        Recipe.from_preset("fast", group=48)


# ---- a file --------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[0, 16], ids=["no branch", "branch"])
def file(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("w4a8")
    state = {name: (normal(*shape) * 0.05).bfloat16() for name, shape in SHAPES.items()}
    save_file(state, folder / "m.safetensors", {"format": "pt"})
    recipe = Recipe.from_preset(
        "fast", rank=request.param, smoothing_grid=1, iterations=1, format="svdquant_w4a8"
    )
    quantize_checkpoint(folder / "m.safetensors", folder / "q.safetensors", recipe)
    return open_quantized(folder / "q.safetensors")


def test_a_checkpoint_is_written_and_read(file):
    file.verify()
    kinds = {facts["format"] for facts in file.layers.values()}
    assert kinds == {"svdquant_w4a8", "awq_w4a16"}
    for name, facts in file.layers.items():
        weight = weight_of(file, name)
        assert weight.facts() == {key: value for key, value in facts.items() if value}
        assert weight.dequantize().isfinite().all()


def test_bits_a_weight(file):
    name = "double_blocks.0.img_mlp.0"
    weight = weight_of(file, name)
    n, k = weight.shape
    bare = 8 * (weight.qweight.nbytes + weight.scale.nbytes) / (n * k)
    assert bare == 4.25
    assert weight.channel_scale.dtype == torch.float32 and weight.scale.dtype == torch.int8


def test_other_programs_formats_refuse_it(file, tmp_path):
    with pytest.raises(FileRefused, match="levels of a table"):
        convert(file.path, tmp_path / "k.safetensors", "kitchen")


def test_integer_adapters_refuse_it_and_ordinary_ones_join_the_branch(file):
    weight = weight_of(file, "double_blocks.0.img_mlp.0")
    with pytest.raises(FileRefused, match="levels are not evenly spaced"):
        IntBase.of(weight, "x", "The model")
    (n, k), down, up = weight.shape, normal(128, 4), normal(512, 4, seed=3)
    assert (n, k) == (512, 128)
    merged, kept = fold_into_branch(weight, WeightDelta(down=down, up=up))
    wanted = weight.dequantize() + up @ down.T
    assert kept > 0.98 and relative(wanted, merged.dequantize()) < 0.01
    assert torch.equal(merged.qweight, weight.qweight)


def test_the_cut_is_the_inverse_of_cat(file):
    weight = weight_of(file, "double_blocks.0.img_attn.qkv")
    pieces = [weight.rows(0, 128), weight.rows(128, 384)]
    whole, own = W4A8Weight.cat(pieces).tensors("x"), weight.tensors("x")
    assert all(torch.equal(whole[name], own[name]) for name in own)
    x = normal(5, 128)
    parts = torch.cat([piece.forward(x) for piece in pieces], 1)
    torch.testing.assert_close(parts, weight.forward(x))
    other = weight.rows(0, 128)
    other.table = other.table.flip(0)
    with pytest.raises(ValueError, match="one table"):
        W4A8Weight.cat([other, pieces[1]])
