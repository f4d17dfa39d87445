"""Modulation layers in RAM: the same picture, fewer bytes for ComfyUI to place, results that are
never mixed up.
"""

import comfy.model_management
import comfy.sd
import pytest
import torch

from flux_runs import little_for_weights, run, sampled
from nibble import kernels
from nibble.nodes.bridge.quantized import layouts, loading, modulation
from nibble.quant.modulation.precompute import LayerState, ModulationCache

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
    return {
        f"{stem}.lora_up.weight": torch.randn(n, 4, generator=draw) * 0.1,
        f"{stem}.lora_down.weight": torch.randn(4, k, generator=draw) / k**0.5,
    }


def test_the_picture_is_the_same(model, in_ram):
    assert {layer.name for layer in modulation.cpu_layers(in_ram)} == {
        LIN,
        "double_blocks.0.txt_mod.lin",
        "single_blocks.0.modulation.lin",
        "single_blocks.1.modulation.lin",
        "final_layer.adaLN_modulation.1",
    }
    assert torch.equal(run(on(in_ram)), run(on(model)))
    assert torch.equal(sampled(in_ram), sampled(model))


def test_comfyui_neither_counts_nor_moves_them(model, in_ram):
    held = loading.ram_kept(in_ram)
    expected = sum(
        comfy.model_management.module_size(model.model.diffusion_model.get_submodule(layer.name))
        for layer in modulation.cpu_layers(in_ram)
    )
    assert held == expected > 0
    assert in_ram.model_size() == model.model_size() - held == in_ram.clone().model_size()
    names = {entry[-2] for entry in in_ram._load_list()}
    assert not any(isinstance(module, modulation.CpuLinear) for module in names)
    on(in_ram)
    in_ram.model.to(torch.device("meta"))  # as ComfyUI moves a whole model to a GPU
    assert all(layer.weight.device.type == "cpu" for layer in modulation.cpu_layers(in_ram))


def test_the_state_dict_keeps_all_names_and_bits(model, in_ram):
    ours, theirs = in_ram.model.state_dict(), model.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert (
        in_ram.get_key_patches("diffusion_model.").keys()
        == model.get_key_patches("diffusion_model.").keys()
    )


