"""From a checkpoint to a 4-bit file: complete, resumable to the byte, and stopped by bad input with
one sentence and nothing left behind.
"""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nibble.quant.calibration.statistics import InputStats
from nibble.quant.files.architectures import plan, recognise
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.files.report import LayerRow, Report
from nibble.quant.files.safetensors import read_header
from nibble.quant.files.source import StateDictSource
from nibble.quant.job import checkpoint_run
from nibble.quant.job.measurement import Measurement
from nibble.quant.job.monitor import Monitor
from nibble.quant.svdquant import quantize as pipeline
from nibble.quant.svdquant.quantize import layout, predict, quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights.formats import FORMATS

SHAPES = flux1_shapes(1, 1, 128, 64, 64)
FAST = Recipe.from_preset("fast", rank=16, smoothing_grid=1, iterations=1)
ROOT = Path(__file__).resolve().parents[3]


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


class Stop(Exception):
    """What a host raises to interrupt."""


def stop_after(count):
    calls = iter(range(count))

    def cancelled():
        if next(calls, None) is None:
            raise Stop

    return cancelled


def test_every_layer_is_in_the_file_and_stands_for_its_matrix(whole):
    report, target = whole
    file, original = open_quantized(target), tiny()
    file.verify()
    assert len(file.layers) == sum(row.action != "keep" for row in report.rows) == 16
    for name, facts in file.layers.items():
        layer = FORMATS[facts["format"]].from_tensors(file.layer(name), name)
        weight = original[f"{name}.weight"].float()
        error = (layer.dequantize() - weight).square().sum() / weight.square().sum()
        assert error < 0.02, name
    for name in original:
        module = name.rpartition(".")[0]
        assert module in file.layers or torch.equal(file.read(name), original[name])


def test_the_file_says_where_it_comes_from(whole, source):
    report, target = whole
    file = open_quantized(target)
    assert file.metadata["nibble_version"] == "1"
    assert file.metadata["method"] == "svdquant"
    assert file.metadata["format"] == "nibble"
    # the source's own, which some models need to be detected
    assert file.metadata["config"] == '{"x": 1}'
    assert Recipe.from_json(file.metadata["recipe"]) == FAST
    assert file.fact("source")["name"] == "m.safetensors"
    stored = Report.from_json(file.metadata["report"])
    assert [row.db for row in stored.rows] == [row.db for row in report.rows]
    assert stored.bytes_after == target.stat().st_size == report.bytes_after
    assert all(row.db is None or 10 < row.db < 40 for row in report.rows)
    assert sum(row.db is not None for row in report.rows) == 16


def test_the_prediction_from_shapes_is_close_to_the_byte(whole):
    report, _ = whole
    predicted = predict(SHAPES, FAST, "m.safetensors")
    assert [(row.name, row.action, row.bytes_after) for row in predicted.rows] == [
        (row.name, row.action, row.bytes_after) for row in report.rows
    ]
    # the source's name and metadata differ
    assert abs(predicted.bytes_after - report.bytes_after) < 512


def test_a_second_run_returns_at_once_and_other_options_do_not(whole, monkeypatch):
    report, target = whole
    source, before = target.parent / "m.safetensors", target.stat().st_mtime_ns
    monkeypatch.setattr(pipeline, "quantize_linear", None)  # would fail if anything were computed
    again = quantize_checkpoint(source, target, FAST)
    assert [row.db for row in again.rows] == [row.db for row in report.rows]
    assert target.stat().st_mtime_ns == before
    with pytest.raises(TypeError):
        quantize_checkpoint(source, target, Recipe.from_preset("fast", rank=32))
    with pytest.raises(TypeError):
        quantize_checkpoint(source, target, FAST, measurement=Measurement({"kind": "prompts"}))
    # the finished file was not touched
    assert quantize_checkpoint(source, target, FAST).bytes_after == report.bytes_after


def test_two_runs_give_the_same_bytes(whole, source, tmp_path):
    quantize_checkpoint(source, tmp_path / "q.safetensors", FAST)
    assert (tmp_path / "q.safetensors").read_bytes() == whole[1].read_bytes()


@pytest.mark.parametrize("after", [3, 12, 25])
def test_an_interrupted_run_stops_at_once_and_goes_on_where_it_was(whole, source, tmp_path, after):
    target = tmp_path / "q.safetensors"
    with pytest.raises(Stop):
        quantize_checkpoint(source, target, FAST, monitor=Monitor(cancelled=stop_after(after)))
    assert sorted(os.listdir(tmp_path)) == [
        "m.safetensors",
        "q.safetensors.partial",
        "q.safetensors.partial.journal",
    ]
    names = []
    quantize_checkpoint(
        source, target, FAST, monitor=Monitor(progress=lambda *news: names.append(news))
    )
    assert target.read_bytes() == whole[1].read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["m.safetensors", "q.safetensors"]
    assert [done for done, _, _ in names] == sorted(done for done, _, _ in names)
    assert names[-1][0] == names[-1][1]


