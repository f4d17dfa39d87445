"""SVDQuant on 4-bit floats: what a layer keeps, beside int4, and a whole file."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from nibble.quant.calibration.statistics import InputStats
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.interop.convert import convert
from nibble.quant.interop.opening import open_4bit
from nibble.quant.svdquant.nvfp4 import quantize_linear_nvfp4
from nibble.quant.svdquant.quantize import SVDQuantJob
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights.formats import weight_of
from random_flux import flux_state

N, K = 128, 128


@pytest.fixture
def layer():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(N, K, generator=draw) * 0.05, torch.randn(N, generator=draw) * 0.1


@pytest.fixture
def stats():
    """Inputs with outliers, correlations and a mean."""
    draw = torch.Generator().manual_seed(1)
    seen = InputStats.empty(K, samples=256)
    x = torch.randn(512, 16, generator=draw) @ torch.randn(16, K, generator=draw)
    x[:, ::29] *= 8
    seen.update(x + 0.3 * torch.randn(512, K, generator=draw) + 0.2)
    return seen


def test_recorded_inputs_and_gptq_pay(layer, stats):
    recipe = Recipe.from_preset("best", format="svdquant_nvfp4", rank=16, iterations=2)
    best = quantize_linear_nvfp4(*layer, stats, recipe)
    plain = Recipe.from_preset("fast", format="svdquant_nvfp4", rank=16, solver="svd")
    assert best.db > quantize_linear_nvfp4(*layer, stats, plain).db + 0.5
    assert best.weight.scale_2.unique().numel() == 1
    x = stats.samples.float()
    wanted = torch.nn.functional.linear(x, *layer)
    error = (best.weight.forward(x) - wanted).norm() / (wanted - layer[1]).norm()
    assert abs(-20 * error.log10().item() - best.db) < 3


def test_int4_stands_beside_it_where_asked_for(layer, stats):
    recipe = Recipe.from_preset(
        "fast", format="svdquant_nvfp4", rank=16, solver="svd", smoothing_grid=2
    )
    assert quantize_linear_nvfp4(*layer, stats, recipe).int4_db is None
    compared = replace(recipe, compare=True)
    assert quantize_linear_nvfp4(*layer, stats, compared).int4_db > 10


def test_there_is_no_rotation():
    with pytest.raises(ValueError, match="have no rotation"):
        Recipe.from_preset("fast", format="svdquant_nvfp4", rotation="on")


def test_whole_file_loads_and_becomes_nunchaku_s(tmp_path):
    source, target = tmp_path / "m.safetensors", tmp_path / "t.safetensors"
    save_file(flux_state(), source)
    recipe = Recipe.from_preset(
        "fast", format="svdquant_nvfp4", rank=16, solver="svd", smoothing_grid=2
    )
    report = SVDQuantJob.prepare(source, target, recipe).write()
    assert {row.action for row in report.rows} == {"nvfp4", "w4a16", "keep"}
    made = open_quantized(target)
    made.verify()
    assert made.layers["double_blocks.0.img_attn.qkv"] == {
        "format": "svdquant_nvfp4",
        "rank": 16,
        "rounded": True,
    }
    assert SVDQuantJob.prepare(source, target, recipe).existing_report() is not None
    convert(target, tmp_path / "fp4.safetensors", "nunchaku")
    back = open_4bit(tmp_path / "fp4.safetensors")
    for name in ("double_blocks.0.img_mlp.2", "single_blocks.0.linear2"):
        ours, theirs = weight_of(made, name), weight_of(back, name)
        assert torch.allclose(ours.dequantize(), theirs.dequantize(), atol=1e-6)
