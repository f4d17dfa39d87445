"""An MLP's two linears as one op: which models have such, when the op steps aside, and that the
picture stays what it was. The CPU stands for a GPU here.
"""

import comfy.model_management
import comfy.sd
import pytest
import torch
from comfy.ldm.wan.model import WanFeedForward

from checkout import ROOT
from flux_runs import decibels, little_for_weights, loaded, run, sampled
from nibble import kernels
from nibble.nodes.bridge.quantized import loading, mlp

MLPS = [f"double_blocks.0.{stream}_mlp" for stream in ("img", "txt")]


@pytest.fixture
def calls(monkeypatch):
    """The MLPs that ran through the op, on a CPU that passes for worth it and has it compiled."""
    seen = []

    def noted(*arguments):
        seen.append(arguments)
        return fused(*arguments)

    fused = kernels.mlp_w4a4
    monkeypatch.setattr(kernels, "mlp_w4a4", noted)
    monkeypatch.setattr(kernels, "fuses_mlp", lambda *kinds: True)
    monkeypatch.setattr(mlp, "gains", lambda device: True)
    return seen


def ran(patcher, calls) -> bool:
    """Whether every MLP ran through the op; a run of both or of neither."""
    calls.clear()
    run(patcher)
    expected = len([m for m in patcher.model.diffusion_model.modules() if mlp.is_fused(m)])
    assert len(calls) in (0, expected) and expected
    return bool(calls)


@pytest.mark.parametrize("name", MLPS)
def test_an_mlp_is_still_a_sequential_of_its_children(model, name):
    module = model.model.diffusion_model.get_submodule(name)
    assert mlp.is_fused(module) and isinstance(module, torch.nn.Sequential)
    assert [key for key, _ in module.named_children()] == ["0", "1", "2"]


def test_a_model_s_output_is_as_close_to_the_16_bit_one(model, dense_model, calls):
    plain = run(loaded(dense_model))
    assert ran(loaded(model), calls)
    whole = run(model)
    calls.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "gains", lambda device: False)
        layer_by_layer = run(model)
    assert not calls
    assert decibels(plain, whole) > decibels(plain, layer_by_layer) - 0.5
    # a code at a tie may go the other way, and is then as far off as 4 bits are
    assert decibels(layer_by_layer, whole) > decibels(plain, layer_by_layer) + 6


def test_on_a_cpu_it_runs_layer_by_layer(model, monkeypatch):
    monkeypatch.setattr(kernels, "mlp_w4a4", None)
    run(loaded(model))


def test_sampling_gives_nearly_the_same_picture(model, calls):
    fused = sampled(model)
    assert calls
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlp, "gains", lambda device: False)
        assert decibels(sampled(model), fused) > 20


