"""The swapped Linear inside ComfyUI's FLUX: right numbers, whole or partly loaded, compiled,
cloned.
"""

import comfy.model_management
import pytest
import torch

from flux_runs import decibels, little_for_weights, loaded, run, sampled
from nibble import kernels
from nibble.nodes.bridge.quantized import layouts, loading

W4A4, W4A16 = "single_blocks.0.linear1", "single_blocks.0.modulation.lin"


def test_comfyui_detects_the_model_that_was_quantized(model, dense_model):
    ours, theirs = model.model.model_config, dense_model.model.model_config
    assert type(ours) is type(theirs)
    assert ours.unet_config == theirs.unet_config
    assert model.model.get_dtype() == dense_model.model.get_dtype()


def test_each_layer_runs_the_op(model):
    for name, op in ((W4A4, kernels.linear_w4a4), (W4A16, kernels.linear_w4a16)):
        linear = model.model.diffusion_model.get_submodule(name)
        x, p, codes = torch.randn(2, 5, 128), linear.weight.params, linear.weight._qdata
        if name == W4A4:
            expected = op(
                x,
                codes,
                p.scale,
                p.smooth_factor,
                p.proj_down,
                p.proj_up,
                linear.bias,
                p.act_unsigned,
                p.rotation,
                act_bits=p.act_bits,
            )
        else:
            expected = op(x, codes, p.scale, p.zeros, linear.bias)
        assert torch.equal(linear(x), expected)


def test_the_model_s_output_is_close_to_the_16_bit_one(model, dense_model):
    assert decibels(run(loaded(dense_model)), run(loaded(model))) > 18


def test_partly_loaded_it_gives_the_same_bits(model):
    whole = run(loaded(model))
    comfy.model_management.unload_all_models()
    model.patch_model(model.load_device, lowvram_model_memory=model.model_size() // 3)
    assert model.model.model_lowvram
    assert torch.equal(run(model), whole)
    model.detach()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_it_computes_in_the_dtype_asked_for(quantized_file, model, dtype):
    other = loading.load(quantized_file, dtype=dtype)
    assert other.model.get_dtype() == loading.DTYPES[dtype]
    # another rounding of activations flips codes: as far off as 4 bits are
    assert decibels(run(loaded(model)), run(loaded(other))) > 18


def test_a_deep_clone_is_loaded_from_the_file_again(model):
    whole = run(loaded(model))
    clone = model.clone(force_deepcopy=True)
    assert clone.model is not model.model
    assert torch.equal(run(loaded(clone)), whole)


def test_clones_share_the_weights(model):
    assert model.clone().model is model.model


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("name", [W4A4, W4A16])
def test_a_layer_compiles_without_a_graph_break(model, backend, name):
    torch._dynamo.reset()
    linear = model.model.diffusion_model.get_submodule(name)
    x = torch.randn(4, 128)
    with torch.no_grad():
        assert torch.equal(torch.compile(linear, backend=backend, fullgraph=True)(x), linear(x))


@pytest.mark.parametrize("state", ["LOW_VRAM", "NO_VRAM"])
def test_sampling_with_offloaded_weights_gives_the_same_bits(model, monkeypatch, state):
    """ComfyUI's states of --lowvram and --novram, which it grants to a GPU only: here the CPU
    passes for one without room for weights.
    """
    plain = sampled(model)
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(
        comfy.model_management, "vram_state", comfy.model_management.VRAMState[state]
    )
    monkeypatch.setattr(comfy.model_management, "get_free_memory", little_for_weights)
    assert torch.equal(sampled(model), plain)
    assert model.model.model_lowvram, "most weights were left offloaded"
    comfy.model_management.unload_all_models()


def test_the_torch_compile_node_s_wrapper_gives_the_same_picture(model):
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    torch._dynamo.reset()
    plain = sampled(model)
    compiled = model.clone()
    set_torch_compile_wrapper(
        model=compiled, backend="eager", keys=["diffusion_model.single_blocks.1"]
    )
    assert torch.equal(sampled(compiled), plain)
    assert torch.equal(sampled(model), plain), "and leaves the model as it was"


def test_a_controlnet_s_residuals_act_as_on_the_16_bit_model(model, dense_model):
    draw = torch.Generator().manual_seed(0)
    x, context, y, residual = (
        torch.randn(shape, generator=draw)
        for shape in ((1, 16, 8, 8), (1, 6, 64), (1, 64), (1, 16, 128))
    )

    def effect(patcher):
        network = loaded(patcher).model.diffusion_model
        inputs = dict(
            timestep=torch.tensor([0.6]), context=context, y=y, guidance=torch.tensor([3.5])
        )
        with torch.no_grad():
            return network(
                x, **inputs, control={"input": [residual], "output": [residual]}
            ) - network(x, **inputs)

    assert decibels(effect(dense_model), effect(model)) > 14


def test_a_streamed_layer_that_is_used_on_the_cpu_stays_quantized(model):
    linear, x = model.model.diffusion_model.get_submodule(W4A4), torch.randn(3, 128)
    expected = linear(x)
    linear._v = object()  # as dynamic VRAM marks a streamed layer
    assert torch.equal(linear(x), expected)
    del linear._v


def test_gradients_reach_the_input_and_stop_at_the_weight(model):
    linear = model.model.diffusion_model.get_submodule(W4A4)
    x = torch.randn(3, 128, requires_grad=True)
    linear(x).sum().backward()
    expected = layouts.effective_weight(linear.weight).sum(0)
    assert torch.allclose(x.grad, expected.expand(3, -1), rtol=1e-3, atol=1e-3)
    assert not linear.weight.requires_grad


def test_a_weight_wrapper_of_another_node_sees_the_whole_weight(model, caplog):
    loaded(model)
    name = f"diffusion_model.{W4A4}.weight"
    linear = model.model.diffusion_model.get_submodule(W4A4)
    x = torch.randn(3, 128)
    dense = torch.nn.functional.linear(x, layouts.effective_weight(linear.weight) * 2, linear.bias)
    wrapped = model.clone()
    wrapped.add_weight_wrapper(name, lambda weight: weight * 2)
    loaded(wrapped)
    assert torch.allclose(linear(x), dense, rtol=1e-4, atol=1e-4)
    assert "16-bit speed" in caplog.text
    loaded(model)
    assert not linear.weight_function
