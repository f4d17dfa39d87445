"""Load SVDQuant Model on Nunchaku's NVFP4 files: what ComfyUI computes with them, LoRAs on top, and
saving.
"""

import comfy.sd
import pytest
import torch
from safetensors.torch import save_file

from flux_runs import decibels, loaded, run
from nibble import kernels
from nibble.nodes.bridge.host import charts
from nibble.nodes.bridge.quantize import record_inputs
from nibble.nodes.bridge.quantize.svdquant import SVDQuantRequest
from nibble.nodes.bridge.quantized import layouts, loading
from nibble.quant.interop.opening import open_4bit
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights.formats import weight_of
from published_fp4 import RandomFp4Flux, official

LAYER, THEIRS = "double_blocks.0.img_mlp.0", "transformer_blocks.0.mlp_fc1"


@pytest.fixture(scope="module")
def flux():
    return RandomFp4Flux(guidance=True)


@pytest.fixture(scope="module")
def path(flux, tmp_path_factory):
    target = tmp_path_factory.mktemp("fp4") / "svdq-fp4_r16-flux.safetensors"
    save_file(flux.state(), target)
    return target


def test_a_layer_of_the_model_computes_what_nunchaku_does(flux, path):
    model = loaded(loading.load(path))
    linear = model.model.diffusion_model.get_submodule(LAYER)
    assert layouts.format_of(linear.weight) == "svdquant_nvfp4"
    x = torch.randn(4, flux.hidden, generator=torch.Generator().manual_seed(0))
    wanted = torch.from_numpy(official(flux.parts[THEIRS], x))
    assert decibels(wanted, linear(x).double()) > 50  # the bias is in 16 bits there
    assert run(model).isfinite().all()


def test_a_lora_joins_the_branch(flux, path):
    model = loading.load(path)
    draw = torch.Generator().manual_seed(1)
    down, up = (torch.randn(shape, generator=draw) * 0.1 for shape in ((4, 128), (512, 4)))
    key = f"diffusion_model.{LAYER}"
    adapter = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    patched, _ = comfy.sd.load_lora_for_models(model, None, adapter, 1.0, 0)
    x = torch.randn(4, flux.hidden, generator=draw)
    plain = loaded(model).model.diffusion_model.get_submodule(LAYER)(x)
    with_lora = loaded(patched).model.diffusion_model.get_submodule(LAYER)
    assert layouts.format_of(with_lora.weight) == "svdquant_nvfp4"
    assert decibels(plain + x @ down.T @ up.T, with_lora(x)) > 40


def test_what_comfyui_saves_opens_again(path, tmp_path):
    model = loaded(loading.load(path))
    state = {
        key.removeprefix("diffusion_model."): tensor.contiguous()
        for key, tensor in model.model.diffusion_model.state_dict().items()
    }
    saved = tmp_path / "saved.safetensors"
    save_file(state, saved)
    one, other = (weight_of(open_4bit(p), LAYER) for p in (path, saved))
    assert torch.equal(one.dequantize(), other.dequantize())
    assert torch.equal(run(model), run(loaded(loading.load(saved))))


def test_what_computes_it_is_told_with_a_reason():
    backend, reason = kernels.which("linear_nvfp4", "cpu")
    assert backend == "reference"
    assert "no 4-bit floats on cpu" in reason


def test_the_quantize_node_makes_one_that_loads(folder, monkeypatch):
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: False)
    recipe = Recipe.from_preset(
        "fast", rank=16, solver="svd", smoothing_grid=2, format="svdquant_nvfp4"
    )
    name, report = SVDQuantRequest(model_name="flux.safetensors", recipe=recipe).run()
    assert name == "flux-svdq-fp4-r16.safetensors"
    assert "nvfp4" in {row.action for row in report.rows}
    made = loading.load(folder / name)
    assert run(loaded(made)).isfinite().all()
    chart = dict(
        charts.model_chart(open_4bit(folder / name), (1, 1), torch.device("cpu"))["details"]
    )
    assert "W4A4 in 4-bit floats, rank 16" in chart["layers"]
    assert chart["computed by"].startswith("reference (no 4-bit floats on cpu")
