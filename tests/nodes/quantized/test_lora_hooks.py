"""LoRA hooks on 4-bit layers: on and off between steps, and the base stays as it was."""

import comfy.hooks
import comfy.model_management
import pytest
import torch

from flux_loras import POST_GELU, assert_changed_by, changes, layer_of, lora_file, outputs


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
def test_a_lora_hook_is_switched_on_and_off_any_number_of_times(model, inference):
    """Also as ComfyUI's server runs nodes, in inference mode, where torch hands `to(copy=True)` to
    tensors in another way.
    """
    with torch.inference_mode(inference):
        switch_a_hook(model)


def switch_a_hook(model):
    tensors = lora_file(model)
    patcher, _, hooks = comfy.hooks.load_hook_lora_for_models(model, None, tensors, 0.8, 0)
    patcher.register_all_hook_patches(
        hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    )
    comfy.model_management.load_models_gpu([patcher])
    before = outputs(model)
    for _ in range(3):  # the second time comes from ComfyUI's cache of hooked weights
        patcher.apply_hooks(hooks)
        assert_changed_by(before, outputs(model), changes(tensors, 0.8), 6e-3)
        patcher.apply_hooks(None)
        assert all(torch.equal(y, before[name][1]) for name, (_, y) in outputs(model).items())
    patcher.clean_hooks()


def test_a_hook_on_the_bias_of_an_unsigned_layer_keeps_its_shift(model):
    linear, delta = (
        layer_of(model, POST_GELU),
        torch.randn(128, generator=torch.Generator().manual_seed(2)) * 0.1,
    )
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights, hook.need_weight_init = (
        {f"diffusion_model.{POST_GELU}.bias": ("diff", (delta,))},
        False,
    )
    hooks, patcher = comfy.hooks.HookGroup(), model.clone()
    hooks.add(hook)
    patcher.register_all_hook_patches(
        hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
    )
    comfy.model_management.load_models_gpu([patcher])
    before, bias = outputs(model)[POST_GELU][1], linear.bias.clone()
    assert linear.weight.params.act_unsigned, "its bias has the shift folded in"
    for _ in range(2):
        patcher.apply_hooks(hooks)
        assert torch.allclose(
            outputs(model)[POST_GELU][1] - before, delta.expand_as(before), atol=1e-3
        )
        patcher.apply_hooks(None)
        assert torch.equal(linear.bias, bias)
    patcher.clean_hooks()
