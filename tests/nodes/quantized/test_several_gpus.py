"""A 4-bit model and several GPUs, with CPUs in their place: ComfyUI's own MultiGPU CFG Split draws
with it; torch's FSDP and tensor parallelism, which would take its weights apart, are refused.
"""

import comfy.model_management
import comfy.multigpu
import comfy.samplers
import comfy.sd
import pytest
import torch

from flux_loras import lora_file
from flux_runs import decibels
from nibble.nodes.bridge.quantized import layouts, loading

SECOND = torch.device("cpu", 1)
QKV = "double_blocks.0.img_attn.qkv"


# ---- ComfyUI's own nodes: a whole model on each GPU


@pytest.fixture
def two_devices(monkeypatch):
    first = comfy.model_management.get_torch_device()
    monkeypatch.setattr(
        comfy.model_management,
        "get_all_torch_devices",
        lambda exclude_current=False: [first, SECOND],
    )


def split(patcher):
    """MultiGPU CFG Split over two devices."""
    return comfy.multigpu.create_multigpu_deepclones(patcher, 2)


def guided(patcher) -> torch.Tensor:
    """Two steps with CFG: a prompt and its negative, which two devices share."""
    draw = torch.Generator().manual_seed(0)

    def prompt():
        pooled = torch.randn(1, 64, generator=draw)
        return [[torch.randn(1, 6, 64, generator=draw), {"pooled_output": pooled}]]

    guider = comfy.samplers.CFGGuider(patcher)
    guider.inner_set_conds({"positive": prompt(), "negative": prompt()})
    guider.set_cfg(3.0)
    noise = torch.randn(1, 16, 8, 8, generator=draw)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.6, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)


def calls_of(patcher) -> list[int]:
    """Grows by the batch of each call of a model's first 4-bit layer."""
    seen = []
    layer = patcher.model.diffusion_model.get_submodule(QKV)
    layer.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    return seen


@pytest.mark.parametrize("styled", [False, True], ids=["plain", "with a LoRA"])
def test_the_prompt_and_its_negative_are_drawn_on_a_device_each(model, two_devices, styled):
    if styled:
        model, _ = comfy.sd.load_lora_for_models(model, None, lora_file(model), 1.0, 1.0)
    alone, both = guided(model), split(model)
    (other,) = both.get_additional_models_with_key("multigpu")
    assert other.load_device == SECOND
    assert layouts.is_ours(other.model.diffusion_model.get_submodule(QKV).weight)
    here, there = calls_of(both), calls_of(other)
    drawn = guided(both)
    assert here == there == [1, 1]  # both prompts in one batch where there is one device
    assert decibels(alone, drawn) > 60


# ---- weights taken apart


@pytest.fixture
def mesh():
    """A group of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_fsdp_is_refused(model, mesh):
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ValueError, match="cannot be divided over several GPUs"):
        fully_shard(model.model.diffusion_model.get_submodule(QKV), mesh=mesh)
    with pytest.raises(ValueError, match="Quantize for Stock ComfyUI"):
        fully_shard(model.model.diffusion_model, mesh=mesh)


def test_every_format_refuses(request, mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    files = ("rotated_file", "table_file", "float_file", "codeword_file")
    for file in map(request.getfixturevalue, files):
        layer = loading.load(file).model.diffusion_model.get_submodule(QKV)
        with pytest.raises(ValueError, match="cannot be divided over several GPUs"):
            distribute_tensor(layer.weight, mesh, [Shard(0)])


def test_a_weight_that_was_made_a_distributed_one_is_refused_when_it_is_used(model, mesh):
    """Without being cut: torch has made a 16-bit matrix of it."""
    from torch.distributed.tensor import DTensor, Replicate

    layer = model.model.diffusion_model.get_submodule(QKV)
    whole = DTensor.from_local(layer.weight, mesh, [Replicate()])
    layer.weight = torch.nn.Parameter(whole, requires_grad=False)
    with pytest.raises(ValueError, match="cannot be divided over several GPUs"):
        layer(torch.randn(2, layer.in_features))
