"""Quantize Text Encoder: from a file in models/text_encoders to a 4-bit file beside it, and how
close its conditioning is.
"""

import math
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

import small_encoders as small
from nibble.nodes.bridge.quantize import text_encoder
from nibble.nodes.bridge.quantize.text_encoder import TextEncoderRequest
from nibble.nodes.bridge.quantized import encoders
from nibble.nodes.text_encoders import NibbleLoadCLIP, NibbleQuantizeTextEncoder
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.svdquant.recipe import Recipe

PROMPTS = tuple(f"a picture of {thing}" for thing in ("a fox", "a ship", "a mill", "rain", "tea"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/text_encoders with a small T5."""
    encoders.register()
    home = tmp_path / "text_encoders"
    home.mkdir()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "text_encoders", ([str(home)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop("text_encoders", None)
    small.t5_file(home / "t5.safetensors")
    with small.small_xxl():
        yield home


def request(preset="fast", **changes) -> TextEncoderRequest:
    options = {"recipe": Recipe.from_preset(preset), "kind": "sd3", "prompts": PROMPTS}
    options["clip_name"] = "t5.safetensors"
    return TextEncoderRequest(**(options | changes))


def test_the_files_conditioning_is_as_close_as_it_says(folder):
    name, report, close = request().run()
    assert name == "t5-w4a16.safetensors"
    assert report.architecture == "T5"
    assert text_encoder.sources() == ["t5.safetensors"]
    judges = request().judges
    assert judges == [PROMPTS[4]]  # the last one, and every fourth before it
    plain, four = (
        small.conditioning(small.opened(folder / file), judges[0])
        for file in ("t5.safetensors", name)
    )
    assert close.prompts == 1
    assert close.db == pytest.approx(small.db(plain, four), abs=0.5)
    assert 0.9 < close.cosine < 1
    assert "dB to 16 bit" in close.in_words()


def test_best_fits_the_rounding_to_what_the_layers_read(folder):
    _, fast, without = request().run()
    name, best, close = request("best", filename="best").run()
    assert {row.on for row in best.rows if row.action == "w4a16"} == {"pictures"}
    assert {row.on for row in fast.rows if row.action == "w4a16"} == {"synthetic"}
    assert open_quantized(folder / name).fact("calibration")["prompts"] == len(PROMPTS)
    assert close.db > without.db


def test_a_second_run_finds_it_done(folder):
    name, _, close = request().run()
    before = (folder / name).stat().st_mtime_ns
    again, _, same = request().run()
    assert (again, (folder / name).stat().st_mtime_ns) == (name, before)
    assert same == close
    with pytest.raises(FileRefused, match="switch 'overwrite' on"):
        request(recipe=Recipe.from_preset("fast", keep=("*.wo",))).run()


def test_a_diffusion_model_is_sent_where_it_belongs(folder):
    shapes = flux1_shapes(1, 1, 128, 64, 64)
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()}, folder / "m.safetensors")
    with pytest.raises(FileRefused, match="belongs in models/diffusion_models"):
        request(clip_name="m.safetensors").run()


def test_best_needs_the_encoder_in_memory_and_fast_does_not(folder, monkeypatch):
    monkeypatch.setattr(text_encoder, "fits_in_memory", lambda size: False)
    with pytest.raises(ValueError, match="does not fit in memory"):
        request("best").run()
    assert request().run()[2] is None


def test_the_nodes_make_and_load_it(folder, monkeypatch):
    hidden = SimpleNamespace(unique_id=None)
    for node in (NibbleQuantizeTextEncoder, NibbleLoadCLIP):
        monkeypatch.setattr(node, "hidden", hidden, raising=False)
    made = NibbleQuantizeTextEncoder.execute(
        preset="fast",
        format="w4a8",
        type="sd3",
        prompts="\n".join(PROMPTS),
        keep_layers="*.SelfAttention.o",
        seed=0,
        clip_name="t5.safetensors",
        filename="",
        overwrite=False,
        memory_gb=1.0,
    )
    name = made.args[0]
    assert name == "t5-w4a8.safetensors"
    (chart,) = made.ui["nibble_chart"]
    summary = dict(chart["summary"])
    assert "dB to 16 bit" in summary["conditioning"]
    assert summary["layers"] == "18 W4A4, 1 of 8-bit rows, 4 kept in 16 bit"
    for node, names in (
        (NibbleQuantizeTextEncoder, {"clip_name": "t5.safetensors"}),
        (NibbleLoadCLIP, {"clip_name1": name}),
    ):
        assert node.validate_inputs(**names) is True
        assert "missing" not in node.fingerprint_inputs(**names)
    assert "press R" in NibbleLoadCLIP.validate_inputs(clip_name1="gone.safetensors")
    loaded = NibbleLoadCLIP.execute(name, type="sd3")
    assert small.conditioning(loaded.args[0]).isfinite().all()
    assert dict(loaded.ui["nibble_chart"][0]["summary"])["type"] == "sd3"


def test_closeness_by_hand():
    """(3, 4) against (4, 3): cosine 24/25, signal 25, noise 2."""
    found = text_encoder.closeness([torch.tensor([[3.0, 4.0]])], [torch.tensor([[4.0, 3.0]])])
    assert found.cosine == pytest.approx(24 / 25)
    assert found.db == pytest.approx(10 * math.log10(25 / 2))


def test_a_gguf_is_listed_and_taken_by_fast_alone(folder):
    """ComfyUI cannot run it: nothing to compare with, and nothing to calibrate on."""
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    names = {
        "SelfAttention.q": "attn_q",
        "SelfAttention.k": "attn_k",
        "SelfAttention.v": "attn_v",
        "SelfAttention.o": "attn_o",
        "SelfAttention.relative_attention_bias": "attn_rel_b",
        "0.layer_norm": "attn_norm",
        "DenseReluDense.wi_0": "ffn_gate",
        "DenseReluDense.wi_1": "ffn_up",
        "DenseReluDense.wo": "ffn_down",
        "1.layer_norm": "ffn_norm",
        "shared.": "token_embd",
        "final_layer_norm": "enc.output_norm",
    }
    writer = gguf.GGUFWriter(folder / "small.gguf", "t5encoder")
    for name, tensor in load_file(folder / "t5.safetensors").items():
        theirs = next(theirs for ours, theirs in names.items() if ours in name)
        block = f"enc.blk.{name.split('.')[2]}." if ".block." in name else ""
        writer.add_tensor(f"{block}{theirs}.weight", tensor.float().numpy())
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    assert text_encoder.sources() == ["t5.safetensors", "small.gguf"]
    with pytest.raises(ValueError, match=r"small\.gguf is a GGUF file, .* choose 'fast'"):
        request("best", clip_name="small.gguf").run()
    name, report, close = request(clip_name="small.gguf").run()
    assert (name, report.architecture, close) == ("small-w4a16.safetensors", "T5", None)
    plain, _, _ = request(filename="plain").run()
    of_gguf, of_plain = load_file(folder / name), load_file(folder / plain)
    key = "encoder.block.1.layer.0.SelfAttention.q.weight"
    assert torch.equal(of_gguf[key], of_plain[key])
