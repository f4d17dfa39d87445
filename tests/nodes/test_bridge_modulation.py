"""Modulation layers in RAM: the same picture, fewer bytes for ComfyUI to place, results that are never mixed up."""

import comfy.model_management
import comfy.sd
import pytest
import torch
from test_bridge_ops import little_for_weights, run, sampled

from nibble import kernels
from nibble.nodes.bridge import layouts, loading, modulation

LIN = "double_blocks.0.img_mod.lin"


@pytest.fixture
def in_ram(quantized_file):
    return loading.load(quantized_file, modulation_in="ram")


def on(patcher):
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def lora(model, name, seed=0):
    n, k = model.model.diffusion_model.get_submodule(name).weight.shape
    draw = torch.Generator().manual_seed(seed)
    stem = "lora_unet_" + name.replace(".", "_")
    return {f"{stem}.lora_up.weight": torch.randn(n, 4, generator=draw) * 0.1, f"{stem}.lora_down.weight": torch.randn(4, k, generator=draw) / k ** 0.5}


def test_the_picture_is_the_same(model, in_ram):
    assert {layer.name for layer in modulation.hosted(in_ram)} == {
        LIN, "double_blocks.0.txt_mod.lin", "single_blocks.0.modulation.lin", "single_blocks.1.modulation.lin", "final_layer.adaLN_modulation.1",
        "guidance_in.out_layer", "vector_in.out_layer"}
    assert torch.equal(run(on(in_ram)), run(on(model)))
    assert torch.equal(sampled(in_ram), sampled(model))


def test_comfyui_neither_counts_nor_moves_them(model, in_ram):
    held = loading.ram_kept(in_ram)
    expected = sum(comfy.model_management.module_size(model.model.diffusion_model.get_submodule(layer.name)) for layer in modulation.hosted(in_ram))
    assert held == expected > 0
    assert in_ram.model_size() == model.model_size() - held == in_ram.clone().model_size()
    names = {entry[-2] for entry in in_ram._load_list()}
    assert not any(isinstance(module, modulation.HostLinear) for module in names)
    on(in_ram)
    in_ram.model.to(torch.device("meta"))  # as ComfyUI moves a whole model to a GPU
    assert all(layer.weight.device.type == "cpu" for layer in modulation.hosted(in_ram))


def test_the_state_dict_keeps_all_names_and_bits(model, in_ram):
    ours, theirs = in_ram.model.state_dict(), model.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert in_ram.get_key_patches("diffusion_model.").keys() == model.get_key_patches("diffusion_model.").keys()


def test_equal_inputs_are_computed_once_and_others_never_mixed_up(in_ram):
    layer = next(layer for layer in modulation.hosted(in_ram) if layer.name == LIN)
    bank = layer._bank
    a = torch.randn(1, 1, 128)
    b = a.clone()
    b[0, 0, 77] = torch.nextafter(b[0, 0, 77], torch.tensor(9.0))  # differs in the last bit
    first, second = layer(a), layer(b)
    assert torch.equal(first, layer.compute(a)) and torch.equal(second, layer.compute(b)) and not torch.equal(first, second)
    count = _settled(bank)
    buffer = a.clone()
    assert torch.equal(layer(buffer), first)
    buffer.copy_(b)  # the same memory, other contents: what identity would get wrong
    assert torch.equal(layer(buffer), second) and _settled(bank) == count


def _settled(bank):
    bank._thread.submit(lambda: None).result()
    return bank.computed


def test_the_blocks_behind_are_computed_ahead(in_ram):
    layers = modulation.hosted(in_ram)
    bank, x = layers[0]._bank, torch.randn(1, 1, 128)
    next(layer for layer in layers if layer.name == LIN)(x)
    assert _settled(bank) == 4  # the four of the blocks, and not the three that read something else
    for layer in layers:
        assert torch.equal(layer(x), layer.compute(x))
    assert _settled(bank) == 7


def test_the_cache_is_bounded():
    class Layer:
        name, in_features, is_hooked = "final", 8, False
        def compute(self, rows, fast):
            return rows * 2
    bank = modulation.Bank(limit=3 * 32)
    for i in range(10):
        assert torch.equal(bank.result(Layer(), torch.full((8,), float(i))), torch.full((8,), 2.0 * i))
    assert len(bank._results) == 3 and bank._size == 96


