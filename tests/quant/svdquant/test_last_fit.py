"""What is chosen on held-out pictures is fitted once more, to all pictures, in every kind of layer.

Here the held-out pictures read what the others never do: who was not fitted to them rounds the
weights there as it likes.
"""

import pytest
import torch
from safetensors.torch import save_file

from nibble.quant.calibration.statistics import InputStats
from nibble.quant.cli import methods
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.source import Source
from nibble.quant.job.measurement import Measurement
from nibble.quant.svdquant import quantize
from nibble.quant.svdquant.decompose import quantize_linear
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.svdquant.stock.fit import quantize_layer
from nibble.quant.svdquant.stock.formats import FORMATS as STOCK
from nibble.quant.svdquant.stock.recipe import StockRecipe
from nibble.quant.weights.formats import FORMATS
from random_flux import flux_state

K, PICTURES, ROWS = 128, 8, 32
KINDS = {
    "int4": (Recipe.from_preset("best", rank=16, iterations=2), "single_blocks.0.linear1"),
    "4-bit floats": (
        Recipe.from_preset("best", format="svdquant_nvfp4", rank=16, iterations=2),
        "single_blocks.0.linear1",
    ),
    "weights alone": (Recipe.from_preset("best", rank=16), "single_blocks.0.modulation.lin"),
}


def picture(number: int) -> torch.Tensor:
    """(ROWS, K): the fourth and the eighth, which are held out, fill other channels."""
    x = torch.randn(ROWS, K, generator=torch.Generator().manual_seed(number))
    mix = torch.randn(K, K, generator=torch.Generator().manual_seed(99)) / K**0.5
    x[:, : K // 2] *= 8.0 if number in (3, 7) else 0.05
    return x @ mix


def recorded() -> InputStats:
    stats = InputStats.empty(K, samples=4096, pictures=PICTURES)
    for number in range(PICTURES):
        stats.update(picture(number), range(number, number + 1))
    return stats


def error(path, source, name) -> float:
    """Squared output error on a held-out picture over the output's square."""
    x, weight = picture(7), source.weight(name).float()
    file = open_quantized(path)
    layer = FORMATS[file.layers[name]["format"]].from_tensors(file.layer(name), name)
    found = layer.forward(x) - source.bias(name).float()
    wanted = x @ weight.T
    return ((found - wanted).square().sum() / wanted.square().sum()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_fitted_to_all_pictures(kind, tmp_path, monkeypatch):
    recipe, name = KINDS[kind]
    monkeypatch.setattr(quantize, "closer", lambda *layer: None)
    save_file(flux_state(hidden=K, double=1, single=1), tmp_path / "m.safetensors")

    def statistics(layer):
        return recorded() if layer == name else None

    errors = []
    for held in (True, False):
        with monkeypatch.context() as patched:
            if held:
                patched.setattr(InputStats, "whole", lambda self: self)
            target = tmp_path / f"{held}.safetensors"
            job = methods.prepare(tmp_path / "m.safetensors", target, recipe)
            job.write(Measurement({"kind": "prompts"}, statistics))
        errors.append(error(target, Source(tmp_path / "m.safetensors"), name))
    assert errors[1] < 0.8 * errors[0]


def test_the_last_fit_keeps_what_was_chosen():
    weight = torch.randn(64, K, generator=torch.Generator().manual_seed(1))
    recipe, stats = KINDS["int4"][0], recorded()
    first, chose = quantize_linear(weight, None, stats, recipe)
    again, kept = quantize_linear(weight, None, stats.whole(), recipe, chosen=chose.chosen)
    assert kept.chosen.space is chose.chosen.space
    assert 1 <= kept.chosen.turns <= chose.chosen.turns <= recipe.iterations
    assert torch.equal(first.smooth_factor, again.smooth_factor)
    assert not torch.equal(first.qweight, again.qweight)


@pytest.mark.parametrize("form", STOCK)
def test_files_for_stock_comfyui_too(form, monkeypatch):
    weight = torch.randn(64, K, generator=torch.Generator().manual_seed(1))
    recipe = StockRecipe.from_preset("best", format=form)

    def made(stats):
        return quantize_layer(weight, torch.zeros(64), stats, STOCK[form], recipe)

    (found, db, _), (all_told, *_) = made(recorded()), made(recorded().whole())
    assert all(torch.equal(found[name], all_told[name]) for name in found)
    monkeypatch.setattr(InputStats, "whole", lambda self: self)
    before, same_db, _ = made(recorded())
    assert db == same_db  # told of pictures that it was not fitted to
    assert not torch.equal(found["weight"], before["weight"])
