"""A source may lie in one file or many, under ComfyUI's names or diffusers', or in a GGUF file: it
is the same model.
"""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.files.source import Source

SHAPES = flux1_shapes(1, 1, 128, 64, 64)
LAYER = "double_blocks.0.img_mlp.0"


def weights(dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).to(dtype)
        for name, shape in SHAPES.items()
    }


def assert_is_the_same_model(source, tensors):
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor), name
    assert torch.equal(source.weight(LAYER), tensors[f"{LAYER}.weight"].float())


def sharded(folder, stem, tensors, count=3, index=True):
    """A model in `count` files as Hugging Face's libraries save it."""
    folder.mkdir(exist_ok=True)
    names, places = sorted(tensors), {}
    for number in range(count):
        file = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number::count]
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    if index:
        text = json.dumps({"metadata": {"total_size": 1}, "weight_map": places})
        (folder / f"{stem}.safetensors.index.json").write_text(text)
    return folder


@pytest.fixture
def whole(tmp_path):
    save_file(weights(), tmp_path / "whole.safetensors")
    return Source(tmp_path / "whole.safetensors")


@pytest.mark.parametrize(
    "chosen", ["model.safetensors.index.json", "model-00002-of-00003.safetensors", "."]
)
def test_shards_are_one_model_by_index_by_any_shard_and_by_folder(tmp_path, whole, chosen):
    folder = sharded(tmp_path / "parts", "model", weights())
    source = Source(folder / chosen)
    assert_is_the_same_model(source, weights())
    assert source.name == "model.safetensors"
    assert (source.bytes, source.notes) == (whole.bytes, [])
    assert source.fingerprint == whole.fingerprint


def test_shards_need_no_index(tmp_path):
    folder = sharded(tmp_path / "parts", "flux", weights(), index=False)
    assert_is_the_same_model(Source(folder / "flux-00001-of-00003.safetensors"), weights())
    assert_is_the_same_model(Source(folder), weights())


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "parts", "model", weights())
    (folder / "model-00003-of-00003.safetensors").unlink()
    for chosen in (".", "model.safetensors.index.json", "model-00001-of-00003.safetensors"):
        with pytest.raises(FileRefused, match="model-00003-of-00003.safetensors is not beside it"):
            Source(folder / chosen)


@pytest.mark.parametrize(
    "text", ["no json", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}']
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "m.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(FileRefused, match="m.safetensors.index.json"):
        Source(path)


def test_two_files_with_one_tensor_are_no_model(tmp_path):
    for number in (1, 2):
        save_file(weights(), tmp_path / f"m-0000{number}-of-00002.safetensors")
    with pytest.raises(FileRefused, match="both hold .*, so they are not parts of one model"):
        Source(tmp_path / "m-00001-of-00002.safetensors")


def test_a_folder_of_other_files_is_refused(tmp_path):
    with pytest.raises(FileRefused, match="is not that of one diffusion model: it holds none"):
        Source(tmp_path)
    for name in "ab":
        save_file(weights(), tmp_path / f"{name}.safetensors")
    with pytest.raises(FileRefused, match="2 .safetensors files that are not parts of one"):
        Source(tmp_path)


# ---- diffusers


def in_diffusers_names(tensors):
    """FLUX.1 as diffusers names it: q, k, v and the MLP apart, (scale, shift) in the last norm."""
    renamed = {}
    simple = {
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "double_blocks.0.img_mod.lin": "transformer_blocks.0.norm1.linear",
        "double_blocks.0.txt_mod.lin": "transformer_blocks.0.norm1_context.linear",
        "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
        "double_blocks.0.txt_attn.proj": "transformer_blocks.0.attn.to_add_out",
        "double_blocks.0.img_mlp.0": "transformer_blocks.0.ff.net.0.proj",
        "double_blocks.0.img_mlp.2": "transformer_blocks.0.ff.net.2",
        "double_blocks.0.txt_mlp.0": "transformer_blocks.0.ff_context.net.0.proj",
        "double_blocks.0.txt_mlp.2": "transformer_blocks.0.ff_context.net.2",
        "double_blocks.0.img_attn.norm.query_norm": "transformer_blocks.0.attn.norm_q",
        "double_blocks.0.img_attn.norm.key_norm": "transformer_blocks.0.attn.norm_k",
        "double_blocks.0.txt_attn.norm.query_norm": "transformer_blocks.0.attn.norm_added_q",
        "double_blocks.0.txt_attn.norm.key_norm": "transformer_blocks.0.attn.norm_added_k",
        "single_blocks.0.modulation.lin": "single_transformer_blocks.0.norm.linear",
        "single_blocks.0.linear2": "single_transformer_blocks.0.proj_out",
        "single_blocks.0.norm.query_norm": "single_transformer_blocks.0.attn.norm_q",
        "single_blocks.0.norm.key_norm": "single_transformer_blocks.0.attn.norm_k",
    }
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        suffix = suffix.replace("scale", "weight")
        if module == "final_layer.adaLN_modulation.1":
            shift, scale = tensor.chunk(2)
            renamed[f"norm_out.linear.{suffix}"] = torch.cat([scale, shift])
        elif module.endswith("_attn.qkv"):
            stem = "add_{}_proj" if "txt" in module else "to_{}"
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"transformer_blocks.0.attn.{stem.format(part)}.{suffix}"] = rows.clone()
        elif module == "single_blocks.0.linear1":
            names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            for part, rows in zip(names, tensor.split([128, 128, 128, 512]), strict=True):
                renamed[f"single_transformer_blocks.0.{part}.{suffix}"] = rows.clone()
        else:
            renamed[f"{simple[module]}.{suffix}"] = tensor
    return renamed


