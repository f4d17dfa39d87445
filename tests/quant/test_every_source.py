"""A model in any form that ComfyUI loads gives the file of its decoded weights, bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.files.source import Source
from nibble.quant.svdquant.quantize import quantize_checkpoint as svdquant
from nibble.quant.svdquant.recipe import Recipe as SVDQuantRecipe
from nibble.quant.vq4dit.quantize import quantize_checkpoint as vq
from nibble.quant.vq4dit.recipe import Recipe as VQRecipe

SHAPES = flux1_shapes(1, 1, 128, 64, 64)
LAYERS = ("double_blocks.0.img_mlp.0", "double_blocks.0.txt_attn.qkv", "single_blocks.0.linear2")
METHODS = {
    "svdquant": (
        svdquant,
        SVDQuantRecipe.from_preset("fast", rank=16, smoothing_grid=1, iterations=1),
    ),
    "vq": (vq, VQRecipe.from_preset("fast")),
}


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        for name, shape in SHAPES.items()
    }


def as_json(facts):
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def scaled_fp8(weight, dtype):
    scale = weight.abs().max() / torch.finfo(dtype).max
    codes = (weight / scale).to(dtype)
    return {"weight": codes, "weight_scale": scale}, codes.float() * scale


def kitchen_codec(layout, facts, names, **options):
    """A layer of one of comfy-kitchen's layouts, by its own codec: (tensors, decoded float32)."""

    def packed(weight):
        kitchen = pytest.importorskip(
            "comfy_kitchen.tensor", reason="comfy-kitchen is not installed", exc_type=ImportError
        )
        cls = getattr(kitchen, layout)
        if options.get("bits") and not hasattr(cls, "bits"):
            pytest.skip("this comfy-kitchen knows no weights of 6 bits")
        codes, params = cls.quantize(weight.clone(), **options)
        stored = cls.state_dict_tensors(codes, params)
        tensors = {f"weight{suffix}": tensor for suffix, tensor in stored.items()}
        assert tensors.keys() == {"weight", *names}
        tensors["comfy_quant"] = as_json(facts)
        return tensors, cls.dequantize(codes, params)[: weight.shape[0], : weight.shape[1]]

    return packed


def gguf_codec(weight, kind):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    enum = getattr(gguf.GGMLQuantizationType, kind)
    return torch.from_numpy(
        gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), enum), enum)
    )


def params(**facts):
    """ComfyUI reads a layer's options from the JSON itself, or from "params" in it."""
    form = facts.pop("format")
    return {"format": form, "params": facts}


TURNED = {"convrot_groupsize": 64}
INT8 = ("weight_scale",)
ASYM = ("weight_s_rel", "weight_s_channel")
W4A8 = "asym_w4a8_int8"
FORMATS = {
    "fp8": (lambda w: scaled_fp8(w, torch.float8_e4m3fn), 8),
    "fp8 e5m2": (lambda w: scaled_fp8(w, torch.float8_e5m2), 8),
    "int8": (kitchen_codec("TensorWiseINT8Layout", {"format": "int8_tensorwise"}, INT8), 8),
    "int8_convrot": (
        kitchen_codec(
            "TensorWiseINT8Layout",
            {"format": "int8_tensorwise", "convrot": True, **TURNED},
            INT8,
            per_channel=True,
            convrot=True,
            **TURNED,
        ),
        8,
    ),
    "int8_convrot in params": (
        kitchen_codec(
            "TensorWiseINT8Layout",
            params(format="int8_tensorwise", convrot=True, **TURNED),
            INT8,
            per_channel=True,
            convrot=True,
            **TURNED,
        ),
        8,
    ),
    "asym_w4a8_int8": (
        kitchen_codec(
            "AsymW4A8Int8Layout",
            {"format": W4A8, "group_size": 16, **TURNED},
            (*ASYM, "weight_codebook"),
            **TURNED,
        ),
        4,
    ),
    "asym_w4a8_int8 in groups of 32": (
        kitchen_codec(
            "AsymW4A8Int8Layout",
            {"format": W4A8, "group_size": 32, **TURNED},
            (*ASYM, "weight_codebook"),
            group_size=32,
            **TURNED,
        ),
        4,
    ),
    "asym_w4a8_int8 without a codebook": (
        kitchen_codec(
            "AsymW4A8Int8Layout",
            {"format": W4A8, "group_size": 16, **TURNED},
            ASYM,
            codebook=False,
            **TURNED,
        ),
        4,
    ),
    "asym_w4a8_int8, not symmetric": (
        kitchen_codec(
            "AsymW4A8Int8Layout",
            {"format": W4A8, "group_size": 16, **TURNED},
            (*ASYM, "weight_correction"),
            codebook=False,
            symmetric=False,
            **TURNED,
        ),
        4,
    ),
    "asym_w4a8_int8 of 6 bits": (
        kitchen_codec(
            "AsymW4A8Int8Layout",
            {"format": W4A8, "group_size": 16, **TURNED},
            ASYM,
            bits=6,
            **TURNED,
        ),
        6,
    ),
    "convrot_w4a4": (
        kitchen_codec(
            "TensorCoreConvRotW4A4Layout", {"format": "convrot_w4a4", **TURNED}, INT8, **TURNED
        ),
        4,
    ),
    "nvfp4": (
        kitchen_codec(
            "TensorCoreNVFP4Layout", {"format": "nvfp4"}, ("weight_scale", "weight_scale_2")
        ),
        4,
    ),
    "mxfp8": (kitchen_codec("TensorCoreMXFP8Layout", {"format": "mxfp8"}, INT8), 8),
}


