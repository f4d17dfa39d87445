"""A layer whose inputs are no multiple of 64 has zeros behind them in its file, and computes the
same: [W 0] [x; 0] = W x.
"""

import pytest
import torch
from safetensors.torch import save_file

from nibble.quant.calibration.statistics import InputStats
from nibble.quant.files.architectures import plan, recognise, whole_groups
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.job.measurement import Measurement
from nibble.quant.svdquant.quantize import predict
from nibble.quant.svdquant.quantize import quantize_checkpoint as svdquant
from nibble.quant.svdquant.recipe import Recipe as SVDQuantRecipe
from nibble.quant.svdquant.stock.quantize import StockJob
from nibble.quant.svdquant.stock.recipe import StockRecipe
from nibble.quant.vq4dit.quantize import quantize_checkpoint as vq
from nibble.quant.vq4dit.recipe import Recipe as VQRecipe
from nibble.quant.weights.formats import weight_of

SHAPES = flux1_shapes(1, 1, 120, 64, 64)  # 120 and 480 inputs, and 600 of linear2
INPUTS = {"double_blocks.0.img_mlp.0": 120, "single_blocks.0.linear2": 600}
QUICK = dict(rank=16, smoothing_grid=1, iterations=1)
FAST = SVDQuantRecipe.from_preset("fast", **QUICK)
METHODS = {
    "svdquant": (svdquant, FAST),
    "unsigned inputs": (svdquant, SVDQuantRecipe.from_preset("fast", rotation="off", **QUICK)),
    "w4a8": (svdquant, SVDQuantRecipe.from_preset("fast", format="svdquant_w4a8", **QUICK)),
    "nvfp4": (svdquant, SVDQuantRecipe.from_preset("fast", format="svdquant_nvfp4", **QUICK)),
    "vq": (vq, VQRecipe.from_preset("fast")),
}


def weights():
    return {name: (torch.randn(shape) * 0.05).bfloat16() for name, shape in SHAPES.items()}


@pytest.fixture
def source(tmp_path):
    save_file(weights(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize("k, whole", [(64, 64), (65, 128), (2520, 2560), (3360, 3392)])
def test_groups_are_filled_up(k, whole):
    assert whole_groups(k) == whole


def test_zeros_are_added_where_they_are_few():
    def action(k):
        shapes = flux1_shapes(1, 1, k, 64, 64)
        layers = plan(shapes, recognise(shapes, "m"), FAST)
        return next(layer for layer in layers if layer.name == "double_blocks.0.img_mlp.0")

    assert (action(120).action, action(120).K, action(120).columns) == ("w4a4", 120, 128)
    assert action(96).action == "keep"
    assert action(96).why == "K=96 would need too many zeros for whole groups of 64"


@pytest.mark.parametrize("name", METHODS)
def test_a_layer_computes_what_its_matrix_does(tmp_path, source, name):
    from safetensors.torch import load_file

    method, recipe = METHODS[name]
    statistics = {layer: InputStats.empty(k) for layer, k in INPUTS.items()}
    for layer, k in INPUTS.items():
        statistics[layer].update(torch.randn(256, k))
    measured = Measurement({"kind": "test"}, statistics.get)
    report = method(source, tmp_path / "q.safetensors", recipe, measured)
    file, dense = open_quantized(tmp_path / "q.safetensors"), load_file(source)
    file.verify()
    assert sum(row.action != "keep" for row in report.rows) >= 12
    for layer, k in INPUTS.items():
        stored = weight_of(file, layer)
        assert stored.shape == (SHAPES[f"{layer}.weight"][0], whole_groups(k))
        x = torch.randn(64, k)
        wanted = x @ dense[f"{layer}.weight"].float().T + dense[f"{layer}.bias"].float()
        found = stored.forward(torch.nn.functional.pad(x, (0, whole_groups(k) - k)))
        error = (found - wanted).square().sum() / wanted.square().sum()
        assert -10 * torch.log10(error) > (9 if name == "vq" else 12)  # 3 bits, 4 bits


def test_sizes_are_predicted_to_the_byte(tmp_path, source):
    report = svdquant(source, tmp_path / "q.safetensors", FAST)
    predicted = predict(SHAPES, FAST, "m.safetensors")
    assert {row.name: row.bytes_after for row in predicted.rows} == {
        row.name: row.bytes_after for row in report.rows
    }


def test_statistics_take_inputs_and_count_zeros_behind_them():
    stats = InputStats.empty(120)
    x = torch.randn(3, 50, 120)
    stats.update(x)
    assert stats.k == 128 and stats.count == 150
    torch.testing.assert_close(stats.mean[:120], x.flatten(0, 1).mean(0))
    assert not stats.mean_square[120:].any() and not stats.hessian.flatten(0, 1)[120:].any()
    with pytest.raises(ValueError, match="128 inputs were given"):
        stats.update(torch.randn(4, 64))


def test_files_for_stock_comfyui_leave_such_layers_in_16_bit(tmp_path, source):
    recipe = StockRecipe.from_preset("fast", format="asym_w4a8_int8")
    shapes = flux1_shapes(1, 1, 128, 64, 64) | {"double_blocks.0.img_mlp.0.weight": (512, 120)}
    layers = {
        layer.name: layer for layer in StockJob.plan(shapes, recognise(shapes, "m"), recipe, "m")
    }
    kept = layers["double_blocks.0.img_mlp.0"]
    assert (kept.action, kept.why) == ("keep", "K=120 is not a multiple of 64")
    assert layers["double_blocks.0.img_mlp.2"].action != "keep"
