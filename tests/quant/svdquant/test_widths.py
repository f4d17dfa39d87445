"""Which layers get activations of 8 bits: by hand-made savings and costs, by inputs that 4 bits
cannot carry, and in a file.
"""

import pytest
import torch
from safetensors.torch import save_file

from decomposed import inputs, recorded
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.job.measurement import Measurement
from nibble.quant.svdquant import widths
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import WIDE_SHARE, Recipe
from nibble.quant.svdquant.widths import Layers

FAST = Recipe.from_preset("fast", rank=16, smoothing_grid=1, iterations=1, wide_share=WIDE_SHARE)


@pytest.mark.parametrize(
    ("share", "names"), [(0.0, ""), (0.1, "a"), (0.4, "ab"), (0.75, "abc"), (1.0, "abcd")]
)
def test_the_layers_that_save_most_for_each_multiplication(share, names):
    # saved for each multiplication: a 3, b 1, c 0.2, d 0.1, e nothing
    layers = [
        Layers(("d",), 2.5, 25),
        Layers(("c",), 7.0, 35),
        Layers(("b",), 25.0, 25),
        Layers(("a",), 30.0, 10),
        Layers(("e",), 0.0, 5),
    ]
    assert widths.chosen(layers, share) == frozenset(names)


def test_a_layer_that_does_not_fit_leaves_its_place_to_smaller_ones():
    layers = [Layers(("wide",), 10.0, 60), Layers(("slim",), 1.0, 40)]
    assert widths.chosen(layers, 0.5) == {"slim"}


def test_layers_that_read_one_input_are_chosen_together():
    group = widths.together([Layers(("q",), 1.0, 10), Layers(("k",), 2.0, 20)])
    assert group == Layers(("q", "k"), 3.0, 30)


def test_inputs_with_outliers_save_more():
    x = inputs(600)
    loud = x.clone()
    loud[:, 7] *= 100
    weight = torch.randn(128, x.shape[1], generator=torch.Generator().manual_seed(0))
    calm, wild = (
        widths.measured("layer", weight, recorded(rows), FAST, False) for rows in (x, loud)
    )
    assert calm.cost == wild.cost == 600 * weight.numel()
    assert calm.saved > 0


def test_a_file_says_which_layers_are_wide(tmp_path):
    generator = torch.Generator().manual_seed(0)
    shapes = flux1_shapes(1, 1, 128, 64, 64)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "m.safetensors")
    target = tmp_path / "q.safetensors"
    report = quantize_checkpoint(tmp_path / "m.safetensors", target, FAST, Measurement())
    layers = {
        name: facts.get("act_bits", 4)
        for name, facts in open_quantized(target).layers.items()
        if facts["format"] == "svdquant_w4a4"
    }
    wide = {name for name, bits in layers.items() if bits == 8}
    assert wide and wide != layers.keys()
    assert wide == {row.name for row in report.rows if "8-bit activations" in row.why}
    cost = {name: shapes[f"{name}.weight"][0] * shapes[f"{name}.weight"][1] for name in layers}
    assert sum(cost[name] for name in wide) <= WIDE_SHARE * sum(cost.values())
    label, words = next(line for line in report.summary() if line[0] == "activations")
    assert words.startswith(f"8 bit in {len(wide)} layer")
