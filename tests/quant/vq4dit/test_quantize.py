"""From a checkpoint to a file of codewords: complete, resumable to the byte, and stopped by bad
input with one sentence.
"""

import errno
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy_dit as toy
from nibble.quant.calibration.teacher import Teacher
from nibble.quant.files import writer
from nibble.quant.files.architectures import recognise
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.integrity import HEADER_SUM
from nibble.quant.files.known_shapes import flux1_shapes, known_shapes
from nibble.quant.files.report import Report
from nibble.quant.files.safetensors import read_header
from nibble.quant.files.source import Source, StateDictSource
from nibble.quant.job import checkpoint_run
from nibble.quant.job.measurement import Measurement
from nibble.quant.job.monitor import Monitor
from nibble.quant.vq4dit import quantize as pipeline
from nibble.quant.vq4dit.bit_allocation import allocate
from nibble.quant.vq4dit.quantize import VQJob, plan, predict, quantize_checkpoint
from nibble.quant.vq4dit.recipe import LAYOUTS, Recipe
from nibble.quant.weights.base import json_tensor
from nibble.quant.weights.vq import VQWeight

SHAPES = flux1_shapes(1, 1, 128, 64, 64)
FAST = Recipe.from_preset("fast", codewords=16, vector=4)  # one bit a weight: quick to fit


