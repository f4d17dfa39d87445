"""Modulation layers in RAM under patches: the picture that they give in VRAM, and no trace of them
afterwards.
"""

import threading

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch

from flux_runs import loaded, sampled
from nibble.nodes.bridge.quantized import loading
from nibble.quant.modulation.precompute import ModulationInput
from random_flux import flux_state, quantize

LIN = "double_blocks.0.img_mod.lin"
BIAS = f"diffusion_model.{LIN}.bias"


@pytest.fixture
def in_ram(quantized_file):
    return loading.load(quantized_file, modulation_in="ram")


@pytest.fixture(scope="session")
def other_file(tmp_path_factory):
    """Another FLUX of the same shapes, at 4 bits."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("models") / "other-flux.safetensors"
    save_file(flux_state(seed=1), path)
    return quantize(path, "other.safetensors", rotation="off")


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def with_bias(model):
    """As BFL's canny and depth LoRAs and LyCORIS' do."""
    tensors = {f"lora_unet_{LIN.replace('.', '_')}.diff_b": drawn(768)}
    return comfy.sd.load_lora_for_models(model, None, tensors, 0.8, 0)[0]


def with_both(model):
    stem = f"lora_unet_{LIN.replace('.', '_')}"
    tensors = {
        f"{stem}.diff_b": drawn(768),
        f"{stem}.lora_up.weight": drawn(768, 4),
        f"{stem}.lora_down.weight": drawn(4, 128, seed=1),
    }
    return comfy.sd.load_lora_for_models(model, None, tensors, 0.8, 0)[0]


def with_wrapper(model):
    """Another node's function on a bias, which may write in place."""
    patched = model.clone()
    patched.add_weight_wrapper(BIAS, lambda bias: bias.add_(1))
    return patched


def bits(model):
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
@pytest.mark.parametrize("patch", [with_bias, with_both, with_wrapper])
def test_a_patch_gives_the_picture_of_vram_and_comes_off(quantized_file, patch, inference):
    with torch.inference_mode(inference):  # as ComfyUI's server runs nodes
        model = loading.load(quantized_file)
        in_ram = loading.load(quantized_file, modulation_in="ram")
        before, plain = bits(in_ram), sampled(in_ram)
        patched = sampled(patch(in_ram))
        assert not torch.equal(patched, plain)
        assert torch.equal(sampled(patch(model)), patched)
        assert torch.equal(sampled(in_ram), plain)
        after = bits(in_ram)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_merge_of_models_gives_the_picture_of_vram_and_comes_off(model, in_ram, other_file):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    def merged(one):
        return sampled(ModelMergeSimple().merge(one, loading.load(other_file), 0.7)[0])

    plain, expected = sampled(in_ram), merged(model)
    assert not torch.equal(expected, plain)
    assert torch.equal(merged(in_ram), expected)
    assert torch.equal(sampled(in_ram), plain)


def hooked(model, patches):
    """(patcher, hooks) of patches of single tensors, as Create Hook LoRA makes them."""
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights, hook.need_weight_init = patches, False
    hooks, patcher = comfy.hooks.HookGroup(), model.clone()
    hooks.add(hook)
    patcher.register_all_hook_patches(
        hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    )
    return patcher, hooks


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
@pytest.mark.parametrize("part", ["bias", "weight"])
def test_what_was_made_under_a_hook_is_never_served_without_it(quantized_file, part, inference):
    change = drawn(768) if part == "bias" else drawn(768, 128)
    patches = {f"diffusion_model.{LIN}.{part}": ("diff", (change,))}

    def pictures(place):
        one = loading.load(quantized_file, modulation_in=place)
        out = [sampled(one)]
        patcher, hooks = hooked(one, patches)
        loaded(patcher)
        for group in (hooks, None, hooks, None):
            patcher.apply_hooks(group)
            out.append(look(patcher))
        patcher.clean_hooks()
        return [*out, sampled(one)]

    with torch.inference_mode(inference):
        found, expected = pictures("ram"), pictures("vram")
    assert torch.equal(found[0], found[-1])
    assert torch.equal(found[1], found[3])
    assert torch.equal(found[2], found[4])
    assert not torch.equal(found[1], found[2])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def look(patcher):
    """The layer's output for one input that is asked for again and again."""
    with torch.no_grad():
        return patcher.model.diffusion_model.get_submodule(LIN)(drawn(1, 1, 128, seed=5))


def test_a_result_made_ahead_is_that_of_the_moment_when_it_was_asked_for(in_ram):
    """The thread that computes ahead may come to it after a hook was switched."""
    layer = in_ram.model.diffusion_model.get_submodule(LIN)
    loaded(in_ram)
    plain, row = look(in_ram), drawn(1, 128, seed=6)
    cache, expected = layer._cache, layer.compute(row)
    gate = threading.Event()
    cache._thread.submit(gate.wait)
    products, _ = cache._requested([layer], row, False)
    layer.bias.data.add_(1)
    gate.set()
    assert torch.equal(products[0][0].result(), expected[0])
    assert not torch.equal(look(in_ram), plain)
    assert not torch.equal(layer(row), expected)


def test_other_weights_are_never_served_the_old_ones_results(in_ram, other_file):
    loaded(in_ram)
    before = look(in_ram)
    layer = in_ram.model.diffusion_model.get_submodule(LIN)
    layer.compute(drawn(1, 128), fast=True)  # packs a copy, where that is done
    other = loading.load(other_file).model.diffusion_model.get_submodule(LIN)
    layer.weight, layer.bias = other.weight, other.bias
    assert not torch.equal(look(in_ram), before)
    row = drawn(1, 128)
    plain, fast = layer.compute(row), layer.compute(row, fast=True)
    assert (fast - plain).norm() < 1e-5 * plain.norm()


def test_what_is_kept_of_an_input_is_a_copy():
    vector = torch.zeros(1, 128)
    kept = ModulationInput.of(vector)
    vector.add_(1)
    assert not kept.rows.any()
