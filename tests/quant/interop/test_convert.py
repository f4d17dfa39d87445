"""Converting there and back: integers, scales, smoothing and low-rank factors are the same bits;
what is refused, and how it is written.
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from compare import assert_same
from nibble.quant.architectures import flux1_shapes
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.interop import convert as converting
from nibble.quant.interop.convert import convert, facts_of
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights.base import tensor_json
from published_files import METADATA, awq, random_linear, random_w4a16, svdquant

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


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A FLUX as the pipeline quantizes it, with what Nunchaku keeps in 16 bit kept; biases of
    modulations are exact with 1 added.
    """
    folder = tmp_path_factory.mktemp("own")
    generator = torch.Generator().manual_seed(0)
    state = {
        name: (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        for name, shape in flux1_shapes(1, 1, 128, 64, 64).items()
    }
    state |= {
        name: (t * 128).round() / 128
        for name, t in state.items()
        if name.endswith(("mod.lin.bias", "modulation.lin.bias"))
    }
    save_file(state, folder / "m.safetensors")
    keep = ("final_layer.*", "guidance_in.*", "vector_in.*")
    quantize_checkpoint(
        folder / "m.safetensors",
        folder / "q.safetensors",
        Recipe.from_preset("fast", rank=16, rotation="off", solver="svd", keep=keep),
    )
    return folder / "q.safetensors"


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


def qwen(tmp_path, **parts):
    h, block = 128, "transformer_blocks.0"
    tensors = svdquant(f"{block}.attn.to_qkv", random_linear(3 * h, h, 1), True) | svdquant(
        f"{block}.attn.add_qkv_proj", random_linear(3 * h, h, 2), True
    )
    for i, name in enumerate(("attn.to_out.0", "attn.to_add_out")):
        tensors |= svdquant(f"{block}.{name}", random_linear(h, h, 3 + i), True)
    for i, stream in enumerate(("img", "txt")):
        tensors |= svdquant(
            f"{block}.{stream}_mlp.net.0.proj", random_linear(4 * h, h, 5 + i), True
        )
        tensors |= svdquant(f"{block}.{stream}_mlp.net.2", random_linear(h, 4 * h, 7 + i), True)
        tensors |= awq(f"{block}.{stream}_mod.1", random_w4a16(6 * h, h, 9 + i), 6)
    tensors |= {
        "txt_norm.weight": torch.ones(h),
        "img_in.weight": torch.ones(h, 64),
        f"{block}.attn.norm_q.weight": torch.ones(128),
    }
    save_file(tensors | parts, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


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


# ---- refusals and writing


def refused(words, *arguments):
    with pytest.raises(FileRefused, match=words) as refusal:
        convert(*arguments)
    assert str(refusal.value).endswith(".")
    assert ".safetensors" in str(refusal.value)


def test_what_a_format_cannot_say_is_refused(files, quantized, tmp_path):
    target = tmp_path / "t.safetensors"
    refused(
        "inputs of two kinds side by side in single_blocks.0.linear2",
        files["nibble"],
        target,
        "kitchen",
    )
    refused("in this format already", files["first"], target, "nunchaku")
    refused("would be read|would be", quantized, quantized, "kitchen")
    # most layers are kept only to be quick; what is refused is looked for in this order
    for options, words in (
        ({"rotation": "on", "keep": ("double_blocks.*",)}, "has a rotation"),
        (
            {"keep": ("double_blocks.*", "*.linear1")},
            "has 16-bit weights in double_blocks.0.img_attn.proj",
        ),
        (
            {"w4a16": ("*.linear1",), "keep": ("double_blocks.*", "*.linear2")},
            "has the format awq_w4a16 in single_blocks.0.linear1",
        ),
    ):
        recipe = Recipe.from_preset("fast", rank=16, solver="svd", **{"rotation": "off"} | options)
        quantize_checkpoint(
            quantized.with_name("m.safetensors"), tmp_path / "q.safetensors", recipe
        )
        refused(words, tmp_path / "q.safetensors", target, "nunchaku")
    assert not target.exists()
    assert not list(tmp_path.glob("*.partial*"))


def test_other_models_have_no_nunchaku_form(quantized, tmp_path):
    tensors = {"head.modulation": torch.ones(1, 2, 128)} | {
        f"blocks.0.self_attn.q.{key.rpartition('.')[2]}": tensor
        for key, tensor in open_quantized(quantized).layer("double_blocks.0.img_attn.proj").items()
    }
    save_file(tensors, tmp_path / "wan.safetensors", METADATA)
    refused(
        "is a Wan 2.x, which Nunchaku's format is not written for",
        tmp_path / "wan.safetensors",
        tmp_path / "t.safetensors",
        "nunchaku",
    )


def test_layers_that_nunchaku_keeps_are_written_in_16_bit(quantized, tmp_path):
    quantize_checkpoint(
        quantized.with_name("m.safetensors"),
        tmp_path / "q.safetensors",
        Recipe.from_preset("fast", rank=16, rotation="off", solver="svd"),
    )
    lines = convert(tmp_path / "q.safetensors", tmp_path / "n.safetensors", "nunchaku")
    assert any(
        "final_layer.adaLN_modulation.1: 4-bit weights that Nunchaku keeps" in value
        for _, value in lines
    )
    back = load_file(tmp_path / "n.safetensors")["norm_out.linear.weight"]
    from nibble.quant.weights.formats import FORMATS

    name = "final_layer.adaLN_modulation.1"
    dense = (
        FORMATS["awq_w4a16"]
        .from_tensors(open_quantized(tmp_path / "q.safetensors").layer(name), name)
        .dequantize()
    )
    assert_same(back, torch.cat(dense.bfloat16().chunk(2)[::-1]))


def test_an_interrupted_conversion_goes_on_and_ends_in_the_same_file(files, tmp_path, monkeypatch):
    convert(files["first"], tmp_path / "whole.safetensors", "nibble")
    made = []

    def stop(export, unit, writer, real=converting._made):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(unit)
        return real(export, unit, writer)

    with monkeypatch.context() as patched:
        patched.setattr(converting, "_made", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(files["first"], tmp_path / "own.safetensors", "nibble")
    assert not (tmp_path / "own.safetensors").exists()
    again = []
    monkeypatch.setattr(
        converting, "_made", lambda export, unit, writer: again.append(unit) or export.make(unit)
    )
    convert(files["first"], tmp_path / "own.safetensors", "nibble")
    assert not set(made) & set(again)
    assert (tmp_path / "own.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()


def test_a_damaged_source_is_found_before_anything_is_written(quantized, tmp_path):
    data = bytearray(quantized.read_bytes())
    data[-5] ^= 1
    (tmp_path / "bad.safetensors").write_bytes(bytes(data))
    refused(
        "does not match its checksum",
        tmp_path / "bad.safetensors",
        tmp_path / "t.safetensors",
        "kitchen",
    )


def test_inspect_names_published_files(files, quantized):
    facts = facts_of(files["first"])
    assert (
        facts["format"],
        facts["architecture"],
        facts["W4A4 layers"],
        facts["4-bit weights only"],
        facts["ranks"],
    ) == ("Nunchaku INT4", "FLUX.1", 12, 4, [16, 32])
    assert facts_of(quantized) is None


def test_a_model_with_other_ranks_gets_one(tmp_path):
    path = qwen(
        tmp_path,
        **svdquant("transformer_blocks.0.attn.to_out.0", random_linear(128, 128, 3, rank=48), True),
    )
    convert(path, tmp_path / "own.safetensors", "nibble")
    lines = convert(tmp_path / "own.safetensors", tmp_path / "n.safetensors", "nunchaku")
    assert ("note", "low-rank branches of 16 were filled up with zeros to 48") in lines
    convert(tmp_path / "n.safetensors", tmp_path / "again.safetensors", "nibble")
    name = "transformer_blocks.0.attn.to_k"
    a, b = (
        open_quantized(tmp_path / f"{file}.safetensors").layer(name) for file in ("own", "again")
    )
    assert_same(b[f"{name}.weight_proj_up"][:, :16].contiguous(), a[f"{name}.weight_proj_up"])
    assert not b[f"{name}.weight_proj_up"][:, 16:].any()
