"""Each kind of 4-bit layer at work in ComfyUI: LoRAs, hooks, low VRAM, torch.compile; int4 with
activations of 4 and of 8 bits, levels of a table, 4-bit floats.
"""

import comfy.hooks
import comfy.model_management
import pytest
import torch

from flux_loras import assert_changed_by, changes, layer_of, lora_file, outputs, with_lora
from flux_runs import decibels, loaded, run
from nibble.nodes.bridge.quantized import loading

KINDS = {
    "4 bit": ("quantized_file", "4 bit"),
    "8 bit": ("quantized_file", "8 bit"),
    "table": ("table_file", "auto"),
    "floats": ("float_file", "auto"),
}
LINEAR = "double_blocks.0.img_mlp.0"


@pytest.fixture(params=KINDS)
def kind(request):
    """A fresh model patcher of each kind."""
    file, choice = KINDS[request.param]
    return loading.load(request.getfixturevalue(file), activations=choice)


def test_its_output_is_close_to_the_16_bit_one(kind, dense_model):
    assert decibels(run(loaded(dense_model)), run(loaded(kind))) > 18


def test_a_lora_changes_its_layers_as_it_should(kind):
    before, tensors = outputs(loaded(kind)), lora_file(kind)
    patched = loaded(with_lora(kind, tensors))
    assert_changed_by(before, outputs(kind), changes(tensors, 0.8), 0.02)
    patched.detach()


def test_partly_loaded_a_lora_runs_beside_it(kind):
    kind.patch_model(kind.load_device, lowvram_model_memory=1)
    before, tensors = outputs(kind), lora_file(kind)
    kind.detach()
    patched = with_lora(kind, tensors)
    patched.patch_model(patched.load_device, lowvram_model_memory=1)
    assert layer_of(kind, LINEAR).weight_function, "the patch is attached, not merged"
    assert_changed_by(before, outputs(kind), changes(tensors, 0.8), 1e-4)
    patched.detach()


def test_a_hook_is_switched_on_and_off(kind):
    tensors = lora_file(kind)
    patcher, _, hooks = comfy.hooks.load_hook_lora_for_models(kind, None, tensors, 0.8, 0)
    targets = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    patcher.register_all_hook_patches(hooks, targets)
    comfy.model_management.load_models_gpu([patcher])
    before = outputs(kind)
    for _ in range(2):
        patcher.apply_hooks(hooks)
        assert_changed_by(before, outputs(kind), changes(tensors, 0.8), 0.02)
        patcher.apply_hooks(None)
        assert all(torch.equal(y, before[name][1]) for name, (_, y) in outputs(kind).items())
    patcher.clean_hooks()


def test_partly_loaded_it_gives_the_same_bits(kind):
    whole = run(loaded(kind))
    comfy.model_management.unload_all_models()
    kind.patch_model(kind.load_device, lowvram_model_memory=kind.model_size() // 3)
    assert kind.model.model_lowvram
    assert torch.equal(run(kind), whole)
    kind.detach()


def test_it_compiles_without_a_graph_break(kind):
    torch._dynamo.reset()
    linear = kind.model.diffusion_model.get_submodule(LINEAR)
    x = torch.randn(4, 128)
    with torch.no_grad():
        assert torch.equal(torch.compile(linear, backend="eager", fullgraph=True)(x), linear(x))
