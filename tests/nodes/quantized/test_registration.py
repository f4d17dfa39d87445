"""Low-bit files in ComfyUI's own loaders: the model is the one that Nibble's node loads, bit for
bit, and behaves like it.
"""

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import nodes
import pytest
import torch
from safetensors.torch import load_file, save_file

from flux_loras import lora_file, with_lora
from flux_runs import loaded, run, sampled
from nibble.nodes.bridge.quantized import layouts, loading, registration
from nibble.quant.files.errors import FileRefused

FILES = ("quantized_file", "rotated_file", "table_file", "float_file", "codeword_file")


@pytest.fixture(autouse=True)
def registered():
    """ComfyUI with the pack."""
    table = list(comfy.supported_models.models)
    registration.register()
    yield
    comfy.supported_models.models[:] = table


@pytest.fixture(params=FILES)
def path(request):
    """A file of each format."""
    return request.getfixturevalue(request.param)


def stock(path, **options):
    """What *Load Diffusion Model* does."""
    return comfy.sd.load_diffusion_model(str(path), model_options=options)


def stored(patcher) -> dict[str, torch.Tensor]:
    """What ComfyUI saves of a model."""
    state = loaded(patcher).model_state_dict("diffusion_model.")
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def test_the_model_is_the_same(path):
    ours, theirs = loading.load(path), stock(path)
    assert type(theirs.model) is type(ours.model)
    assert theirs.model.get_dtype() == ours.model.get_dtype()
    assert theirs.model.manual_cast_dtype == ours.model.manual_cast_dtype
    assert theirs.model.model_config.unet_config == ours.model.model_config.unet_config
    assert theirs.model_size() == ours.model_size()
    assert_same(stored(ours), stored(theirs))
    assert torch.equal(run(loaded(ours)), run(loaded(theirs)))
    assert torch.equal(sampled(ours), sampled(theirs))


def test_a_lora_does_the_same_whole_and_partly_loaded(path):
    pictures, saved = [], []
    for model in (loading.load(path), stock(path)):
        patched = with_lora(model, lora_file(model))
        pictures.append(sampled(patched))
        saved.append(stored(patched))
        patched.detach()
        patched.patch_model(patched.load_device, lowvram_model_memory=1)
        pictures.append(run(patched))
        patched.detach()
    assert torch.equal(pictures[0], pictures[2])
    assert torch.equal(pictures[1], pictures[3])
    assert_same(*saved)


def test_what_model_save_writes_opens_again(path, tmp_path):
    patched = with_lora(stock(path), lora_file(stock(path)))
    picture = sampled(patched)
    comfy.sd.save_checkpoint(str(tmp_path / "saved.safetensors"), patched)
    patched.detach()
    for again in (stock(tmp_path / "saved.safetensors"), loading.load(tmp_path / "saved.safetensors")):
        assert torch.equal(sampled(again), picture)