def quantized(method, source, target):
    quantize, recipe = METHODS[method]
    report = quantize(source, target, recipe)
    return load_file(target), report


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_of_comfyui_gives_what_its_decoded_weights_give(tmp_path, kind, method):
    codec, bits = FORMATS[kind]
    tensors, decoded = weights(), weights()
    for layer in LAYERS:
        matrix = tensors.pop(f"{layer}.weight").float()
        packed, decoded[f"{layer}.weight"] = codec(matrix)
        tensors |= {f"{layer}.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, tmp_path / "packed.safetensors")
    save_file(decoded, tmp_path / "decoded.safetensors")
    source = Source(tmp_path / "packed.safetensors")
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in decoded.items()}
    found, report = quantized(method, source, tmp_path / "a.safetensors")
    wanted, plain = quantized(method, tmp_path / "decoded.safetensors", tmp_path / "b.safetensors")
    assert_same(found, wanted)
    (note,) = [note for note in report.notes if note.startswith("started from")]
    told = float(note.removeprefix("started from weights of ").partition(" ")[0])
    assert bits <= told < bits + 3  # with its scales
    assert not any(note.startswith("started from") for note in plain.notes)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "F16"])
def test_gguf_gives_what_its_decoded_weights_give(tmp_path, kind, method):
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "flux")
    decoded = {name: tensor.float() for name, tensor in weights().items()}
    for name, tensor in list(decoded.items()):
        form = kind if name.removesuffix(".weight") in LAYERS else "F32"
        enum = getattr(gguf.GGMLQuantizationType, form)
        data = gguf.quants.quantize(tensor.numpy(), enum)
        decoded[name] = gguf_codec(tensor, form)
        writer.add_tensor(name, data, raw_dtype=enum)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(decoded, tmp_path / "decoded.safetensors")
    found, _ = quantized(method, tmp_path / "m.gguf", tmp_path / "a.safetensors")
    wanted, _ = quantized(method, tmp_path / "decoded.safetensors", tmp_path / "b.safetensors")
    assert_same(found, wanted)


def test_smoothing_that_a_layer_multiplies_its_input_with_is_in_its_matrix(tmp_path):
    """ModelOpt's pre_quant_scale: y = W (s x), so the matrix on x is W diag(s)."""
    codes = torch.randn(512, 128).to(torch.float8_e4m3fn)
    smoothing = torch.rand(128) + 0.5
    layer = LAYERS[0]
    tensors = weights() | {
        f"{layer}.weight": codes,
        f"{layer}.weight_scale": torch.tensor(2.0),
        f"{layer}.pre_quant_scale": smoothing.bfloat16(),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    expected = codes.float() * 2 * smoothing.bfloat16().float()
    assert torch.equal(Source(tmp_path / "m.safetensors").weight(layer), expected)


def test_rows_that_are_neither_of_4_nor_of_6_bits_are_refused(tmp_path):
    from nibble.quant.files.errors import FileRefused

    layer = LAYERS[0]
    facts = {"format": W4A8, "group_size": 16, **TURNED}
    tensors = weights() | {
        f"{layer}.weight": torch.zeros(512, 80, dtype=torch.int8),
        f"{layer}.weight_s_rel": torch.zeros(512, 8, dtype=torch.uint8),
        f"{layer}.weight_s_channel": torch.ones(512),
        f"{layer}.comfy_quant": as_json(facts),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(FileRefused, match="rows of 80 bytes for 128 inputs, which is neither 4"):
        Source(tmp_path / "m.safetensors")
    del tensors[f"{layer}.weight_s_channel"]
    save_file(tensors, tmp_path / "n.safetensors")
    with pytest.raises(FileRefused, match=f"n.safetensors lacks {layer}.weight_s_channel"):
        Source(tmp_path / "n.safetensors")


def test_6_bits_need_a_comfy_kitchen_that_knows_them(tmp_path, monkeypatch):
    import sys
    import types

    from nibble.quant.files.errors import FileRefused

    old = types.ModuleType("comfy_kitchen.tensor")
    old.AsymW4A8Int8Layout = type("AsymW4A8Int8Layout", (), {})
    monkeypatch.setitem(sys.modules, "comfy_kitchen", types.ModuleType("comfy_kitchen"))
    monkeypatch.setitem(sys.modules, "comfy_kitchen.tensor", old)
    layer = LAYERS[0]
    tensors = weights() | {
        f"{layer}.weight": torch.zeros(512, 96, dtype=torch.int8),
        f"{layer}.weight_s_rel": torch.zeros(512, 8, dtype=torch.uint8),
        f"{layer}.weight_s_channel": torch.ones(512),
        f"{layer}.comfy_quant": as_json({"format": W4A8, "group_size": 16, **TURNED}),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    assert Source(tmp_path / "m.safetensors").shapes[f"{layer}.weight"] == (512, 128)
    quantize, recipe = METHODS["svdquant"]
    with pytest.raises(FileRefused, match="weights of 6 bits .* update it"):
        quantize(tmp_path / "m.safetensors", tmp_path / "q.safetensors", recipe)
    assert not (tmp_path / "q.safetensors").exists()
