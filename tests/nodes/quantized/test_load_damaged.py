"""What no checksum covers is refused while a model is loaded, in words that name the tensor: older
files, and those that another writer made whole.
"""

import json

import pytest
from safetensors.torch import load_file, save_file

from nibble.nodes.bridge.quantized import loading
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.safetensors import checksum, read_header


def rewritten(path, target, without="", **changes):
    """A file without checksums of its header, as older ones are, with other tensors and the
    checksums that they have.
    """
    state, metadata = load_file(path), dict(read_header(path).metadata)
    for name, change in changes.items():
        state[name] = change(state[name]).contiguous()
    state = {name: tensor for name, tensor in state.items() if not (without and without in name)}
    metadata.pop("header_checksum")
    metadata["checksums"] = json.dumps({name: checksum(state[name]) for name in state})
    save_file(state, target, metadata)
    return target


def poisoned(tensor):
    tensor.view(-1)[5] = float("nan")
    return tensor


@pytest.mark.parametrize("part", ["weight_scale", "weight_smooth_factor", "weight_proj_up", "bias"])
def test_scales_that_are_not_finite_are_refused_by_name(quantized_file, tmp_path, part):
    name = f"double_blocks.0.img_mlp.0.{part}"
    path = rewritten(quantized_file, tmp_path / "black.safetensors", **{name: poisoned})
    with pytest.raises(FileRefused, match=f"black.safetensors holds NaN or infinity in {name};"):
        loading.load(path)


@pytest.mark.parametrize(
    "name, change",
    [
        ("final_layer.linear.weight", lambda tensor: tensor[:-1]),
        ("final_layer.linear.bias", lambda tensor: tensor[:-1]),
        ("txt_in.bias", lambda tensor: tensor[:-1]),
        ("double_blocks.0.img_attn.norm.query_norm.scale", lambda tensor: tensor[:-1]),
    ],
)
def test_plain_tensors_of_another_shape_are_refused_by_name(quantized_file, tmp_path, name, change):
    path = rewritten(quantized_file, tmp_path / "cut.safetensors", **{name: change})
    layer = name.rpartition(".")[0]  # ComfyUI renames some of the tensors
    with pytest.raises(FileRefused, match=f"cut.safetensors does not fit the model .*: {layer}"):
        loading.load(path)


def test_a_file_without_one_layer_is_refused(quantized_file, tmp_path):
    path = rewritten(quantized_file, tmp_path / "torso.safetensors", without="final_layer.linear.")
    with pytest.raises(FileRefused, match="torso.safetensors"):
        loading.load(path, verify=False)