def native():
    """The weights with the norms called as ComfyUI's own modules call them."""
    return {name.replace("_norm.scale", "_norm.weight"): t for name, t in weights().items()}


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline of diffusers with a FLUX.1 in three shards."""
    root = tmp_path / "FLUX.1-tiny"
    root.mkdir()
    (root / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    stem = "diffusion_pytorch_model"
    folder = sharded(root / "transformer", stem, in_diffusers_names(weights()))
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    return root


@pytest.mark.parametrize(
    "chosen",
    [
        ".",
        "transformer",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
    ],
)
def test_a_folder_of_diffusers_is_its_transformer_under_comfyuis_names(pipeline, chosen):
    source = Source(pipeline / chosen)
    assert_is_the_same_model(source, native())
    assert source.name == "FLUX.1-tiny"
    config = json.loads(source.metadata["config"])
    assert config == {"transformer": {"_class_name": "FluxTransformer2DModel"}}


def test_one_file_with_diffusers_names_has_comfyuis(tmp_path):
    save_file(in_diffusers_names(weights()), tmp_path / "m.safetensors")
    source = Source(tmp_path / "m.safetensors")
    assert_is_the_same_model(source, native())
    save_file(native(), tmp_path / "n.safetensors")
    assert source.fingerprint == Source(tmp_path / "n.safetensors").fingerprint


def test_a_missing_part_of_a_joined_layer_is_told(tmp_path):
    tensors = in_diffusers_names(weights())
    del tensors["single_transformer_blocks.0.attn.to_k.weight"]
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(FileRefused, match="lacks a part of single_blocks.0.linear1.weight"):
        Source(tmp_path / "m.safetensors")


# ---- GGUF


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="gguf is not installed")


def gguf_file(gguf, path, tensors, kinds, architecture="flux"):
    """A GGUF file; kinds: name → GGML's type of a tensor, F32 for others."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        kind = getattr(gguf.GGMLQuantizationType, kinds.get(name, "F32"))
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_0", "BF16", "F16"])
def test_gguf_is_what_its_own_package_decodes(tmp_path, gguf, kind):
    tensors, name = weights(), f"{LAYER}.weight"
    path = gguf_file(gguf, tmp_path / "m.gguf", tensors, {name: kind})
    enum = getattr(gguf.GGMLQuantizationType, kind)
    packed = gguf.quants.quantize(tensors[name].float().numpy(), enum)
    expected = torch.from_numpy(gguf.quants.dequantize(packed, enum))
    source = Source(path)
    assert torch.equal(source.weight(LAYER), expected)
    assert source.shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    kept = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind, torch.bfloat16)
    assert source.read(name).dtype == source.kept_dtype(name) == kept
    assert source.read("img_in.bias").dtype == torch.float32
    bits = {"Q8_0": "8.5", "Q5_1": "6", "Q4_0": "4.5"}.get(kind)
    assert source.notes == (
        [f"started from weights of {bits} bits ({kind}), and what they lost stays lost"]
        if bits
        else []
    )


def test_a_k_quant_is_read_by_its_blocks(tmp_path, gguf):
    """One super-block of Q4_K: d = 1/4, dmin = 1/8, all scales 3, all minima 5, nibbles 0 to 15."""
    scales = bytes([3] * 4 + [5] * 4 + [0x53] * 4)
    nibbles = bytes(i % 16 | (15 - i % 16) << 4 for i in range(32)) * 4
    header = np.array([0.25, 0.125], np.float16).tobytes()
    block = np.frombuffer(header + scales + nibbles, np.uint8)
    packed = np.tile(block, (512, 1))
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "flux")
    kind = gguf.GGMLQuantizationType.Q4_K
    writer.add_tensor("a.weight", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    low = torch.arange(32) % 16
    expected = torch.cat([low, 15 - low] * 4) * 0.25 * 3 - 0.125 * 5
    source = Source(tmp_path / "m.gguf")
    assert source.shapes == {"a.weight": (512, 256)}
    assert torch.equal(source.weight("a"), expected.expand(512, -1))


def test_gguf_keeps_the_shape_that_a_tensor_had(tmp_path, gguf):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "wan")
    values = np.arange(64, dtype=np.float32)
    writer.add_array("comfy.gguf.orig_shape.conv.weight", [2, 2, 2, 8])
    writer.add_tensor("conv.weight", values.reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = Source(tmp_path / "m.gguf")
    assert source.shapes == {"conv.weight": (2, 2, 2, 8)}
    assert torch.equal(source.read("conv.weight").flatten(), torch.arange(64.0))


def test_without_the_package_gguf_is_refused_with_the_fix(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(FileRefused, match=r"m.gguf is a GGUF file, .*pip install gguf"):
        Source(tmp_path / "m.gguf")


def test_a_damaged_gguf_is_refused(tmp_path, gguf):
    path = gguf_file(gguf, tmp_path / "m.gguf", weights(), {})
    path.write_bytes(path.read_bytes()[:-4096])
    with pytest.raises(FileRefused, match="m.gguf"):
        source = Source(path)
        for name in source.shapes:
            source.read(name)
    (tmp_path / "n.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    with pytest.raises(FileRefused, match="n.gguf cannot be read"):
        Source(tmp_path / "n.gguf")