def test_weights_elsewhere_run_layer_by_layer(model, monkeypatch, calls):
    comfy.model_management.unload_all_models()
    monkeypatch.setattr(comfy.model_management, "get_free_memory", little_for_weights)
    linear = loaded(model).model.diffusion_model.get_submodule(MLPS[0])[2]
    assert ran(model, calls)
    linear.weight = torch.nn.Parameter(linear.weight.to("meta"), requires_grad=False)
    x = torch.randn(2, linear.in_features // 4)
    assert not mlp._runs_fused(*model.model.diffusion_model.get_submodule(MLPS[0]), x)


@pytest.mark.parametrize("child", [0, 1, 2])
def test_a_hook_on_a_child_is_called(model, calls, child):
    module = loaded(model).model.diffusion_model.get_submodule(MLPS[0])
    seen = []
    handle = module[child].register_forward_hook(lambda *given: seen.append(1))
    run(model)
    assert seen == [1]
    handle.remove()
    assert ran(model, calls)


def test_a_forward_put_in_the_place_of_a_child_s_is_called(model, calls):
    """As ComfyUI's bypass LoRAs do it."""
    module = loaded(model).model.diffusion_model.get_submodule(MLPS[0])
    seen, own = [], module[2].forward
    module[2].forward = lambda x: seen.append(1) or own(x)
    run(model)
    assert seen == [1]


@pytest.mark.parametrize("attribute", ["weight_function", "bias_function"])
def test_functions_of_other_nodes_see_the_weight(model, calls, attribute):
    module = loaded(model).model.diffusion_model.get_submodule(MLPS[0])
    x = torch.randn(1, 3, module[0].in_features)
    with torch.no_grad():
        before = module(x)
        assert len(calls) == 1
        setattr(module[2], attribute, [lambda tensor: tensor * 2])
        assert not torch.equal(module(x), before) and len(calls) == 1


def test_a_lora_within_the_branch_stays_in_the_op(model, calls):
    module = loaded(model).model.diffusion_model.get_submodule(MLPS[0])
    x = torch.randn(1, 3, module[0].in_features)
    n, k = module[2].weight.shape
    key = f"diffusion_model.{MLPS[0]}.2.weight"
    from comfy.weight_adapter import LoRAAdapter

    up, down = torch.randn(n, 4), torch.randn(4, k) / k**0.5
    adapter = LoRAAdapter(set(), (up, down, 4.0, None, None, None))
    clone = model.clone()
    clone.add_patches({key: adapter})
    with torch.no_grad():
        before = module(x)
        loaded(clone)
        hidden = torch.nn.functional.gelu(module[0](x), approximate="tanh")
        after = module(x)
        assert len(calls) == 2
        change = (after - before) - (hidden @ down.T @ up.T)
    assert change.norm() < 0.02 * (after - before).norm()
    loaded(model)


def test_gradients_go_layer_by_layer(model, calls):
    module = loaded(model).model.diffusion_model.get_submodule(MLPS[0])
    x = torch.randn(1, 3, module[0].in_features, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.norm() > 0 and not calls


def test_it_compiles_without_a_graph_break(model, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(mlp, "gains", lambda device: True)
    module = loaded(model).model.diffusion_model.get_submodule(MLPS[0])
    x = torch.randn(1, 4, module[0].in_features)
    with torch.no_grad():
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), module(x))


def test_state_dicts_and_reloading_are_as_before(quantized_file):
    plain, fused = loading.load(quantized_file), loading.load(quantized_file)
    assert list(plain.model.state_dict()) == list(fused.model.state_dict())
    clone = fused.clone(force_deepcopy=True)
    assert mlp.is_fused(clone.model.diffusion_model.get_submodule(MLPS[0]))


def test_other_sequentials_are_left_alone(model):
    linear = model.model.diffusion_model.get_submodule(MLPS[0])[0]
    gelu = torch.nn.GELU(approximate="tanh")
    others = [
        torch.nn.Sequential(linear, torch.nn.GELU(), linear),
        torch.nn.Sequential(linear, gelu, torch.nn.Linear(4, 4)),
        torch.nn.Sequential(linear, gelu),
    ]
    assert mlp.fuse(torch.nn.ModuleList(others)) == 0
    assert mlp.fuse(torch.nn.ModuleList([WanFeedForward(linear, gelu, linear)])) == 1


def test_the_trained_demo_draws_as_well(tmp_path, monkeypatch, calls):
    """As near to the 16-bit picture as layer by layer, and nearer to that one's."""
    from nibble.quant.svdquant.quantize import quantize_checkpoint
    from nibble.quant.svdquant.recipe import Recipe

    source = ROOT / "demo" / "weights" / "diffusion_models" / "flux-demo.safetensors"
    recipe = Recipe.from_preset("fast", rank=16, rotation="off", solver="svd")
    quantize_checkpoint(source, tmp_path / "demo.safetensors", recipe)
    patcher = loading.load(tmp_path / "demo.safetensors")
    fused = sampled(patcher)
    assert calls
    monkeypatch.setattr(mlp, "gains", lambda device: False)
    plain = sampled(patcher)
    exact = sampled(comfy.sd.load_diffusion_model(str(source)))
    errors = [(exact - picture).norm() for picture in (fused, plain)]
    assert errors[0] < 1.1 * errors[1]
    assert (fused - plain).norm() < 0.5 * errors[1]
