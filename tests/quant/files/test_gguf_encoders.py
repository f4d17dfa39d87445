"""Text encoders in GGUF, written as llama.cpp names and orders their tensors: the same encoder as
in ComfyUI's file.
"""

import pytest
import torch

import encoder_shapes
from nibble.quant.files import gguf_encoders
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.source import Source
from nibble.quant.files.text_encoders import families
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

# ComfyUI's name → llama.cpp's (gguf-py, tensor_mapping.py: MODEL_TENSOR of T5ENCODER and LLAMA)
T5 = {
    "shared.weight": "token_embd.weight",
    "encoder.final_layer_norm.weight": "enc.output_norm.weight",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "enc.blk.0.attn_q.weight",
    "encoder.block.0.layer.0.SelfAttention.k.weight": "enc.blk.0.attn_k.weight",
    "encoder.block.0.layer.0.SelfAttention.v.weight": "enc.blk.0.attn_v.weight",
    "encoder.block.0.layer.0.SelfAttention.o.weight": "enc.blk.0.attn_o.weight",
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (
        "enc.blk.0.attn_rel_b.weight"
    ),
    "encoder.block.0.layer.0.layer_norm.weight": "enc.blk.0.attn_norm.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": "enc.blk.0.ffn_gate.weight",
    "encoder.block.0.layer.1.DenseReluDense.wi_1.weight": "enc.blk.0.ffn_up.weight",
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": "enc.blk.0.ffn_down.weight",
    "encoder.block.0.layer.1.layer_norm.weight": "enc.blk.0.ffn_norm.weight",
}
LANGUAGE_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.q_proj.bias": "blk.0.attn_q.bias",
    "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
    "model.layers.0.self_attn.k_proj.bias": "blk.0.attn_k.bias",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.self_attn.v_proj.bias": "blk.0.attn_v.bias",
    "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
    "model.layers.0.self_attn.q_norm.weight": "blk.0.attn_q_norm.weight",
    "model.layers.0.self_attn.k_norm.weight": "blk.0.attn_k_norm.weight",
    "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
    "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
    "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
    "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
}
HEADS, KEY_HEADS = 4, 2
SMALL = dict(layers=1, width=128, hidden=192, words=96, queries=128, keys=64, head=32)
ENCODERS = {
    "t5encoder": (encoder_shapes.t5(1, 128, 128, 192, 96, 2), T5),
    "qwen2": (encoder_shapes.language_model(**SMALL, qkv_bias=True), LANGUAGE_MODEL),
    "qwen3": (encoder_shapes.language_model(**SMALL, qk_norm=True), LANGUAGE_MODEL),
    "llama": (encoder_shapes.language_model(**SMALL), LANGUAGE_MODEL),
}


def weights(shapes) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in shapes.items()}