def test_equal_inputs_are_computed_once_and_others_never_mixed_up(in_ram):
    layer = next(layer for layer in modulation.cpu_layers(in_ram) if layer.name == LIN)
    cache = layer._cache
    a = torch.randn(1, 1, 128, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[0, 0, 77] = torch.nextafter(b[0, 0, 77], torch.tensor(9.0))  # differs in the last bit
    first, second = layer(a), layer(b)
    assert torch.equal(first, layer.compute(a))
    assert torch.equal(second, layer.compute(b))
    assert not torch.equal(first, second)
    count = _settled(cache)
    buffer = a.clone()
    assert torch.equal(layer(buffer), first)
    buffer.copy_(b)  # the same memory, other contents: what identity would get wrong
    assert torch.equal(layer(buffer), second)
    assert _settled(cache) == count


def _settled(cache):
    cache._thread.submit(lambda: None).result()
    return cache.computed


# ---- ahead of the step


class Layer:
    """Doubles its input."""

    in_features = out_features = 8

    def __init__(self, name, cache):
        self.name, self.calls = name, []
        cache.layers.append(self)

    def state(self):
        return LayerState(())

    def compute(self, rows, fast, state):
        self.calls.append((len(rows), fast))
        return rows * 2


def cache_of(count=3, **options):
    cache = ModulationCache(lambda sigmas: sigmas * 10, **options)
    return cache, [Layer(f"blocks.{i}", cache) for i in range(count)]


class Network:
    """Reads a vector of its timestep and pooled text in every layer; `change` alters what the last
    reads.
    """

    def __init__(self, cache, layers):
        self.cache, self.layers, self.change, self.runs, self.reads = cache, layers, 0.0, 0, []

    def original(self, x, timestep, context, y, transformer_options=None):
        self.runs += 1
        vector = timestep[:, None] + y
        outputs = [
            self.cache.output(layer, vector + self.change * (layer is self.layers[-1]))
            for layer in self.layers
        ]
        return torch.stack(outputs)

    __call__ = original

    def step(self, timestep, y, sigmas=None):
        x = torch.zeros(1, 16)
        with torch.no_grad():
            return self.cache.around(
                self,
                x,
                timestep,
                torch.zeros(1, 4),
                y,
                transformer_options={"sample_sigmas": sigmas},
            )


def expected(network, timestep, y):
    v = timestep[:, None] + y
    return torch.stack(
        [2 * (v + network.change * (layer is network.layers[-1])) for layer in network.layers]
    )


def test_a_run_s_results_are_made_before_its_steps_ask():
    cache, layers = cache_of()
    network, y, sigmas = Network(cache, layers), torch.rand(1, 8), torch.linspace(1, 0, 29)
    for sigma in sigmas[:-1]:
        t = (sigma * 10).reshape(1)
        assert torch.equal(network.step(t, y, sigmas), expected(network, t, y))
    assert (cache.steps, cache.hits) == (27, 26), (
        "the first step learns; the second finds out about the rest"
    )
    assert _settled(cache) == 28 * 3
    assert len(cache._followers) == 3
    for sigma in sigmas[:-1]:
        network.step((sigma * 10).reshape(1), y, sigmas)
    assert (cache.steps, cache.hits, _settled(cache)) == (55, 54, 28 * 3), (
        "the same prompt again: nothing is computed"
    )


def test_another_prompt_and_a_sampler_s_own_timesteps_are_computed_anew():
    cache, layers = cache_of()
    network, sigmas = Network(cache, layers), torch.linspace(1, 0, 5)
    # the second with both signs of guidance in one batch
    for y in (torch.rand(1, 8), torch.rand(2, 8)):
        for value in (10.0, 8.75, 7.5):
            t = torch.full((len(y),), value)
            assert torch.equal(network.step(t, y, sigmas), expected(network, t, y))


def test_a_vector_that_something_changes_on_the_way_is_noticed():
    cache, layers = cache_of()
    network, y = Network(cache, layers), torch.rand(1, 8)
    t = torch.tensor([5.0])
    network.step(t, y)
    assert torch.equal(network.step(t, y), expected(network, t, y))
    assert cache._trusted
    network.change = 0.125
    before = network.runs
    assert torch.equal(network.step(t, y), expected(network, t, y))
    assert network.runs == before + 2, "done again, every layer looking for itself"
    assert not cache._trusted, "done again, every layer looking for itself"
    assert torch.equal(network.step(t, y), expected(network, t, y))
    assert network.runs == before + 3


def test_a_layer_that_reads_something_else_is_no_follower():
    cache, layers = cache_of()
    network, y = Network(cache, layers), torch.rand(1, 8)
    network.change = 1.0
    for value in (3.0, 2.0, 2.0):
        t = torch.tensor([value])
        assert torch.equal(network.step(t, y), expected(network, t, y))
    assert cache._followers == layers[:2]
    assert cache._trusted


def test_for_a_gpu_every_weight_is_read_once_for_all_steps():
    cache, layers = cache_of()
    rows = torch.rand(5, 8)
    products, new = cache._requested(layers, rows, True)
    assert new == 15
    made = torch.stack([torch.cat([product.result() for product in row]) for row in products])
    assert torch.equal(made, torch.cat([rows * 2] * 3, -1))
    assert all(layer.calls == [(5, True)] for layer in layers)


def test_the_cache_is_bounded():
    cache, (layer,) = cache_of(1, limit=3 * 32)
    for i in range(10):
        assert torch.equal(
            cache.output(layer, torch.full((8,), float(i))), torch.full((8,), 2.0 * i)
        )
    assert len(cache._results) == 3
    assert cache._size == 96


def test_an_interrupted_step_leaves_nothing_behind():
    cache, layers = cache_of()
    network, y, t = Network(cache, layers), torch.rand(1, 8), torch.tensor([1.0])
    network.step(t, y)

    def stop(*_, **__):
        raise KeyboardInterrupt

    network.__class__ = type("Stopping", (Network,), {"__call__": stop})
    with pytest.raises(KeyboardInterrupt):
        network.step(t, y)
    assert cache._step is None
    assert cache._seen is None
    assert not cache._probing


def test_sampling_finds_its_results_made(in_ram, model):
    cache = modulation.cpu_layers(in_ram)[0]._cache
    assert torch.equal(sampled(in_ram), sampled(model))
    assert len(cache._followers) == 5
    assert torch.equal(sampled(in_ram), sampled(model))
    assert (cache.steps, cache.hits, cache._trusted) == (3, 2, True)


def test_the_product_for_a_gpu_s_input_is_the_layer_s(in_ram):
    for layer in modulation.cpu_layers(in_ram):
        x = torch.randn(2, 1, layer.in_features)
        plain, fast = layer.compute(x), layer.compute(x, fast=True)
        # then no second copy of the weight is packed
        compiled = kernels.which("gemv_w4a16", "cpu")[0] == "native"
        assert (layer._packed is None) == compiled
        assert (fast - plain).norm() < 1e-5 * plain.norm()


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
    expected = (
        0.8
        * x
        @ tensors[f"lora_unet_{LIN.replace('.', '_')}.lora_down.weight"].t()
        @ tensors[f"lora_unet_{LIN.replace('.', '_')}.lora_up.weight"].t()
    )
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
    patcher.register_all_hook_patches(
        hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    )
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
    monkeypatch.setattr(
        comfy.model_management, "vram_state", comfy.model_management.VRAMState.LOW_VRAM
    )
    monkeypatch.setattr(comfy.model_management, "get_free_memory", little_for_weights)
    assert torch.equal(sampled(in_ram), plain)
    comfy.model_management.unload_all_models()


def test_gradients_pass_through(in_ram):
    layer, x = (
        in_ram.model.diffusion_model.get_submodule(LIN),
        torch.randn(1, 128, requires_grad=True),
    )
    layer(x).sum().backward()
    expected = layouts.effective_weight(layer.weight).sum(0)
    assert torch.allclose(x.grad[0], expected, rtol=1e-3, atol=1e-3)


def test_a_deep_clone_keeps_them_in_ram_too(in_ram):
    clone = in_ram.clone(force_deepcopy=True)
    assert clone.model is not in_ram.model
    assert loading.ram_kept(clone) == loading.ram_kept(in_ram)
    assert torch.equal(run(on(clone)), run(on(in_ram)))


def test_a_compiled_model_gives_the_same_bits(in_ram):
    torch._dynamo.reset()
    network = on(in_ram).model.diffusion_model
    block, x = network.single_blocks[0].modulation, torch.randn(1, 1, 128)
    with torch.no_grad():
        assert torch.equal(torch.compile(block, backend="eager")(x)[0].scale, block(x)[0].scale)
