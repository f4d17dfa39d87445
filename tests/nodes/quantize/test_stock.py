"""Files for stock ComfyUI: its own loader opens them, without any class of Nibble's, and computes
what they were fitted to.
"""

import comfy.sd
import pytest
import torch
from comfy.quant_ops import QuantizedTensor
from safetensors import safe_open

from flux_runs import decibels, loaded, run
from nibble.nodes.bridge.quantize.stock import StockRequest
from nibble.quant.svdquant.stock.formats import FORMATS
from nibble.quant.svdquant.stock.quantize import StockJob
from nibble.quant.svdquant.stock.recipe import StockRecipe

LAYER = "double_blocks.0.img_mlp.2"


def made(flux_file, target, **choices):
    recipe = StockRecipe.from_preset("fast", **choices)
    return StockJob.prepare(flux_file, target, recipe).write()


@pytest.mark.parametrize(
    ("form", "least"), [("asym_w4a8_int8", 20), ("int8_convrot", 35), ("nvfp4", 17)]
)
def test_stock_loader_opens_each_format(form, least, flux_file, dense_model, tmp_path):
    target = tmp_path / f"{form}.safetensors"
    made(flux_file, target, format=form)
    model = loaded(comfy.sd.load_diffusion_model(str(target)))
    weight = model.model.diffusion_model.get_submodule(LAYER).weight
    assert type(weight) is QuantizedTensor or type(weight.data) is QuantizedTensor
    assert weight._layout_cls in (
        "AsymW4A8Int8Layout",
        "TensorWiseINT8Layout",
        "TensorCoreNVFP4Layout",
    )
    exact = run(loaded(dense_model))
    assert decibels(exact, run(model)) > least


@pytest.mark.parametrize("form", list(FORMATS))
def test_what_is_reported_is_what_comfyui_decodes(form, flux_file, dense_model, tmp_path):
    """Weights alone: ComfyUI's decoding against the layer of the source."""
    target = tmp_path / f"{form}.safetensors"
    made(flux_file, target, format=form)
    model = comfy.sd.load_diffusion_model(str(target)).model.diffusion_model
    stored = model.get_submodule(LAYER).weight.dequantize().float()
    source = dense_model.model.diffusion_model.get_submodule(LAYER).weight.float()
    assert decibels(source, stored[: len(source)]) > {"int8_convrot": 38}.get(form, 20)


def test_a_finished_file_is_not_made_again_and_another_program_s_not_replaced(
    folder, flux_file, monkeypatch
):
    recipe = StockRecipe.from_preset("fast", format="int8_convrot")
    request = StockRequest(model_name="flux.safetensors", recipe=recipe)
    name, report = request.run()
    assert name == "flux-int8_convrot.safetensors"
    before = (folder / name).stat().st_mtime_ns
    assert request.run()[1].rows == report.rows or (folder / name).stat().st_mtime_ns == before
    with safe_open(folder / name, "pt") as file:
        assert file.metadata()["format"] == "nibble-stock"
    (folder / "other.safetensors").write_bytes((folder / "flux.safetensors").read_bytes())
    with pytest.raises(ValueError, match="another kind of file"):
        StockRequest(
            model_name="flux.safetensors", recipe=recipe, filename="other", overwrite=True
        ).run()


def test_best_asks_for_prompts():
    recipe = StockRecipe.from_preset("best")
    with pytest.raises(ValueError, match="positive"):
        StockRequest(model_name="flux.safetensors", recipe=recipe).run()


def test_a_lora_goes_on_top(flux_file, tmp_path):
    target = tmp_path / "w4a8.safetensors"
    made(flux_file, target)
    model = comfy.sd.load_diffusion_model(str(target))
    plain = run(loaded(model))
    n, k = model.model.diffusion_model.get_submodule(LAYER).weight.shape
    draw = torch.Generator().manual_seed(0)
    key = f"diffusion_model.{LAYER}"
    adapter = {
        f"{key}.lora_A.weight": torch.randn(4, k, generator=draw),
        f"{key}.lora_B.weight": torch.randn(n, 4, generator=draw),
    }
    patched, _ = comfy.sd.load_lora_for_models(model, None, adapter, 1.0, 0)
    assert decibels(plain, run(loaded(patched))) < 40