def in_turns(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order for Llama: of each head row 0, row d/2, row 1, row d/2 + 1, …"""
    rows = len(tensor) // heads
    order = [
        head * rows + half * rows // 2 + i
        for head in range(heads)
        for i in range(rows // 2)
        for half in (0, 1)
    ]
    return tensor[order]


def write(path, architecture: str, tensors: dict[str, torch.Tensor], kinds=()):
    """kinds: (a part of GGUF's name, GGML's type) of tensors that are not float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    for name, tensor in tensors.items():
        part = next((kind for key, kind in kinds if key in name), "F32")
        kind = getattr(gguf.GGMLQuantizationType, part)
        writer.add_tensor(name, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def theirs(architecture: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as llama.cpp converts them."""
    names, found = ENCODERS[architecture][1], {}
    for name, tensor in tensors.items():
        if architecture == "llama" and ".q_proj." in name:
            tensor = in_turns(tensor, HEADS)
        if architecture == "llama" and ".k_proj." in name:
            tensor = in_turns(tensor, KEY_HEADS)
        found[names[name]] = tensor
    return found


@pytest.mark.parametrize("architecture", ENCODERS)
def test_it_is_the_encoder_that_comfyuis_file_is(tmp_path, architecture):
    tensors = weights(ENCODERS[architecture][0])
    path = write(tmp_path / "e.gguf", architecture, theirs(architecture, tensors))
    source = Source(path)
    assert source.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert torch.equal(source.read(name), tensor), name
    assert not source.is_one_file  # ComfyUI cannot load it


@pytest.mark.parametrize("architecture", ["t5encoder", "llama"])
def test_quantized_blocks_are_decoded_and_named(tmp_path, architecture):
    tensors = weights(ENCODERS[architecture][0])
    stored = theirs(architecture, tensors)
    path = write(tmp_path / "e.gguf", architecture, stored, [("attn_q.weight", "Q8_0")])
    kind = gguf.GGMLQuantizationType.Q8_0
    name = next(name for name in tensors if name.endswith((".q.weight", "q_proj.weight")))
    packed = gguf.quants.quantize(tensors[name].numpy(), kind)  # a row's blocks are its own
    expected = torch.from_numpy(gguf.quants.dequantize(packed, kind))
    source = Source(path)
    assert torch.equal(source.weight(name.removesuffix(".weight")), expected)
    assert "8.5 bits (Q8_0)" in source.notes[0]
    assert len(source.fingerprint) == 64


def test_a_decoder_beside_t5s_encoder_is_left_out(tmp_path):
    tensors = weights(ENCODERS["t5encoder"][0])
    stored = theirs("t5encoder", tensors) | {"dec.blk.0.attn_q.weight": torch.zeros(128, 128)}
    source = Source(write(tmp_path / "e.gguf", "t5", stored))
    assert source.shapes.keys() == tensors.keys()


def test_the_4_bit_file_is_that_of_the_decoded_weights(tmp_path):
    tensors = weights(ENCODERS["t5encoder"][0])
    path = write(tmp_path / "e.gguf", "t5encoder", theirs("t5encoder", tensors))
    report = quantize_checkpoint(path, tmp_path / "four.safetensors", Recipe.from_preset("fast"))
    assert report.architecture == "T5"
    layers = open_quantized(tmp_path / "four.safetensors").layers
    assert layers["encoder.block.0.layer.0.SelfAttention.q"]["format"] == "awq_w4a16"
    assert layers["shared"]["format"] == "int8_tensorwise"


@pytest.mark.parametrize("architecture", ["gemma2", "bert", "clip"])
def test_others_are_refused_with_what_to_use(tmp_path, architecture):
    path = write(tmp_path / "e.gguf", architecture, {"token_embd.weight": torch.zeros(96, 128)})
    with pytest.raises(FileRefused, match=rf"{architecture}\) in GGUF; choose .* as .safetensors"):
        Source(path)


@pytest.mark.parametrize("family", ["UMT5-XXL", "Mistral Small 24B"])
def test_encoders_that_bring_their_tokenizer_are_refused(family, monkeypatch):
    class File:
        name, is_encoder, architecture, path = "e.gguf", True, "t5encoder", None
        tensors: dict = {}
        decoded: dict = {}

    known = next(entry for entry in families() if entry.name == family)
    monkeypatch.setattr(gguf_encoders, "family_of", lambda shapes: known)
    with pytest.raises(FileRefused, match=rf"\({family}\) whose tokenizer ComfyUI cannot read"):
        gguf_encoders.in_comfyui_names(File())


def test_an_unknown_tensor_is_named(tmp_path):
    stored = theirs("t5encoder", weights(ENCODERS["t5encoder"][0]))
    path = write(tmp_path / "e.gguf", "t5encoder", stored | {"enc.blk.0.odd.weight": torch.ones(4)})
    with pytest.raises(FileRefused, match=r"a tensor enc\.blk\.0\.odd\.weight that it should not"):
        Source(path)
