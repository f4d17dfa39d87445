"""Text encoders at 4 bits: which one a file holds, what becomes of its layers, how large it gets;
and a tiny one, written and read back.
"""

import argparse
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import encoder_shapes
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.cli.options import add_commands
from nibble.quant.files import text_encoders
from nibble.quant.files.architectures import plan, recognise
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.source import Source
from nibble.quant.interop.convert import convert
from nibble.quant.job.measurement import Measurement
from nibble.quant.svdquant.quantize import predict, quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe

FAST = Recipe.from_preset("fast")
TINY = encoder_shapes.t5(2, 128, 128, 256, 300, 2)
TINY_QWEN = encoder_shapes.language_model(2, 128, 256, 300, 128, 64, 64, qk_norm=True)


def weights(shapes, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.ones(shape).half()
        if "norm" in name
        else (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).half()
        for name, shape in shapes.items()
    }


def actions(shapes, recipe=FAST) -> dict[str, str]:
    return {row.name: row.action for row in plan(shapes, recognise(shapes, "m"), recipe)}


@pytest.mark.parametrize("name", encoder_shapes.REAL)
def test_an_encoder_is_recognised_by_its_names(name):
    shapes = encoder_shapes.REAL[name]
    assert recognise(shapes, "m").name == name
    assert recognise(shapes, "m").encoder


# weights of the blocks at 4.25 bits, tables at 8 (and 4 bytes a row), the rest in 16 bit: by hand,
# in GB
T5_BLOCKS = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
SIZES = {
    "T5-XXL": (T5_BLOCKS * 4.25 / 8 + 32128 * (4096 + 4)) / 1e9,
    "UMT5-XXL": (T5_BLOCKS * 4.25 / 8 + 256384 * (4096 + 4)) / 1e9,
    "Qwen3 4B": (
        36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728) * 4.25 / 8 + 151936 * (2560 + 4)
    )
    / 1e9,
}


@pytest.mark.parametrize("name", SIZES)
def test_the_size_is_that_of_the_formats(name):
    report = predict(encoder_shapes.REAL[name], FAST, name)
    assert report.bytes_after / 1e9 == pytest.approx(SIZES[name], rel=2e-3)


def test_t5_xxl_takes_no_more_than_2_9_gb():
    assert predict(encoder_shapes.REAL["T5-XXL"], FAST, "t5").bytes_after <= 2.9e9


def test_a_t5s_blocks_get_4_bit_weights_and_its_words_8_bit_rows():
    found = actions(TINY)
    assert found.pop("shared") == "rows8"
    position = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    assert found.pop(position) == "keep"
    assert set(found.values()) == {"w4a16"}
    assert len(found) == 2 * 7


def test_a_vision_tower_gets_8_bits_and_its_ends_stay():
    shapes = encoder_shapes.REAL["Qwen2.5-VL 7B"] | {"lm_head.weight": (152064, 3584)}
    found = actions(shapes)
    assert found["visual.blocks.7.mlp.down_proj"] == "rows8"
    assert found["visual.merger.mlp.0"] == "keep"
    assert found["model.layers.27.mlp.down_proj"] == "w4a16"
    assert found["lm_head"] == "rows8"


def test_activations_of_8_bits_are_for_who_asks_for_them():
    table = Recipe.from_preset("fast", format="svdquant_w4a8", rank=0)
    assert actions(TINY_QWEN, table)["model.layers.1.mlp.up_proj"] == "w4a4"
    assert actions(TINY_QWEN)["model.layers.1.mlp.up_proj"] == "w4a16"


