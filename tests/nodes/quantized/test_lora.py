"""Patches on 4-bit layers: the change is exact whichever way ComfyUI hands it over, and the 4-bit
base never changes.
"""

import comfy.lora
import comfy.memory_management
import comfy.model_management
import comfy.ops
import comfy.pinned_memory
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_patcher import LowVramPatch

from flux_loras import (
    MLP,
    MODULATION,
    POST_GELU,
    assert_changed_by,
    assert_untouched,
    bits,
    changes,
    layer_of,
    lora_file,
    outputs,
    pair,
    with_lora,
)
from nibble.nodes.bridge.quantized import layouts, loading, lora


class Attached:
    """Patches as dynamic VRAM attaches them (ModelPatcherDynamic.load), which itself needs
    a GPU.
    """

    def __init__(self, patcher):
        weights = [key for key in patcher.patches if key.endswith(".weight")]
        self.modules = {
            key: comfy.utils.get_attr(patcher.model, key.rsplit(".", 1)[0]) for key in weights
        }
        self.patches = patcher.patches

    def __enter__(self):
        for key, module in self.modules.items():
            module.weight_lowvram_function = LowVramPatch(key, self.patches)
            module.weight_function = []
        return self

    def __exit__(self, *_):
        for module in self.modules.values():
            module.weight_lowvram_function = None
            module.weight_function = []


# ---- loaded whole


@pytest.mark.parametrize("strength", [0.8, -0.5, 1.0])
def test_a_fully_loaded_lora_is_exact_to_16_bit_rounding(model, strength):
    comfy.model_management.load_models_gpu([model])
    before, tensors = outputs(model), lora_file(model)
    comfy.model_management.load_models_gpu([with_lora(model, tensors, strength)])
    assert_changed_by(before, outputs(model), changes(tensors, strength), 6e-3)


def test_on_rotated_layers_too(rotated_file):
    model = loading.load(rotated_file)
    comfy.model_management.load_models_gpu([model])
    before, tensors = outputs(model), lora_file(model)
    assert layer_of(model, MLP).weight.params.rotation == 64
    patched = with_lora(model, tensors)
    comfy.model_management.load_models_gpu([patched])
    assert_changed_by(before, outputs(model), changes(tensors, 0.8), 6e-3)
    comfy.model_management.load_models_gpu([model])
    with Attached(patched):
        assert_changed_by(before, outputs(model), changes(tensors, 0.8), 1e-4)


def test_it_lies_in_the_low_rank_branch_and_the_codes_stay(model):
    comfy.model_management.load_models_gpu([model])
    base = layer_of(model, MLP).weight
    comfy.model_management.load_models_gpu([with_lora(model, lora_file(model))])
    patched = layer_of(model, MLP).weight
    rank = base.params.proj_up.shape[1]
    assert patched.params.proj_up.shape[1] == rank + 16
    assert patched.params.delta is None
    assert torch.equal(patched._qdata, base._qdata)
    assert torch.equal(patched.params.proj_up[:, :rank], base.params.proj_up)


def test_taken_off_the_base_is_back_bit_for_bit(model):
    comfy.model_management.load_models_gpu([model])
    before = bits(model)
    for seed in range(2):
        comfy.model_management.load_models_gpu([with_lora(model, lora_file(model, seed=seed))])
        assert (
            layer_of(model, MLP).weight.params.proj_up.shape[1]
            > before[f"diffusion_model.{MLP}.weight_proj_up"].shape[1]
        )
    comfy.model_management.load_models_gpu([model])
    assert_untouched(model, before)


def test_two_loras_add_up_and_the_same_twice_doubles(model):
    comfy.model_management.load_models_gpu([model])
    before, first, second = outputs(model), lora_file(model), lora_file(model, seed=40)
    comfy.model_management.load_models_gpu(
        [with_lora(with_lora(with_lora(model, first, 0.5), first, 0.5), second, 0.3)]
    )
    one, two = changes(first, 1.0), changes(second, 0.3)
    assert_changed_by(before, outputs(model), {name: one[name] + two[name] for name in one}, 6e-3)


def test_strength_zero_changes_nothing(model):
    comfy.model_management.load_models_gpu([model])
    before = outputs(model)
    patched = model.clone()
    patched.add_patches(
        comfy.lora.load_lora(lora_file(model), comfy.lora.model_lora_keys_unet(model.model, {})),
        0.0,
    )
    comfy.model_management.load_models_gpu([patched])
    assert all(torch.equal(y, before[name][1]) for name, (_, y) in outputs(model).items())


