"""Converting there and back: integers, scales, smoothing and low-rank factors are the same bits."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compare import assert_same
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.interop.convert import convert
from nibble.quant.weights.base import tensor_json
from published_files import random_linear, svdquant
from qwen_file import qwen

NUMBERS = (
    "weight",
    "weight_scale",
    "weight_proj_down",
    "weight_proj_up",
    "weight_smooth_factor",
    "weight_zeros",
)


def assert_same_files(one, other, but=()):
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for name in a.keys() - set(but):
        if name.endswith("comfy_quant"):
            assert tensor_json(a[name]) == tensor_json(b[name]), name
        else:
            assert_same(a[name], b[name])


def assert_same_numbers(one, other):
    """All tensors of quantized layers but biases and JSON."""
    a, b = load_file(one), load_file(other)
    names = [
        name
        for name in a
        if name.rpartition(".")[0] + ".comfy_quant" in a and name.endswith(NUMBERS)
    ]
    assert names and all(name in b for name in names)
    for name in names:
        assert_same(b[name], a[name])


@pytest.mark.parametrize("form", ["folder", "first", "modern"])
def test_nunchaku_to_nibble_and_back(files, flux, tmp_path, form):
    lines = dict(convert(files[form], tmp_path / "own.safetensors", "nibble"))
    assert lines["format"] == "Nunchaku INT4 → Nibble"
    assert lines["model"] == "FLUX.1"
    assert_same_numbers(files["nibble"], tmp_path / "own.safetensors")
    own = open_quantized(tmp_path / "own.safetensors")
    own.verify()
    assert own.fact("report")["architecture"] == "FLUX.1"
    assert own.fact("source")["format"] == "Nunchaku INT4"
    convert(tmp_path / "own.safetensors", tmp_path / "back.safetensors", "nunchaku")
    # FLUX.1 is written under the first names
    assert_same_files(files["first"], tmp_path / "back.safetensors")


def test_metadata_of_nunchaku_survive_the_way_there_and_back(files, tmp_path):
    convert(files["first"], tmp_path / "own.safetensors", "nibble")
    convert(tmp_path / "own.safetensors", tmp_path / "back.safetensors", "nunchaku")
    with safe_open(tmp_path / "back.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["quantization_config"] == '{"rank": 16}'
    assert metadata["model_class"] == "NunchakuFlux"
    assert json.loads(metadata["config"])["num_single_layers"] == 2
    assert json.loads(metadata["comfy_config"])["model_class"] == "Flux"


def test_nibble_to_nunchaku_and_back(quantized, tmp_path):
    lines = convert(quantized, tmp_path / "n.safetensors", "nunchaku")
    assert any("unsigned inputs" in value for label, value in lines if label == "note")
    convert(tmp_path / "n.safetensors", tmp_path / "own.safetensors", "nibble")
    before, after = open_quantized(quantized), open_quantized(tmp_path / "own.safetensors")
    assert after.layers["single_blocks.0.linear2"] == before.layers["single_blocks.0.linear2"] | {
        "unsigned_from": 128
    }
    a, b = load_file(quantized), load_file(tmp_path / "own.safetensors")
    for name, tensor in a.items():
        if (
            name.endswith("comfy_quant")
            or name in ("single_blocks.0.linear2.bias",)
            or name.endswith("mlp.2.bias")
        ):
            continue
        assert torch.equal(b[name].float(), tensor.float()), name


def test_only_the_sign_of_inputs_behind_a_gelu_changes_on_the_way(quantized, tmp_path):
    from nibble.quant.weights.formats import FORMATS

    convert(quantized, tmp_path / "n.safetensors", "nunchaku")
    convert(tmp_path / "n.safetensors", tmp_path / "own.safetensors", "nibble")
    name = "single_blocks.0.linear2"
    before, after = (
        FORMATS["svdquant_w4a4"].from_tensors(open_quantized(path).layer(name), name)
        for path in (quantized, tmp_path / "own.safetensors")
    )
    assert_same(before.dequantize(), after.dequantize())
    assert torch.allclose(before.effective_bias(), after.effective_bias(), atol=2e-3)


def test_nibble_to_kitchen_and_back(quantized, tmp_path):
    convert(quantized, tmp_path / "k.safetensors", "kitchen")
    tensors = load_file(tmp_path / "k.safetensors")
    assert tensor_json(tensors["double_blocks.0.img_mlp.0.comfy_quant"]) == {
        "format": "svdquant_w4a4",
        "group_size": 64,
        "act_unsigned": False,
    }
    assert not tensors["double_blocks.0.img_mod.lin.weight_zeros"].any()
    convert(tmp_path / "k.safetensors", tmp_path / "own.safetensors", "nibble")
    assert_same_files(quantized, tmp_path / "own.safetensors")
    convert(tmp_path / "own.safetensors", tmp_path / "k2.safetensors", "kitchen")
    assert_same_files(tmp_path / "k.safetensors", tmp_path / "k2.safetensors")


def test_kitchen_to_nunchaku_and_back(quantized, tmp_path):
    convert(quantized, tmp_path / "k.safetensors", "kitchen")
    convert(tmp_path / "k.safetensors", tmp_path / "n1.safetensors", "nunchaku")
    convert(quantized, tmp_path / "n2.safetensors", "nunchaku")
    assert_same_files(tmp_path / "n1.safetensors", tmp_path / "n2.safetensors")


def test_kitchen_s_own_layout_reads_what_is_written_for_it(quantized, tmp_path):
    kitchen = pytest.importorskip(
        "comfy_kitchen.tensor",
        reason="comfy_kitchen is not installed: its own loader cannot be asked",
    )
    convert(quantized, tmp_path / "k.safetensors", "kitchen")
    t, name = load_file(tmp_path / "k.safetensors"), "double_blocks.0.img_attn.proj"
    n, half = t[f"{name}.weight"].shape
    layout = kitchen.TensorCoreSVDQuantW4A4Layout
    params = layout.Params(
        scale=t[f"{name}.weight_scale"],
        orig_dtype=torch.bfloat16,
        orig_shape=(n, 2 * half),
        act_unsigned=False,
        **{key: t[f"{name}.weight_{key}"] for key in ("proj_down", "proj_up", "smooth_factor")},
    )
    weight = kitchen.QuantizedTensor(t[f"{name}.weight"], layout.__name__, params)
    from nibble.quant.weights.formats import FORMATS

    own = FORMATS["svdquant_w4a4"].from_tensors(open_quantized(quantized).layer(name), name)
    x = torch.randn(16, 2 * half).bfloat16()
    error = torch.nn.functional.linear(x, weight, own.bias).float() - own.forward(x.float())
    assert error.norm() < 0.03 * own.forward(x.float()).norm()


def z_image(tmp_path, skip_refiners):
    h, tensors = (
        128,
        {
            "cap_embedder.1.weight": torch.ones(128, 64),
            "all_x_embedder.2-1.weight": torch.ones(128, 64),
        },
    )
    for i, kind in enumerate(("layers", "noise_refiner", "context_refiner")):
        parts = {
            "attention.to_qkv": (3 * h, h),
            "attention.to_out.0": (h, h),
            "feed_forward.net.0.proj": (4 * h, h),
            "feed_forward.net.2": (h, 2 * h),
        }
        tensors |= {f"{kind}.0.attention.norm_{c}.weight": torch.rand(128) for c in "qk"}
        if i and skip_refiners:
            for c in "qkv":
                tensors[f"{kind}.0.attention.to_{c}.weight"] = torch.rand(h, h)
            tensors |= {
                f"{kind}.0.{name}.weight": torch.rand(shape)
                for name, shape in parts.items()
                if not name.endswith("qkv")
            }
        else:
            for j, (name, shape) in enumerate(parts.items()):
                part = svdquant(f"{kind}.0.{name}", random_linear(*shape, 10 * i + j), True)
                tensors |= {key: tensor for key, tensor in part.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    "make",
    [qwen, lambda path: z_image(path, False), lambda path: z_image(path, True)],
    ids=["qwen", "z-image", "z-image skipping"],
)
def test_other_families_there_and_back(tmp_path, make):
    path = make(tmp_path)
    convert(path, tmp_path / "own.safetensors", "nibble")
    open_quantized(tmp_path / "own.safetensors").verify()
    lines = convert(tmp_path / "own.safetensors", tmp_path / "back.safetensors", "nunchaku")
    assert_same_files(path, tmp_path / "back.safetensors")
    assert (
        "note",
        (
            "no config was written: add the original model's config.json to the metadata for"
            " programs that ask for it"
        ),
    ) in lines
