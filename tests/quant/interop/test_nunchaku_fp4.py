"""Nunchaku's NVFP4 files: read exactly, with the official arithmetic."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.quant.files.errors import FileRefused
from nibble.quant.files.safetensors import read_header
from nibble.quant.interop import swizzle
from nibble.quant.interop.convert import convert
from nibble.quant.interop.opening import open_4bit
from nibble.quant.weights.formats import weight_of
from published_fp4 import RandomFp4Flux, official, pack_micro


@pytest.fixture(scope="module")
def flux():
    return RandomFp4Flux()


@pytest.fixture
def path(flux, tmp_path):
    target = tmp_path / "svdq-fp4_r16-flux.1-dev.safetensors"
    save_file(flux.state(), target)
    return target


def inputs(k: int) -> torch.Tensor:
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(3)) * 2
    x[:, ::37] *= 9
    x[4, 16:48] = 0  # groups of nothing
    return x


def close(found: torch.Tensor, wanted: np.ndarray) -> bool:
    difference = found.double().numpy() - wanted
    return np.linalg.norm(difference) < 2e-6 * np.linalg.norm(wanted)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.qkv_proj"),
        ("double_blocks.0.txt_mlp.2", "transformer_blocks.0.mlp_context_fc2"),
    ],
)
def test_a_linear_computes_what_nunchaku_does(flux, path, ours, theirs):
    part = flux.parts[theirs]
    x = inputs(part["weight"].shape[1] * 2)
    weight = weight_of(open_4bit(path), ours)
    assert close(weight.forward(x), official(part, x))


def test_linears_joined_along_their_outputs(flux, path):
    block = "single_transformer_blocks.1"
    x = inputs(flux.hidden)
    wanted = [official(flux.parts[f"{block}.{name}"], x) for name in ("qkv_proj", "mlp_fc1")]
    weight = weight_of(open_4bit(path), "single_blocks.1.linear1")
    assert close(weight.forward(x), np.concatenate(wanted, 1))


def test_linears_joined_along_their_inputs_keep_a_scale_each(flux, path):
    block, h = "single_transformer_blocks.0", flux.hidden
    x = inputs(5 * h)
    attn, mlp = flux.parts[f"{block}.out_proj"], flux.parts[f"{block}.mlp_fc2"]
    file = open_4bit(path)
    assert file.layers["single_blocks.0.linear2"]["scale_columns"] == [h, 4 * h]
    weight = weight_of(file, "single_blocks.0.linear2")
    assert close(weight.forward(x), official(attn, x[:, :h]) + official(mlp, x[:, h:]))
    dense = weight.dequantize()
    assert torch.allclose(dense[:, :h], weight_like(attn), rtol=1e-4, atol=1e-5)


def weight_like(part) -> torch.Tensor:
    """The effective matrix of a linear, from what its products with unit inputs would be without
    rounding.
    """
    from nunchaku_packers import codes_of
    from published_fp4 import LEVELS

    codes = codes_of(part["weight"]).astype(int)
    values = np.where(codes & 8, -1, 1) * LEVELS[codes & 7]
    micro = part["micro"].float().repeat_interleave(16, 1)
    plain = torch.from_numpy(values).float() * micro * part["wtscale"]
    branch = part["weight_proj_up"].float() @ part["weight_proj_down"].float().T
    return plain / part["weight_smooth_factor"].float() + branch


def test_sizes_are_known_before_reading_and_the_file_becomes_nibble_s_own(path, tmp_path):
    file = open_4bit(path)
    assert file.kind == "Nunchaku NVFP4"
    for name in file.layers:
        specs = {spec.name: (spec.dtype, tuple(spec.shape)) for spec in file.specs(name)}
        assert specs == {
            key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in file.unit(name).items()
        }
    target = tmp_path / "own.safetensors"
    convert(path, target, "nibble")
    own = open_4bit(target)
    assert own.layers == file.layers
    for key, tensor in file.unit("single_blocks.0.linear2").items():
        assert torch.equal(
            own.unit("single_blocks.0.linear2")[key].view(torch.uint8), tensor.view(torch.uint8)
        )


def test_micro_scales_move_both_ways():
    scale = (torch.rand(256, 12, generator=torch.Generator().manual_seed(0)) * 100).to(
        torch.float8_e4m3fn
    )
    stored = pack_micro(scale)
    assert torch.equal(
        swizzle.micro_from_nunchaku(stored).view(torch.uint8), scale.view(torch.uint8)
    )
    assert torch.equal(swizzle.micro_to_nunchaku(scale).view(torch.uint8), stored.view(torch.uint8))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"wscales": torch.ones(3, 384).to(torch.float8_e4m3fn)}, "wscales has the shape"),
        ({"wscales": torch.ones(8, 384)}, "stores .*wscales as float32"),
        ({"wcscales": torch.ones(5)}, "wcscales has the shape"),
        ({"smooth": None}, "lacks .*smooth_factor"),
    ],
)
def test_damaged_files_are_refused_in_words(flux, tmp_path, change, words):
    state = flux.state()
    for suffix, tensor in change.items():
        key = f"transformer_blocks.0.qkv_proj.{suffix}"
        state.pop(key)
        if tensor is not None:
            state[key] = tensor
    target = tmp_path / "broken-fp4.safetensors"
    save_file(state, target)
    with pytest.raises(FileRefused, match=words):
        open_4bit(target)


def test_and_back_to_the_very_same_tensors(flux, path, tmp_path):
    own, back = tmp_path / "own.safetensors", tmp_path / "back.safetensors"
    convert(path, own, "nibble")
    convert(own, back, "nunchaku")
    state, again = flux.state(), load_file(back)
    for key, tensor in state.items():
        if key.endswith(("wzeros", "wtscale")):
            assert torch.equal(again[key].float(), tensor.float()), key
        else:
            assert torch.equal(again[key].view(torch.uint8), tensor.view(torch.uint8)), key
    said = read_header(back).metadata["quantization_config"]
    assert "fp4_e2m1_all" in said
    assert open_4bit(back).kind == "Nunchaku NVFP4"


def test_kitchen_cannot_say_it(path, tmp_path):
    with pytest.raises(FileRefused):
        convert(path, tmp_path / "t.safetensors", "kitchen")