def test_a_change_without_low_rank_stays_dense_and_is_exact_too(model):
    comfy.model_management.load_models_gpu([model])
    before = outputs(model)
    delta = (
        torch.randn(layer_of(model, MLP).weight.shape, generator=torch.Generator().manual_seed(1))
        * 0.02
    )
    patched = model.clone()
    patched.add_patches({f"diffusion_model.{MLP}.weight": ("diff", (delta,))}, 1.0)
    comfy.model_management.load_models_gpu([patched])
    assert layer_of(model, MLP).weight.params.delta is not None
    assert_changed_by(before, outputs(model), {MLP: delta}, 6e-3)


@pytest.mark.parametrize("name", [MLP, POST_GELU, MODULATION])
def test_a_merge_with_the_16_bit_model_is_half_of_each(model, dense_model, name):
    merged = model.clone()
    patches = dense_model.get_key_patches("diffusion_model.")
    for key in (f"diffusion_model.{name}.weight", f"diffusion_model.{name}.bias"):
        merged.add_patches({key: patches[key]}, 0.5, 0.5)
    ours, dense = layer_of(model, name), layer_of(dense_model, name)
    base = layouts.unpack(ours.weight, ours.bias)
    expected = 0.5 * layouts.effective_weight(ours.weight) + 0.5 * dense.weight
    bias = 0.5 * base.effective_bias() + 0.5 * dense.bias
    comfy.model_management.load_models_gpu([merged])
    now = layouts.unpack(ours.weight, ours.bias)
    assert torch.allclose(
        layouts.effective_weight(ours.weight), expected, atol=2e-3 * expected.abs().max()
    )
    assert torch.allclose(now.effective_bias(), bias, atol=4e-3 * bias.abs().max())


# ---- attached: low VRAM and dynamic VRAM


def test_partly_loaded_the_lora_runs_beside_the_layer(model):
    model.patch_model(model.load_device, lowvram_model_memory=1)
    before, tensors = outputs(model), lora_file(model)
    model.detach()
    patched = with_lora(model, tensors)
    patched.patch_model(patched.load_device, lowvram_model_memory=1)
    assert layer_of(model, MLP).weight_function, "the patch is attached, not merged"
    stored = bits(model)
    assert_changed_by(before, outputs(model), changes(tensors, 0.8), 1e-4)
    assert_untouched(model, stored)
    patched.detach()


def test_attached_by_dynamic_vram_the_streamed_weight_stays_as_it_is(model):
    comfy.model_management.load_models_gpu([model])
    before, stored, tensors = outputs(model), bits(model), lora_file(model)
    with Attached(with_lora(model, tensors)):
        linear = layer_of(model, MLP)
        assert linear.weight_lowvram_function is None, "ComfyUI finds nothing to requantize for"
        assert_changed_by(before, outputs(model), changes(tensors, 0.8), 1e-4)
    assert_untouched(model, stored)
    assert all(torch.equal(y, before[name][1]) for name, (_, y) in outputs(model).items())


def test_comfyui_s_streaming_delivers_the_weight_whole_and_unpatched(model, monkeypatch):
    """ComfyUI's own functions for dynamic VRAM, with plain memory in place of the virtual buffer
    that needs a GPU.
    """
    monkeypatch.setattr(comfy.ops.comfy_aimdo.model_vbar, "vbar_fault", lambda buffer: 1)
    monkeypatch.setattr(
        comfy.ops.comfy_aimdo.model_vbar, "vbar_signature_compare", lambda now, then: now == then
    )
    monkeypatch.setattr(
        comfy.ops.comfy_aimdo.torch, "aimdo_to_tensor", lambda buffer, device: buffer
    )
    monkeypatch.setattr(comfy.pinned_memory, "pin_memory", lambda *_, **__: False)
    monkeypatch.setattr(comfy.pinned_memory, "get_pin", lambda *_, **__: None)
    linear, cpu = layer_of(model, MLP), torch.device("cpu")
    linear._v = torch.empty(
        comfy.memory_management.vram_aligned_size([linear.weight, linear.bias]), dtype=torch.uint8
    )
    linear._v_signature, linear.seed_key = None, MLP
    with Attached(with_lora(model, lora_file(model))):
        for _ in range(2):  # streamed in, then found resident
            comfy.ops.cast_modules_with_vbar(
                [linear], linear.weight.dtype, cpu, torch.float32, False
            )
            functions, linear._weight_functions = linear._weight_functions, []  # as forward does
            weight, _ = comfy.ops.resolve_cast_module_with_vbar(
                linear, linear.weight.dtype, cpu, torch.float32, torch.float32, True
            )
            linear._weight_functions = functions
            names, _ = weight.__tensor_flatten__()
            linear.weight.__tensor_flatten__()  # fills in the attributes that are compared
            assert all(
                torch.equal(getattr(weight, name), getattr(linear.weight, name)) for name in names
            )
            assert weight._qdata.data_ptr() == linear._v.data_ptr()