REFUSED = {
    "CLIP": ("text_model.encoder.layers.0.mlp.fc1.weight", "is a CLIP text encoder"),
    "GPT-OSS": ("layers.0.mlp.experts.gate_up_proj.weight", "mixture of experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_encoder_that_stays_as_it_is_is_refused_with_the_reason(name):
    key, words = REFUSED[name]
    with pytest.raises(FileRefused, match=words):
        recognise({key: (4, 4, 4)}, "m.safetensors")


def test_a_diffusion_transformer_made_of_a_language_model_is_no_encoder():
    shapes = TINY_QWEN | {"t_embedder1.mlp.0.weight": (128, 256)}
    assert text_encoders.family_of(shapes) is None


@pytest.fixture(params=["svdquant_w4a4", "svdquant_w4a8"])
def written(request, tmp_path):
    """A tiny T5 with its tokenizer in the file: (its tensors, the report, the 4-bit file)."""
    tensors = weights(TINY) | {"spiece_model": torch.arange(300, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "t5.safetensors")
    rank = 0 if request.param == "svdquant_w4a8" else 16
    recipe = Recipe.from_preset("fast", format=request.param, rank=rank)
    target = tmp_path / "t5-4bit.safetensors"
    return tensors, quantize_checkpoint(tmp_path / "t5.safetensors", target, recipe), target


def test_a_file_is_written_and_read_back(written):
    tensors, report, path = written
    file = open_quantized(path)
    file.verify()
    assert file.family == "T5"
    assert report.architecture == "T5"
    assert report.bytes_after == path.stat().st_size
    stored = load_file(path)
    assert torch.equal(stored["spiece_model"], tensors["spiece_model"])
    rows = tensors["shared.weight"].float()
    read = stored["shared.weight"].float() * stored["shared.weight_scale"]
    assert (read - rows).abs().max() <= rows.abs().amax(1).max() / 127 / 2 * 1.001
    assert json.loads(bytes(stored["shared.comfy_quant"])) == {"format": "int8_tensorwise"}
    by_name = {row.name: row for row in report.rows}
    noise = (read - rows).square().sum() / rows.square().sum()
    assert by_name["shared"].db == pytest.approx(-10 * math.log10(noise), abs=0.01)


def test_names_stay_whole_for_comfyui(tmp_path):
    save_file(weights(TINY_QWEN), tmp_path / "qwen.safetensors")
    source = Source(tmp_path / "qwen.safetensors")
    assert source.prefix == ""
    assert set(source.shapes) == set(TINY_QWEN)


def test_what_the_layers_read_makes_them_closer(tmp_path):
    """Inputs of which a few directions hold nearly everything, as in real encoders."""
    save_file(weights(TINY), tmp_path / "t5.safetensors")
    name = "encoder.block.0.layer.1.DenseReluDense.wo"
    mix = torch.randn(256, 256, generator=torch.Generator().manual_seed(1))
    spread = torch.logspace(0, -3, 256)

    def inputs(rows: int, seed: int) -> torch.Tensor:
        return torch.randn(rows, 256, generator=torch.Generator().manual_seed(seed)) * spread @ mix

    stats = InputStats.empty(256, pictures=0)
    stats.update(inputs(4096, 2))
    found = {}
    for kind, known in (("fast", {}), ("best", {name: stats})):
        path = tmp_path / f"{kind}.safetensors"
        measured = Measurement({"kind": kind}, known.get)
        quantize_checkpoint(tmp_path / "t5.safetensors", path, FAST, measured)
        layer = open_quantized(path).layer(name)
        codes = layer[f"{name}.weight"]
        low, high = codes & 15, codes >> 4 & 15
        grid = torch.stack([low, high], -1).flatten(1).float() - 8
        dense = grid * layer[f"{name}.weight_scale"].float().T.repeat_interleave(64, 1)
        x, w = inputs(512, 3), load_file(tmp_path / "t5.safetensors")[f"{name}.weight"].float()
        found[kind] = ((x @ dense.T - x @ w.T).square().sum() / (x @ w.T).square().sum()).item()
    assert found["best"] < found["fast"] / 4


def test_the_command_line_takes_an_encoder(tmp_path, capsys):
    """W4A8 without a branch unless another format is asked for; nothing but weights is read."""
    save_file(weights(TINY), tmp_path / "t5.safetensors")
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers(), "", lambda path, verify: None)
    for more, kind in (([], "svdquant_w4a8"), (["--format", "svdquant_w4a4"], "awq_w4a16")):
        target = tmp_path / f"{kind}.safetensors"
        command = ["quantize", str(tmp_path / "t5.safetensors"), str(target), *more]
        options = parser.parse_args(command)
        options.run(options)
        formats = {facts["format"] for facts in open_quantized(target).layers.values()}
        assert formats == {kind, "int8_tensorwise"}
    assert "T5" in capsys.readouterr().out
    options = parser.parse_args([*command, "--preset", "best", "--overwrite"])
    with pytest.raises(ValueError, match="Quantize Text Encoder"):
        options.run(options)


def test_an_encoder_is_not_converted(written, tmp_path):
    with pytest.raises(FileRefused, match="holds (a text encoder's 8-bit rows|levels of a table)"):
        convert(written[2], tmp_path / "kitchen.safetensors", "kitchen")
    assert not list(tmp_path.glob("kitchen*"))


# ---- the table of docs/models.md

TABLE = Recipe.from_preset("fast", format="svdquant_w4a8", rank=0)
TOKENS = 512


def peak(shapes, size: int) -> float:
    """Weights, the largest 4-bit layer unpacked to float32, and TOKENS tokens in float32: four
    times as wide as the model, and two hidden rows of its MLP.
    """
    rows = [row for row in plan(shapes, recognise(shapes, "m"), TABLE) if row.action == "w4a4"]
    width = min(row.K for row in rows)
    hidden = max(max(row.K, row.N) for row in rows)
    largest = max(row.K * row.N for row in rows)
    return size + 4 * largest + 4 * TOKENS * (4 * width + 2 * hidden)


def table_row(name: str) -> str:
    shapes = encoder_shapes.REAL[name]
    report = predict(shapes, TABLE, name)
    used = recognise(shapes, "m"), text_encoders.family_of(shapes)
    before, after = report.bytes_before / 1e9, report.bytes_after / 1e9
    top = peak(shapes, report.bytes_after) / 1e9
    sizes = f"{before:.1f} GB | {after:.2f} GB | {top:.2f} GB"
    return f"| {used[0].name} | `{used[1].loaded_as}` | {sizes} |"


@pytest.mark.parametrize("name", encoder_shapes.REAL)
def test_the_documents_table_has_these_sizes(name):
    page = Path(text_encoders.__file__).parents[2] / "docs" / "models.md"
    assert table_row(name) in page.read_text(encoding="utf-8")