def test_kill_9_in_mid_work_costs_only_the_layer_at_hand(whole, source, tmp_path):
    target = tmp_path / "q.safetensors"
    script = textwrap.dedent(f"""
        import importlib.util, os, signal, sys, torch
        torch.set_num_threads({torch.get_num_threads()})
        root, init = {str(ROOT)!r}, {str(ROOT / "__init__.py")!r}
        spec = importlib.util.spec_from_file_location(
            "nibble", init, submodule_search_locations=[root]
        )
        sys.modules["nibble"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
        from nibble.quant.svdquant import quantize as pipeline
        from nibble.quant.svdquant.recipe import Recipe
        done, real = [], pipeline.quantize_linear
        def dying(*args, **kwargs):
            result = real(*args, **kwargs)
            done.append(1)
            if len(done) == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        pipeline.quantize_linear = dying
        recipe = Recipe.from_json({FAST.to_json()!r})
        pipeline.quantize_checkpoint({str(source)!r}, {str(target)!r}, recipe)
        """)
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not target.exists()
    computed = []
    real = pipeline.quantize_linear
    try:
        pipeline.quantize_linear = lambda *args, **kwargs: (
            computed.append(1) or real(*args, **kwargs)
        )
        quantize_checkpoint(source, target, FAST)
    finally:
        pipeline.quantize_linear = real
    assert len(computed) == 10 - 3  # the fourth layer died before it was written
    assert target.read_bytes() == whole[1].read_bytes()


def test_layers_of_one_input_share_their_smoothing_also_when_resumed(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "txt_norm.weight": torch.ones(64),
        "img_in.weight": torch.randn(128, 64, generator=generator),
    }
    for layer in ("to_q", "to_k", "to_v", "add_q_proj"):
        tensors[f"transformer_blocks.0.attn.{layer}.weight"] = torch.randn(
            128, 128, generator=generator
        ) * (1 + torch.arange(128) % 7)
    save_file(tensors, tmp_path / "m.safetensors")
    quantize_checkpoint(tmp_path / "m.safetensors", tmp_path / "a.safetensors", FAST)
    factors = [
        load_file(tmp_path / "a.safetensors")[f"transformer_blocks.0.attn.{m}.weight_smooth_factor"]
        for m in ("to_q", "to_k", "to_v")
    ]
    assert torch.equal(factors[0], factors[1])
    assert torch.equal(factors[0], factors[2])
    with pytest.raises(Stop):
        quantize_checkpoint(
            tmp_path / "m.safetensors",
            tmp_path / "b.safetensors",
            FAST,
            monitor=Monitor(cancelled=stop_after(5)),
        )
    quantize_checkpoint(tmp_path / "m.safetensors", tmp_path / "b.safetensors", FAST)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("count", [1, 3])
def test_the_bytes_do_not_depend_on_how_many_layers_are_made_at_once(
    source, whole, tmp_path, monkeypatch, count
):
    monkeypatch.setattr(pipeline, "at_once", lambda largest: count)
    quantize_checkpoint(source, tmp_path / "q.safetensors", FAST)
    assert (tmp_path / "q.safetensors").read_bytes() == whole[1].read_bytes()


def test_statistics_are_used_where_there_are_some(source, tmp_path):
    asked = []

    def statistics(name):
        asked.append(name)
        if name != "single_blocks.0.linear1":
            return None
        stats = InputStats.empty(128, samples=64, hessian_block=64)
        stats.update(
            torch.randn(200, 128, generator=torch.Generator().manual_seed(0))
            * torch.linspace(0.1, 4, 128)
        )
        return stats

    report = quantize_checkpoint(
        source,
        tmp_path / "q.safetensors",
        FAST,
        Measurement({"kind": "prompts", "prompts": 3}, statistics),
    )
    rows = {row.name: row for row in report.rows}
    assert "held-out samples" in rows["single_blocks.0.linear1"].why
    assert "synthetic" in rows["single_blocks.0.linear2"].why
    assert set(asked) == {row.name for row in report.rows if row.action != "keep"}
    assert open_quantized(tmp_path / "q.safetensors").fact("calibration") == {
        "kind": "prompts",
        "prompts": 3,
    }


