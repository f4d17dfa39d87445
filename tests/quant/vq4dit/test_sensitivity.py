"""How much each layer matters, by models of which that is known, and the bits that follow."""

import pytest
import torch
from torch import nn

import toy_dit as toy
from nibble.quant.calibration.teacher import Teacher
from nibble.quant.files.architectures import LayerPlan
from nibble.quant.vq4dit.bit_allocation import choose_measured
from nibble.quant.vq4dit.calibrate import BlockCalibrator
from nibble.quant.vq4dit.recipe import Recipe
from nibble.quant.vq4dit.sensitivity import at_bits, measure

BEST = Recipe.from_preset("best", bits=3)


class Uneven(nn.Module):
    """y = loud(x) + quiet(x) / 10; what is idle is never called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.loud, self.quiet, self.idle = (nn.Linear(64, 128) for _ in range(3))
        self.quiet.weight.data = self.loud.weight.data.flip(0)

    def forward(self, x):
        return self.loud(x) + self.quiet(x) / 10


def layer(name: str, n: int = 128, k: int = 64) -> LayerPlan:
    return toy.planned(name, n, k)


def calibrator(model: nn.Module, names: list[str]) -> BlockCalibrator:
    x = torch.randn(3, 32, 64, generator=torch.Generator().manual_seed(1))
    return BlockCalibrator(Teacher(model, lambda: [model(part) for part in x]), names)


def test_a_layer_that_counts_a_tenth_matters_a_hundredth():
    model = Uneven()
    names = ["loud", "quiet", "idle"]
    beside, seen = calibrator(model, names), []

    def read(name):
        linear = model.get_submodule(name)
        return linear.weight.detach(), linear.bias.detach()

    errors = measure(beside, map(layer, names), read, BEST, lambda plan: seen.append(plan.name))
    assert seen == names
    assert errors.keys() == {"loud", "quiet"}
    assert errors["loud"] / errors["quiet"] == pytest.approx(100, rel=0.2)
    assert 0.01 < errors["loud"] < 0.2  # 2 bits of normally distributed weights
    assert all(beside.student.get_submodule(name) is model.get_submodule(name) for name in names)


def test_a_bit_more_is_six_decibels_less():
    assert at_bits({"a": 1.0, "b": 8.0}, [1.5, 2, 3, 4]) == {
        "a": {1.5: 2.0, 2: 1.0, 3: 0.25, 4: 0.0625},
        "b": {1.5: 16.0, 2: 8.0, 3: 2.0, 4: 0.5},
    }


def test_bits_go_to_the_layers_that_matter_at_the_bytes_of_equal_bits():
    layers = [layer(name) for name in ("loud", "even", "quiet", "idle")]
    errors = {"loud": 1.0, "even": 1e-3, "quiet": 1e-6}

    def size(_layer, bits):
        return int(1000 * bits)

    assert choose_measured(layers, BEST, errors, size, None) == {
        "loud": 4,
        "even": 3,
        "quiet": 2,
        "idle": 3,
    }
    assert choose_measured(layers, BEST, errors, size, 9_000) == {
        "loud": 2,
        "even": 2,
        "quiet": 2,
        "idle": 3,
    }
    with pytest.raises(ValueError, match="raise budget_gb"):
        choose_measured(layers, BEST, errors, size, 8_999)


def test_a_sub_vector_divides_its_row():
    chosen = choose_measured([layer("odd", k=66)], BEST, {"odd": 1.0}, lambda _, bits: 0, None)
    assert chosen == {"odd": 4}
    narrow = layer("odd", k=66)
    sizes = {1.5: 3, 2: 4, 3: 6, 4: 8}
    assert choose_measured([narrow], BEST, {"odd": 1.0}, lambda _, bits: sizes[bits], None) == {
        "odd": 3
    }


def test_who_gets_mixed_bits():
    assert BEST.measures_sensitivity
    assert BEST.layout((512, 512), 1.5) == (64, 4)
    for preset, changes in [
        ("best", {"mixed": False}),
        ("best", {"bits": 4}),
        ("best", {"codewords": 64, "vector": 2}),
        ("fast", {"mixed": True}),
        ("fast", {"budget_gb": 1.0}),
        ("vq4dit", {}),
    ]:
        assert not Recipe.from_preset(preset, **{"bits": 3} | changes).measures_sensitivity
    assert Recipe.from_preset("vq4dit", budget_gb=1.0).measures_sensitivity