def tiny(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.05).bfloat16()
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def source(tmp_path):
    save_file(tiny(), tmp_path / "m.safetensors", {"format": "pt", "config": '{"x": 1}'})
    return tmp_path / "m.safetensors"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted result."""
    folder = tmp_path_factory.mktemp("whole")
    save_file(tiny(), folder / "m.safetensors", {"format": "pt", "config": '{"x": 1}'})
    return (
        quantize_checkpoint(folder / "m.safetensors", folder / "q.safetensors", FAST),
        folder / "q.safetensors",
    )


def planned(recipe):
    return plan(SHAPES, recognise(SHAPES, "m"), recipe, "m")


class Stop(Exception):
    """What a host raises to interrupt."""


def stop_after(count):
    calls = iter(range(count))

    def cancelled():
        if next(calls, None) is None:
            raise Stop

    return cancelled


def test_every_layer_is_in_the_file_and_the_rest_is_untouched(source, tmp_path):
    seen = []
    recipe = Recipe.from_preset("fast", codewords=64, vector=4)
    report = quantize_checkpoint(
        source,
        tmp_path / "q.safetensors",
        recipe,
        monitor=Monitor(progress=lambda *news: seen.append(news)),
    )
    file, original = open_quantized(tmp_path / "q.safetensors"), tiny()
    file.verify()
    assert len(file.layers) == sum(row.action == "vq" for row in report.rows) == 13
    for name in file.layers:
        layer = VQWeight.from_tensors(file.layer(name), name)
        weight = original[f"{name}.weight"].float()
        assert (layer.dequantize() - weight).square().sum() / weight.square().sum() < 0.25, name
        assert layer.bias.dtype == torch.bfloat16
    assert all(
        name.rpartition(".")[0] in file.layers or torch.equal(file.read(name), original[name])
        for name in original
    )
    assert file.metadata["method"] == "vq"
    assert file.metadata["config"] == '{"x": 1}'
    assert file.fact("recipe")["codewords"] == 64
    assert seen[-1][0] == seen[-1][1] == sum(row.K * row.N for row in planned(recipe))
    assert Report.from_json(file.metadata["report"]).rows[-1].action in ("vq", "keep")
    assert report.bytes_after == os.path.getsize(tmp_path / "q.safetensors")
    assert "13 of codewords" in dict(report.summary())["layers"]


def test_the_prediction_is_the_files_size(source, whole):
    opened, report = Source(source), whole[0]
    predicted = predict(opened.shapes, FAST, opened.name, opened.bytes, opened.kept_dtype)
    assert abs(predicted.bytes_after - report.bytes_after) < 100
    assert [(row.name, row.bytes_after) for row in predicted.rows] == [
        (row.name, row.bytes_after) for row in report.rows
    ]
    header = read_header(whole[1])
    for row in report.rows:
        assert row.bytes_after == sum(
            info.nbytes
            for name, info in header.tensors.items()
            if name.rpartition(".")[0] == row.name
        )


def test_flux1_dev_fits_the_sizes_that_were_promised():
    sizes = {
        bits: (
            predict(
                known_shapes("flux1-dev"), Recipe.from_preset("best", bits=bits), "flux1-dev"
            ).bytes_after
        )
        for bits in (2, 3)
    }
    assert sizes[2] <= 3.6e9
    assert sizes[3] <= 5.1e9


def test_an_interrupted_run_goes_on_to_the_same_bytes(source, tmp_path, whole):
    with pytest.raises(Stop):
        quantize_checkpoint(
            source, tmp_path / "q.safetensors", FAST, monitor=Monitor(cancelled=stop_after(28))
        )
    assert not (tmp_path / "q.safetensors").exists()
    assert (tmp_path / "q.safetensors.partial").exists()
    quantize_checkpoint(source, tmp_path / "q.safetensors", FAST)
    assert (tmp_path / "q.safetensors").read_bytes() == whole[1].read_bytes()


def test_a_second_run_returns_at_once(source, tmp_path, monkeypatch):
    first = quantize_checkpoint(source, tmp_path / "q.safetensors", FAST)
    monkeypatch.setattr(pipeline.fitting, "fit", None)  # would fail if anything were computed
    assert (
        quantize_checkpoint(source, tmp_path / "q.safetensors", FAST).rows[3].db == first.rows[3].db
    )
    with pytest.raises(TypeError):
        quantize_checkpoint(
            source, tmp_path / "q.safetensors", Recipe.from_preset("fast", codewords=4, vector=4)
        )


# ---- calibrated ----------------------------------------------------------------------------------


@pytest.fixture
def as_toy(monkeypatch):
    """The toy DiT as a model that can be recognised: its layers are a plan of their own."""

    def toy_plan(shapes, architecture, recipe, name):
        return [toy.planned(layer, *shapes[f"{layer}.weight"]) for layer in toy.LAYERS[:10]]

    monkeypatch.setattr(VQJob, "plan", staticmethod(toy_plan))
    family = type("Family", (), {"name": "toy", "guessed": False})
    monkeypatch.setattr(checkpoint_run, "recognise", lambda *asked, **known: family)
    return StateDictSource(toy.trained().state_dict(), "toy")


def watched() -> Measurement:
    return Measurement(teacher=toy.teacher())


@pytest.mark.parametrize("preset", ["best", "vq4dit"])
def test_calibration_that_was_interrupted_ends_in_the_same_bytes(as_toy, tmp_path, preset):
    recipe, heard = Recipe.from_preset(preset, bits=2, steps=12), []
    whole = quantize_checkpoint(
        as_toy, tmp_path / "whole.safetensors", recipe, watched(), Monitor(block_error=heard.append)
    )
    assert {(error.name, error.number, error.blocks, error.steps) for error in heard} == {
        ("blocks.0", 0, 2, 12),
        ("blocks.1", 1, 2, 12),
    }
    assert [error.step for error in heard[:3]] == [1, 11, 12]
    assert all(math.isfinite(error.db) for error in heard)

    def stop(error):
        if error.number == 1 and error.step > 5:
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(
            as_toy, tmp_path / "q.safetensors", recipe, watched(), Monitor(block_error=stop)
        )
    assert not (tmp_path / "q.safetensors").exists()
    again = []
    quantize_checkpoint(
        as_toy, tmp_path / "q.safetensors", recipe, watched(), Monitor(block_error=again.append)
    )
    assert {error.name for error in again} == {"blocks.1"}  # the finished block is not done again
    assert (tmp_path / "q.safetensors").read_bytes() == (
        tmp_path / "whole.safetensors"
    ).read_bytes()
    assert all("block " in row.why and " dB" in row.why for row in whole.rows)


def test_calibration_needs_the_model(source, tmp_path):
    with pytest.raises(ValueError, match="the preset 'best' watches the 16-bit model at work"):
        quantize_checkpoint(source, tmp_path / "q.safetensors", Recipe.from_preset("best"))
    assert list(tmp_path.iterdir()) == [source]


def test_a_model_that_overflows_leaves_nothing_behind(as_toy, tmp_path):
    model = toy.trained()

    def run():
        model(
            torch.full((2, toy.TOKENS, toy.CHANNELS), torch.nan),
            t=torch.ones(2),
            label=torch.zeros(2, dtype=torch.long),
        )

    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_checkpoint(
            as_toy,
            tmp_path / "q.safetensors",
            Recipe.from_preset("best", steps=2),
            Measurement(teacher=Teacher(model, run)),
        )
    assert not list(tmp_path.iterdir())


# ---- a size budget -------------------------------------------------------------------------------


def test_bits_go_where_they_remove_most_error_a_byte():
    errors = {
        "a": {2: 1.0, 3: 0.5, 4: 0.4},
        "b": {2: 1.0, 3: 0.9, 4: 0.1},
        "c": {2: 0.2, 3: 0.1, 4: 0.0},
    }
    sizes = {"a": {2: 20, 3: 30, 4: 40}, "b": {2: 20, 3: 30, 4: 40}, "c": {2: 200, 3: 300, 4: 400}}
    assert allocate(errors, sizes, 240) == {"a": 2, "b": 2, "c": 2}
    assert allocate(errors, sizes, 255) == {"a": 3, "b": 2, "c": 2}
    assert allocate(errors, sizes, 280) == {"a": 4, "b": 4, "c": 2}
    assert allocate(errors, sizes, 10_000) == {"a": 4, "b": 4, "c": 4}
    with pytest.raises(ValueError, match="raise budget_gb"):
        allocate(errors, sizes, 239)


def test_a_budget_is_kept_and_used(source, tmp_path):
    whole = {
        bits: predict(SHAPES, Recipe.from_preset("fast", bits=bits), "m").bytes_after
        for bits in LAYOUTS
    }
    budget = (whole[2] + whole[4]) / 2e9
    report = quantize_checkpoint(
        source, tmp_path / "q.safetensors", Recipe.from_preset("fast", budget_gb=budget)
    )
    bits = {
        (facts["codewords"], facts["vector"])
        for facts in open_quantized(tmp_path / "q.safetensors").layers.values()
    }
    assert whole[2] < report.bytes_after <= budget * 1e9
    assert len(bits) > 1
    with pytest.raises(ValueError, match="raise budget_gb"):
        quantize_checkpoint(
            source, tmp_path / "r.safetensors", Recipe.from_preset("fast", budget_gb=1e-4)
        )


# ---- bad input -----------------------------------------------------------------------------------


def test_layers_that_no_codeword_divides_stay():
    layers = planned(Recipe.from_preset("fast", codewords=64, vector=3))
    assert {layer.action for layer in layers} == {"keep"}
    why = {layer.name: layer.why for layer in layers}
    assert (
        why["double_blocks.0.img_attn.proj"] == "K=128 is not a multiple of the sub-vector length 3"
    )


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda state: state.update(
                {
                    "single_blocks.0.linear1.weight": (
                        state["single_blocks.0.linear1.weight"] * torch.nan
                    )
                }
            ),
            "NaN or infinity",
        ),
        (
            lambda state: state.update(
                {"double_blocks.0.img_mlp.0.comfy_quant": json_tensor({"format": "vq"})}
            ),
            "quantized already, by SVDQuant or VQ",
        ),
        (
            lambda state: state.update({"double_blocks.0.img_mlp.0.wscales": torch.ones(1)}),
            "quantized already",
        ),
    ],
)
def test_sources_that_cannot_be_used_leave_nothing_behind(tmp_path, spoil, words):
    state = tiny()
    spoil(state)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(FileRefused, match=words):
        quantize_checkpoint(tmp_path / "m.safetensors", tmp_path / "q.safetensors", FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_our_own_file_is_refused_as_a_source_and_a_full_disk_is_one_sentence(
    source, whole, tmp_path, monkeypatch
):
    with pytest.raises(FileRefused, match="quantized by Nibble already"):
        quantize_checkpoint(whole[1], tmp_path / "r.safetensors", FAST)

    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(writer.os, "posix_fallocate", full)
    with pytest.raises(FileRefused, match="is full"):
        quantize_checkpoint(source, tmp_path / "r.safetensors", FAST)
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state, x: state.update({f"{x}.weight_codebook": state[f"{x}.weight_codebook"][:15]}),
        lambda state, x: state.update(
            {f"{x}.weight_codebook": state[f"{x}.weight_codebook"].reshape(-1, 2)}
        ),
        lambda state, x: state.update({f"{x}.weight_scale": state[f"{x}.weight_scale"][1:]}),
        lambda state, x: state.update({f"{x}.weight": state[f"{x}.weight"].view(torch.int8)}),
        lambda state, x: state.update(
            {f"{x}.comfy_quant": json_tensor({"format": "vq", "codewords": 15, "vector": 4})}
        ),
        lambda state, x: state.update(
            {f"{x}.comfy_quant": json_tensor({"format": "vq", "codewords": "16", "vector": 4})}
        ),
        lambda state, x: state.update(
            {
                f"{x}.comfy_quant": json_tensor(
                    {"format": "vq", "codewords": 16, "vector": 4, "magic": 1}
                )
            }
        ),
        lambda state, x: state.pop(f"{x}.weight_codebook"),
    ],
    ids=[
        "short codebook",
        "other codebook",
        "short scale",
        "int8",
        "codes out of range",
        "text",
        "unknown option",
        "no codebook",
    ],
)
def test_damaged_files_are_refused_in_one_sentence(whole, tmp_path, spoil):
    state, metadata = load_file(whole[1]), read_header(whole[1]).metadata
    spoil(state, "single_blocks.0.linear1")
    del metadata[HEADER_SUM]
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        tmp_path / "bad.safetensors",
        metadata,
    )
    with pytest.raises(FileRefused, match="bad.safetensors .*single_blocks.0.linear1"):
        open_quantized(tmp_path / "bad.safetensors")