def test_the_product_for_a_gpu_s_input_is_the_layer_s(in_ram):
    for layer in modulation.hosted(in_ram):
        x = torch.randn(2, 1, layer.in_features)
        plain, fast = layer.compute(x), layer._bank.result(layer, x, fast=True)
        compiled = kernels.which("gemv_w4a16", "cpu")[0] == "native"  # then no second copy of the weight is packed
        assert (layer._packed is None) == compiled and (fast - plain).norm() < 1e-5 * plain.norm()


def test_a_patched_weight_is_never_left_to_the_packed_copy(model, in_ram):
    layer, x = in_ram.model.diffusion_model.get_submodule(LIN), torch.randn(1, 1, 128)
    plain = layer.compute(x, fast=True)
    patched = comfy.sd.load_lora_for_models(in_ram, None, lora(model, LIN), 0.8, 0)[0]
    on(patched)
    assert (layer.compute(x, fast=True) - plain).norm() > 0.05 * plain.norm()
    on(in_ram)
    assert torch.equal(layer.compute(x, fast=True), plain)


def test_a_stock_lora_on_a_modulation_layer_comes_and_goes(model, in_ram):
    x = torch.randn(1, 1, 128)
    tensors = lora(model, LIN)
    layer = in_ram.model.diffusion_model.get_submodule(LIN)
    plain = layer(x)
    patched = comfy.sd.load_lora_for_models(in_ram, None, tensors, 0.8, 0)[0]
    on(patched)
    expected = 0.8 * x @ tensors[f"lora_unet_{LIN.replace('.', '_')}.lora_down.weight"].t() @ tensors[f"lora_unet_{LIN.replace('.', '_')}.lora_up.weight"].t()
    assert (layer(x) - plain - expected).norm() < 0.01 * expected.norm()
    whole = run(patched)
    other = comfy.sd.load_lora_for_models(model, None, tensors, 0.8, 0)[0]
    reference = run(on(other))
    assert (whole - reference).norm() < 0.02 * reference.norm()
    on(in_ram)
    assert torch.equal(layer(x), plain)


def test_a_lora_hook_changes_and_restores_them(in_ram):
    import comfy.hooks
    tensors, x = lora(in_ram, LIN), torch.randn(1, 1, 128)
    patcher, _, hooks = comfy.hooks.load_hook_lora_for_models(in_ram, None, tensors, 0.8, 0)
    patcher.register_all_hook_patches(hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model))
    on(patcher)
    layer = in_ram.model.diffusion_model.get_submodule(LIN)
    plain = layer(x)
    for _ in range(2):
        patcher.apply_hooks(hooks)
        assert (layer(x) - plain).norm() > 0.05 * plain.norm()
        patcher.apply_hooks(None)
        assert torch.equal(layer(x), plain)
    patcher.clean_hooks()


def test_low_vram_gives_the_same_bits(in_ram, monkeypatch):
    plain = sampled(in_ram)
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.LOW_VRAM)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", little_for_weights)
    assert torch.equal(sampled(in_ram), plain)
    comfy.model_management.unload_all_models()


def test_gradients_pass_through(in_ram):
    layer, x = in_ram.model.diffusion_model.get_submodule(LIN), torch.randn(1, 128, requires_grad=True)
    layer(x).sum().backward()
    expected = layouts.effective_weight(layouts.unpack(layer.weight), layer.weight._params).sum(0)
    assert torch.allclose(x.grad[0], expected, rtol=1e-3, atol=1e-3)


def test_a_deep_clone_keeps_them_in_ram_too(in_ram):
    clone = in_ram.clone(force_deepcopy=True)
    assert clone.model is not in_ram.model and loading.ram_kept(clone) == loading.ram_kept(in_ram)
    assert torch.equal(run(on(clone)), run(on(in_ram)))


def test_a_compiled_model_gives_the_same_bits(in_ram):
    torch._dynamo.reset()
    network = on(in_ram).model.diffusion_model
    block, x = network.single_blocks[0].modulation, torch.randn(1, 1, 128)
    with torch.no_grad():
        assert torch.equal(torch.compile(block, backend="eager")(x)[0].scale, block(x)[0].scale)
