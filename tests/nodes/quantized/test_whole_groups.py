"""ComfyUI's model of a layer with zeros behind its inputs is an ordinary one: (N, K) weights, LoRAs
and hooks included.
"""

import dataclasses

import comfy.model_detection
import comfy.supported_models
import pytest
import torch

import tiny_models
from nibble.nodes.bridge.quantized import layouts, loading
from nibble.quant.files import universal_plan
from nibble.quant.files.source import StateDictSource
from nibble.quant.svdquant.quantize import SVDQuantJob
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.vq4dit.quantize import VQJob
from nibble.quant.vq4dit.recipe import Recipe as VQRecipe

QUICK = dict(rank=16, solver="svd", smoothing_grid=1)
JOBS = {
    "svdquant": (SVDQuantJob, Recipe.from_preset("fast", **QUICK)),
    "w4a8": (SVDQuantJob, Recipe.from_preset("fast", format="svdquant_w4a8", **QUICK)),
    "nvfp4": (SVDQuantJob, Recipe.from_preset("fast", format="svdquant_nvfp4", **QUICK)),
    "vq": (VQJob, VQRecipe.from_preset("fast", bits=4)),
}
LAYER = "layers.1.feed_forward.linear_1"


@pytest.fixture(autouse=True)
def omnigen_of_120(monkeypatch):
    """OmniGen2 with 120 inputs where it has 2520: neither is a multiple of 64."""
    family = tiny_models.FAMILIES["omnigen 2"]
    options = family.options | dict(hidden_size=120, axes_dim_rope=[10, 10, 10])
    monkeypatch.setitem(
        tiny_models.FAMILIES, "omnigen 2", dataclasses.replace(family, options=options)
    )
    monkeypatch.setattr(universal_plan, "LEAST", 1)

    def told(*_args, **_kwargs):
        config = getattr(comfy.supported_models, family.config)(dict(options))
        config.unet_config.update(options)
        return config

    monkeypatch.setattr(comfy.model_detection, "model_config_from_unet", told)
    monkeypatch.setattr(type(told()), "process_unet_state_dict", lambda self, state: state)


@pytest.fixture(params=JOBS)
def made(request, tmp_path):
    """(16-bit model, the same quantized), each as ComfyUI's patcher."""
    dense = tiny_models.build("omnigen 2")
    state = {k: v.contiguous() for k, v in dense.model.diffusion_model.state_dict().items()}
    job, recipe = JOBS[request.param]
    job.prepare(StateDictSource(state), tmp_path / "q.safetensors", recipe).write()
    return dense, loading.load(tmp_path / "q.safetensors", dtype="fp32")


def draw(model):
    with torch.inference_mode():
        return tiny_models.sample(model, "omnigen 2", steps=1)


def relative(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def weight_in(model, name=LAYER):
    return model.model.diffusion_model.get_submodule(name).weight


def test_it_draws_and_its_layers_have_the_models_shapes(made):
    dense, quantized = made
    weight = weight_in(quantized)
    assert layouts.is_ours(weight) and layouts.is_padded(weight)
    assert weight.shape == weight_in(dense).shape and weight.shape[1] == 120
    effective = layouts.effective_weight(weight)
    assert effective.shape == weight.shape
    assert relative(effective, weight_in(dense)) < 0.3
    assert torch.equal(weight.dequantize(), effective.to(weight.dtype))
    assert relative(draw(quantized), draw(dense)) < 0.6


def test_what_comfyui_saves_of_it_is_its_file(made):
    _, quantized = made
    layer = quantized.model.diffusion_model.get_submodule(LAYER)
    state = layer.state_dict()
    other = type(layer)(120, layer.out_features, layer.bias is not None)
    other.load_state_dict(state)
    assert other(torch.randn(3, 120)).shape == (3, layer.out_features)
    again, first = (layouts.effective_weight(part.weight) for part in (other, layer))
    assert torch.equal(again, first)


def test_a_lora_on_it_does_what_it_does_in_16_bit(made):
    from comfy.weight_adapter import LoRAAdapter

    _, quantized = made
    name = f"diffusion_model.{LAYER}.weight"
    n, k = weight_in(quantized).shape
    up, down = torch.randn(n, 4), torch.randn(4, k)
    before = layouts.effective_weight(weight_in(quantized))
    patched = quantized.clone()
    patched.add_patches({name: LoRAAdapter(set(), (up, down, 4.0, None, None, None))}, 0.5)
    x = torch.randn(5, k)
    plain = quantized.model.diffusion_model.get_submodule(LAYER)(x)
    patched.patch_model()
    try:
        changed = weight_in(patched)
        assert relative(layouts.effective_weight(changed) - before, 0.5 * up @ down) < 0.02
        found = patched.model.diffusion_model.get_submodule(LAYER)(x) - plain
        assert relative(found, 0.5 * x @ down.T @ up.T) < 0.05
    finally:
        patched.unpatch_model()


def test_a_dense_difference_and_a_hook_fit_it(made):
    _, quantized = made
    weight = weight_in(quantized)
    difference = torch.randn(weight.shape) * 0.1
    x = torch.randn(5, weight.shape[1])
    plain = layouts.linear(x, weight, None)
    from nibble.nodes.bridge.quantized import lora
    from nibble.quant.weights.delta import WeightDelta

    beside = layouts.linear(x, weight, None, [WeightDelta(dense=difference)])
    held = layouts.linear(x, lora.concat_branch(weight, WeightDelta(dense=difference)), None)
    hooked = layouts.linear(x, layouts.with_hook(weight, WeightDelta(dense=difference)), None)
    for found in (beside, held, hooked):
        assert relative(found - plain, x @ difference.T) < 0.01
