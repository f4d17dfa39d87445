"""Models in every form that ComfyUI accepts come out as the float32 matrices that they
stand for.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.files.source import Source, StateDictSource

SHAPES = flux1_shapes(1, 1, 128, 64, 64)
LAYER = "double_blocks.0.img_mlp.0"
PREFIXES = ["", "model.diffusion_model.", "diffusion_model.", "net.", "model."]


def weights(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        for name, shape in SHAPES.items()
    }


def saved(path, tensors, metadata=None, prefix=""):
    save_file({prefix + name: tensor for name, tensor in tensors.items()}, path, metadata)
    return Source(path)


def as_json(facts):
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_removed(tmp_path, prefix):
    tensors = weights()
    source = saved(tmp_path / "m.safetensors", tensors, prefix=prefix)
    assert source.shapes == {name: tuple(shape) for name, shape in SHAPES.items()}
    assert source.notes == []
    assert torch.equal(source.weight(LAYER), tensors[f"{LAYER}.weight"].float())
    assert source.weight(LAYER).dtype == torch.float32
    assert torch.equal(source.bias(LAYER), tensors[f"{LAYER}.bias"].float())
    assert source.read("img_in.weight").dtype == torch.bfloat16
    assert torch.equal(source.read("img_in.weight"), tensors["img_in.weight"])


def test_of_a_full_checkpoint_the_diffusion_model_alone_is_taken(tmp_path):
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in weights().items()}
    tensors |= {
        "vae.decoder.conv_in.weight": torch.zeros(4, 4),
        "text_encoders.clip_l.x.weight": torch.zeros(4),
    }
    source = saved(tmp_path / "m.safetensors", tensors)
    assert set(source.shapes) == set(SHAPES)
    assert source.notes == [
        "took the diffusion model alone; 2 other tensors (VAE, text encoders) were left out,"
        " and Load Checkpoint still reads them from the source"
    ]
    assert source.bytes == sum(tensor.nbytes for tensor in weights().values())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_plain_dtypes(tmp_path, dtype):
    tensors = weights(dtype)
    source = saved(tmp_path / "m.safetensors", tensors)
    assert torch.equal(source.weight(LAYER), tensors[f"{LAYER}.weight"].float())
    kept = torch.bfloat16 if dtype.itemsize == 1 else dtype
    for name in ("img_in.weight", "img_in.bias"):
        assert source.read(name).dtype == source.kept_dtype(name) == kept


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize(
    "style", ["scale_weight", "weight_scale", "comfy_quant", "header", "per row"]
)
def test_scaled_fp8_in_old_and_new_names(tmp_path, dtype, style):
    tensors, metadata = weights(), {}
    original = tensors[f"{LAYER}.weight"].float()
    scale = (
        original.abs().amax(1, keepdim=True) / 300
        if style == "per row"
        else original.abs().max() / 300
    )
    tensors[f"{LAYER}.weight"] = (original / scale).to(dtype)
    tensors[f"{LAYER}.scale_weight" if style == "scale_weight" else f"{LAYER}.weight_scale"] = (
        scale.float()
    )
    tensors[f"{LAYER}.input_scale"] = torch.tensor(1.0)
    if style == "scale_weight":
        tensors["scaled_fp8"] = torch.zeros(0, dtype=dtype)
    facts = {"format": str(dtype).removeprefix("torch.")}
    if style == "comfy_quant":
        tensors[f"{LAYER}.comfy_quant"] = as_json(facts)
    if style == "header":
        metadata["_quantization_metadata"] = json.dumps(
            {"layers": {f"model.diffusion_model.{LAYER}": facts}}
        )
    source = saved(tmp_path / "m.safetensors", tensors, metadata, "model.diffusion_model.")
    expected = tensors[f"{LAYER}.weight"].float() * scale
    assert torch.allclose(source.weight(LAYER), expected)
    assert set(source.shapes) == set(SHAPES)
    facts_bytes = len(json.dumps(facts)) if style == "comfy_quant" else 0
    assert source.nbytes(LAYER) == original.numel() + 512 * 2 + 4 + scale.numel() * 4 + facts_bytes


KITCHEN = {
    "mxfp8": ("TensorCoreMXFP8Layout", {}, 25),
    "nvfp4": ("TensorCoreNVFP4Layout", {}, 18),
    "int8_tensorwise": ("TensorWiseINT8Layout", {}, 30),
    "int8 convrot": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        38,
    ),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}, 15),
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", {"convrot_groupsize": 64}, 18),
}
SUFFIXES = {
    "asym_w4a8_int8": {
        "scale": "weight_s_rel",
        "s_channel": "weight_s_channel",
        "codebook": "weight_codebook",
    },
    "nvfp4": {"scale": "weight_scale_2", "block_scale": "weight_scale"},
}


@pytest.mark.parametrize("kind", KITCHEN)
def test_comfyuis_own_formats_through_comfy_kitchen(tmp_path, kind):
    kitchen = pytest.importorskip(
        "comfy_kitchen.tensor", reason="comfy-kitchen is not installed", exc_type=ImportError
    )
    layout, options, floor = KITCHEN[kind]
    layout, name = getattr(kitchen, layout), {"int8 convrot": "int8_tensorwise"}.get(kind, kind)
    tensors = weights()
    original = tensors[f"{LAYER}.weight"].float()
    packed, params = layout.quantize(original.bfloat16(), **options)
    tensors[f"{LAYER}.weight"] = packed
    for field, suffix in SUFFIXES.get(name, {"scale": "weight_scale"}).items():
        value = getattr(params, field)
        if value is not None:
            value = value.reshape(()) if field == "scale" and name == "nvfp4" else value
            tensors[f"{LAYER}.{suffix}"] = (
                value.view(torch.uint8)
                if value.dtype.itemsize == 1 and value.is_floating_point()
                else value
            )
    facts = {"format": name} | {
        key: value for key, value in options.items() if key != "per_channel"
    }
    source = saved(tmp_path / "m.safetensors", tensors | {f"{LAYER}.comfy_quant": as_json(facts)})
    error = (source.weight(LAYER) - original).square().sum() / original.square().sum()
    assert source.shapes[f"{LAYER}.weight"] == (512, 128) == tuple(source.weight(LAYER).shape)
    assert set(source.shapes) == set(SHAPES)
    assert -10 * torch.log10(error) > floor
    assert (
        source.read(f"{LAYER}.weight").dtype
        == source.kept_dtype(f"{LAYER}.weight")
        == torch.bfloat16
    )


def test_comfy_kitchens_awq_with_zero_points(tmp_path):
    pytest.importorskip(
        "comfy_kitchen.tensor", reason="comfy-kitchen is not installed", exc_type=ImportError
    )
    codes = torch.randint(0, 16, (512, 128), dtype=torch.int16)
    scale, zeros = torch.rand(2, 512).bfloat16(), torch.randn(2, 512).bfloat16()
    packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8).view(torch.int8)
    tensors = weights() | {
        f"{LAYER}.weight": packed,
        f"{LAYER}.weight_scale": scale,
        f"{LAYER}.weight_zeros": zeros,
        f"{LAYER}.comfy_quant": as_json({"format": "awq_w4a16"}),
    }
    expected = (codes - 8).float() * scale.float().T.repeat_interleave(
        64, 1
    ) + zeros.float().T.repeat_interleave(64, 1)
    assert torch.allclose(
        saved(tmp_path / "m.safetensors", tensors).weight(LAYER), expected, rtol=1e-6
    )


def test_without_comfy_kitchen_its_formats_are_refused_with_the_fix(tmp_path, monkeypatch):
    import sys

    for name in ("comfy_kitchen", "comfy_kitchen.tensor"):
        monkeypatch.setitem(sys.modules, name, None)
    tensors = weights() | {
        f"{LAYER}.weight": torch.zeros(512, 64, dtype=torch.int8),
        f"{LAYER}.weight_scale": torch.ones(512),
        f"{LAYER}.comfy_quant": as_json({"format": "convrot_w4a4"}),
    }
    source = saved(tmp_path / "m.safetensors", tensors)
    assert source.shapes[f"{LAYER}.weight"] == (512, 128)
    with pytest.raises(FileRefused, match="needs the package comfy-kitchen .*install it"):
        source.weight(LAYER)


def test_files_that_are_quantized_already_are_refused(tmp_path):
    with pytest.raises(
        FileRefused, match="quantized by Nibble already; choose the same model in 16 bit, fp8, int8"
    ):
        saved(tmp_path / "a.safetensors", weights(), {"format": "nibble"})
    with pytest.raises(FileRefused, match="quantized already, by SVDQuant or VQ"):
        saved(
            tmp_path / "b.safetensors",
            weights() | {f"{LAYER}.comfy_quant": as_json({"format": "svdquant_w4a4", "rank": 32})},
        )
    with pytest.raises(FileRefused, match="'int2', which Nibble cannot read"):
        saved(
            tmp_path / "c.safetensors",
            weights() | {f"{LAYER}.comfy_quant": as_json({"format": "int2"})},
        )
    with pytest.raises(
        FileRefused, match=f"stores {LAYER}.weight as torch.int8 and does not say how"
    ):
        saved(
            tmp_path / "d.safetensors",
            weights() | {f"{LAYER}.weight": torch.zeros(512, 64, dtype=torch.int8)},
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [f"{LAYER}.weight", f"{LAYER}.bias", "img_in.weight"])
def test_nan_and_infinity_are_found_and_named(tmp_path, bad, name):
    tensors = weights()
    tensors[name].view(-1)[77] = bad
    source = saved(tmp_path / "m.safetensors", tensors)
    read = (
        {"weight": source.weight, "bias": source.bias}[name.rpartition(".")[2]]
        if name.startswith(LAYER)
        else lambda _: source.read(name)
    )
    with pytest.raises(FileRefused, match=f"m.safetensors holds NaN or infinity in {name}"):
        read(LAYER)


def test_the_fingerprint_tells_models_apart_and_knows_copies(tmp_path):
    tensors = weights()
    first = saved(tmp_path / "a.safetensors", tensors).fingerprint
    assert saved(tmp_path / "b.safetensors", tensors).fingerprint == first
    tensors["single_blocks.0.linear1.weight"][0, 0] += 1
    assert saved(tmp_path / "c.safetensors", tensors).fingerprint != first


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_a_live_models_weights_are_a_source_too(tmp_path, prefix):
    tensors = weights()
    source, file = (
        StateDictSource({prefix + name: tensor for name, tensor in tensors.items()}, "my model"),
        saved(tmp_path / "m.safetensors", tensors),
    )
    assert source.shapes == file.shapes
    assert source.bytes == file.bytes
    assert source.path is None
    assert torch.equal(source.weight(LAYER), file.weight(LAYER))
    assert torch.equal(source.read("img_in.weight"), file.read("img_in.weight"))
    assert source.fingerprint == StateDictSource(tensors).fingerprint
    tensors[f"{LAYER}.weight"][0, 0] = float("nan")
    with pytest.raises(FileRefused, match="my model holds NaN"):
        source.weight(LAYER)


def test_a_live_models_patched_weights_keep_their_dtype():
    """A host may hand out a patched weight in float32 where it stores bf16."""

    class Patched(dict):
        def __getitem__(self, name):
            return super().__getitem__(name).float() + 1

    tensors = Patched(weights())
    source = StateDictSource(tensors)
    assert (
        source.read("img_in.weight").dtype == source.kept_dtype("img_in.weight") == torch.bfloat16
    )
    assert torch.equal(source.weight(LAYER), tensors[f"{LAYER}.weight"])


def test_a_live_comfy_kitchen_tensor_is_dequantized():
    kitchen = pytest.importorskip(
        "comfy_kitchen.tensor", reason="comfy-kitchen is not installed", exc_type=ImportError
    )
    tensors = weights()
    original = tensors[f"{LAYER}.weight"]
    tensors[f"{LAYER}.weight"] = kitchen.QuantizedTensor.from_float(
        original, "TensorCoreFP8Layout", scale="recalculate"
    )
    source = StateDictSource(tensors)
    assert source.shapes[f"{LAYER}.weight"] == (512, 128)
    assert torch.allclose(source.weight(LAYER), original.float(), atol=0.02)
    assert len(source.fingerprint) == 64