def test_attached_patches_survive_whichever_attribute_comfyui_sets_last(model):
    linear, patch = layer_of(model, MLP), object()
    linear.weight_function = []
    linear.weight_lowvram_function = patch
    assert [f.patch for f in linear.weight_function] == [patch]
    linear.weight_function = []
    assert [f.patch for f in linear.weight_function] == [patch]
    linear.weight_lowvram_function = None
    assert linear.weight_function == []


def test_an_attached_adapter_moves_and_is_counted_as_comfyui_asks(model):
    patched = with_lora(model, lora_file(model))
    with Attached(patched):
        side = layer_of(model, MLP).weight_function[0]
        assert side.move_to(torch.device("cpu")) == 0
        assert side.patch.prepared_patches is None
        side.patch.prepare(
            torch.empty(side.patch.memory_required(), dtype=torch.uint8), None, copy=True
        )
        before = outputs(model)[MLP][1]
        side.move_to(torch.device("cpu"))
        assert torch.equal(outputs(model)[MLP][1], before)


def test_an_ordinary_layer_keeps_comfyui_s_own_protocol(model):
    linear, patch = layer_of(model, "img_in"), object()
    linear.weight_lowvram_function = patch
    assert linear.weight_lowvram_function is patch
    assert linear.weight_function == []
    linear.weight_lowvram_function = None


@pytest.mark.parametrize("name", [MLP, POST_GELU, MODULATION])
@pytest.mark.parametrize("kind", ["dora", "loha", "diff", "scaled model"])
def test_any_other_patch_changes_the_weight_as_comfyui_computes_it(model, kind, name):
    comfy.model_management.load_models_gpu([model])
    linear = layer_of(model, name)
    n, k = linear.weight.shape
    key = f"diffusion_model.{name}.weight"
    (up, down), (up2, down2) = pair(n, k), pair(n, k, seed=5)
    stem = "lora_unet_" + name.replace(".", "_")
    tensors = {
        "dora": {
            f"{stem}.lora_up.weight": up,
            f"{stem}.lora_down.weight": down,
            f"{stem}.dora_scale": torch.rand(n, 1) + 0.5,
        },
        "loha": {
            f"{stem}.hada_w1_a": up,
            f"{stem}.hada_w1_b": down,
            f"{stem}.hada_w2_a": up2,
            f"{stem}.hada_w2_b": down2,
        },
    }
    patched = model.clone()
    if kind in tensors:
        patched.add_patches(
            comfy.lora.load_lora(tensors[kind], comfy.lora.model_lora_keys_unet(model.model, {})),
            0.7,
        )
    else:
        patched.add_patches(
            {key: ("diff", (up @ down,))}, 0.7, 0.6 if kind == "scaled model" else 1.0
        )
    original = layouts.effective_weight(linear.weight)
    delta = comfy.lora.calculate_weight(patched.patches[key], original.clone(), key) - original
    # What scales the rows of the weight scales the layer's whole output, and with it what rounding
    # x to 4 bits did to it: the output then
    # is not the plain one plus x · delta, unless there is no such rounding. Every other kind leaves
    # the plain output alone.
    exact = kind in ("dora", "scaled model")
    before = outputs(model, exact)
    with Attached(patched):
        assert_changed_by(before, outputs(model, exact), {name: delta}, 1e-4)


def test_rounding_is_no_change(model):
    linear = layer_of(model, MLP)
    original = layouts.effective_weight(linear.weight)
    assert lora.dense_delta(linear.weight, original * (1 + 1e-7)) is None