def test_a_live_model_gives_the_same_tensors_as_its_file(whole, tmp_path):
    quantize_checkpoint(
        StateDictSource({f"diffusion_model.{name}": tensor for name, tensor in tiny().items()}),
        tmp_path / "q.safetensors",
        FAST,
    )
    mine, theirs = load_file(tmp_path / "q.safetensors"), load_file(whole[1])
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize(
    "name",
    [
        "single_blocks.0.linear2.weight",
        "double_blocks.0.img_mod.lin.weight",
        "double_blocks.0.img_mlp.0.bias",
        "img_in.weight",
    ],
)
def test_nan_is_refused_by_name_and_leaves_nothing(tmp_path, name):
    tensors = tiny()
    tensors[name].view(-1)[5] = float("nan")
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(FileRefused, match=f"NaN or infinity in {name}"):
        quantize_checkpoint(tmp_path / "m.safetensors", tmp_path / "q.safetensors", FAST)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_bad_input_is_refused_before_anything_is_written(source, tmp_path):
    save_file({"a.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    save_file({"decoder.conv_in.weight": torch.zeros(4, 4)}, tmp_path / "vae.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(source.read_bytes()[:-100])
    (tmp_path / "old.ckpt").write_bytes(b"PK\3\4" + b"\0" * 100)
    before = sorted(os.listdir(tmp_path))
    for name, words in [
        ("lora.safetensors", "LoRA"),
        ("vae.safetensors", "VAE"),
        ("cut.safetensors", "cut off"),
        ("old.ckpt", "pickle"),
        ("no.safetensors", "does not exist"),
    ]:
        with pytest.raises(FileRefused, match=words):
            quantize_checkpoint(tmp_path / name, tmp_path / "q.safetensors", FAST)
    for target, words in [
        ("m.safetensors", "would be read"),
        ("vae.safetensors", "not made by Nibble"),
        ("q.ckpt", "does not end"),
        ("no/q.safetensors", "does not exist"),
    ]:
        with pytest.raises(FileRefused, match=words):
            quantize_checkpoint(source, tmp_path / target, FAST)
    assert sorted(os.listdir(tmp_path)) == before


def test_two_runs_on_one_target_exclude_one_another(source, tmp_path):
    target = tmp_path / "q.safetensors"

    def second(done, total, name):
        if done == 0:
            with pytest.raises(FileRefused, match="is being written by another run"):
                quantize_checkpoint(source, target, FAST)

    quantize_checkpoint(source, target, FAST, monitor=Monitor(progress=second))
    open_quantized(target).verify()


def test_a_damaged_target_of_ours_is_made_again(whole, tmp_path):
    target = tmp_path / "q.safetensors"
    data = bytearray(whole[1].read_bytes())
    info = read_header(whole[1]).tensors["single_blocks.0.linear1.comfy_quant"]
    data[info.start : info.start + 4] = b"????"
    target.write_bytes(data)
    save_file(tiny(), tmp_path / "m.safetensors", {"format": "pt", "config": '{"x": 1}'})
    quantize_checkpoint(tmp_path / "m.safetensors", target, FAST)
    assert target.read_bytes() == whole[1].read_bytes()


def test_a_report_that_is_too_long_is_shortened(source, tmp_path, monkeypatch):
    monkeypatch.setattr(
        checkpoint_run,
        "reserved_bytes",
        lambda metadata, *_: len(json.dumps({**metadata, "report": "x" * 300})),
    )
    report = quantize_checkpoint(source, tmp_path / "q.safetensors", FAST)
    file = open_quantized(tmp_path / "q.safetensors")
    file.verify()
    assert file.fact("report")["rows"] == []
    assert file.fact("report")["bytes_after"] == report.bytes_after


def test_a_report_survives_json():
    report = Report(
        "FLUX.1", [LayerRow("x", "w4a4", "why", 20.123, 10, 5, 1.5)], 10, 5, 2.0, ["note"]
    )
    assert Report.from_json(report.to_json()).rows[0].db == 20.12
    assert Report.from_json(report.to_json()).notes == ["note"]
    assert "seconds" not in report.to_json(seconds=False)
    assert dict(report.summary())["error"] == "median 20.1 dB, worst 20.1 dB"
    for text in ("{}", "[]", json.dumps({"rows": [{"no": 1}]})):
        with pytest.raises(ValueError):
            Report.from_json(text)


def test_a_pattern_that_names_no_layer_is_noted():
    recipe = Recipe.from_preset("fast", rank=16, keep=["single_blocks.*", "singel_blocks.*"])
    assert predict(SHAPES, recipe, "m").notes == ["no layer matches the pattern 'singel_blocks.*'"]


def test_layout_has_what_the_formats_need(whole):
    report, target = whole
    header = read_header(target)
    specs = layout(SHAPES, plan(SHAPES, recognise(SHAPES, "m"), FAST), FAST.rank)
    assert {(spec.name, spec.dtype, tuple(spec.shape)) for spec in specs} == {
        (name, info.dtype, info.shape) for name, info in header.tensors.items()
    }
