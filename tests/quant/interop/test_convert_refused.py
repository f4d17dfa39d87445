"""What a format cannot say is refused; conversions go on after a stop, and damaged sources are
found first.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from compare import assert_same
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.interop.convert import convert, facts_of
from nibble.quant.interop.export import ToNibble
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe
from published_files import METADATA, random_linear, svdquant
from qwen_file import qwen


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
    made, real = [], ToNibble.make

    def stop(export, unit):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(unit)
        return real(export, unit)

    with monkeypatch.context() as patched:
        patched.setattr(ToNibble, "make", stop)
        with pytest.raises(KeyboardInterrupt):
            convert(files["first"], tmp_path / "own.safetensors", "nibble")
    assert not (tmp_path / "own.safetensors").exists()
    again = []
    monkeypatch.setattr(
        ToNibble, "make", lambda export, unit: again.append(unit) or real(export, unit)
    )
    convert(files["first"], tmp_path / "own.safetensors", "nibble")
    assert not set(made) & set(again)
    assert (tmp_path / "own.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "error", [KeyError("a"), RuntimeError("shapes differ"), OverflowError(), RecursionError()]
)
def test_a_conversion_that_fails_for_good_leaves_nothing(files, tmp_path, monkeypatch, error):
    made, real = [], ToNibble.make

    def fail(export, unit):
        if len(made) == 5:
            raise error
        made.append(unit)
        return real(export, unit)

    monkeypatch.setattr(ToNibble, "make", fail)
    with pytest.raises(type(error)):
        convert(files["first"], tmp_path / "own.safetensors", "nibble")
    assert not list(tmp_path.glob("own*"))


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
