"""A low-bit model in memory: read as its file is."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.quant.files.errors import FileRefused
from nibble.quant.interop.in_memory import StateDictModel
from nibble.quant.interop.opening import open_4bit
from nibble.quant.weights.base import json_tensor
from published_files import METADATA, RandomFlux, random_linear

BEHIND_GELU = "transformer_blocks.0.img_mlp.net.2"


def test_it_gives_what_the_file_gives(tmp_path):
    save_file(RandomFlux().nibble(), tmp_path / "own.safetensors", METADATA)
    file = open_4bit(tmp_path / "own.safetensors")
    model = StateDictModel(load_file(tmp_path / "own.safetensors"))
    assert model.layers == file.layers
    ours, theirs = dict(model.tensors()), dict(file.tensors())
    assert ours.keys() == theirs.keys()
    for name in ours.keys() - {f"{layer}.comfy_quant" for layer in model.layers}:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("said, unsigned", [({}, True), ({"rank": 16}, False)])
def test_what_a_layer_does_not_say_is_off_in_nibble_s_and_guessed_in_others(said, unsigned):
    parts = random_linear(128, 128, 1)
    tensors = {
        f"{BEHIND_GELU}.{name}": tensor
        for name, tensor in parts.items()
        if isinstance(tensor, torch.Tensor)
    }
    tensors[f"{BEHIND_GELU}.comfy_quant"] = json_tensor({"format": "svdquant_w4a4"} | said)
    assert StateDictModel(tensors).layers[BEHIND_GELU].get("act_unsigned", False) is unsigned


def test_a_refusal_names_the_layer():
    tensors = {"one.comfy_quant": json_tensor({"format": "vq"}), "one.weight": torch.zeros(2, 2)}
    with pytest.raises(FileRefused, match="The model lacks one.weight_codebook"):
        StateDictModel(tensors)
