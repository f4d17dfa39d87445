"""The terminal's front door: exit codes, one sentence on stderr, and what is printed."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import random_flux
import small_files
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.known_shapes import flux1_shapes
from published_files import RandomFlux

cli = importlib.import_module("nibble.__main__")
SHAPES = flux1_shapes(1, 1, 128, 64, 64)
QUICK = ["--rank", "16"]


@pytest.fixture
def source(tmp_path):
    return random_flux.write(tmp_path / "m.safetensors", SHAPES)


def refused(capsys, *arguments):
    """Runs a command that must fail; returns its one line of complaint."""
    assert cli.main([str(argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    complaint = [line for line in lines if line.startswith("nibble: ")]
    assert len(complaint) == 1
    assert not any("Traceback" in line for line in lines)
    return complaint[0]


def test_quantize_and_inspect(source, tmp_path, capsys):
    target = tmp_path / "q.safetensors"
    assert (
        cli.main(
            [
                "quantize",
                str(source),
                str(target),
                *QUICK,
                "--keep",
                "single_blocks.*",
                "--seed",
                "7",
                "--no-gptq",
            ]
        )
        == 0
    )
    out, err = capsys.readouterr()
    # the bar names the layer
    assert "FLUX.1" in out
    assert "median" in out
    assert "double_blocks.0." in err
    recipe = open_quantized(target).fact("recipe")
    assert (recipe["rank"], recipe["keep"], recipe["seed"], recipe["gptq"]) == (
        16,
        ["single_blocks.*"],
        7,
        False,
    )
    assert cli.main(["inspect", str(target), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "all tensors match" in out
    assert "double_blocks.0.img_attn.qkv" in out
    assert "w4a4" in out
    assert cli.main(["inspect", str(target), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["format"] == "1"
    assert facts["layers"]["double_blocks.0.img_attn.qkv"]["format"] == "svdquant_w4a4"
    assert [row["db"] for row in facts["report"]["rows"] if row["action"] == "w4a4"][0] > 10


def test_a_pattern_that_names_no_layer_is_told_before_the_work(source, tmp_path, capsys):
    target = tmp_path / "q.safetensors"
    command = ["quantize", str(source), str(target), *QUICK, "--keep", "singel_blocks.*"]
    assert cli.main(command) == 0
    told, work = "nibble: no layer matches the pattern 'singel_blocks.*'", "double_blocks.0."
    err = capsys.readouterr().err
    assert err.index(told) < err.index(work)


def test_inspect_of_a_16_bit_file(source, capsys):
    assert cli.main(["inspect", str(source)]) == 0
    assert "FLUX.1" in capsys.readouterr().out
    assert cli.main(["inspect", str(source), "--plan", "--rank", "16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rank"] == 16
    assert {row["action"] for row in facts["report"]["rows"]} == {"w4a4", "w4a16", "keep"}


def test_codewords_are_made_inspected_and_planned(source, tmp_path, capsys):
    target = tmp_path / "vq.safetensors"
    assert (
        cli.main(
            [
                "quantize",
                str(source),
                str(target),
                "--method",
                "vq",
                "--codewords",
                "16",
                "--vector",
                "2",
                "--keep",
                "single_blocks.*",
            ]
        )
        == 0
    )
    assert {layer["format"] for layer in open_quantized(target).layers.values()} == {"vq"}
    assert "pattern" not in capsys.readouterr().err
    assert cli.main(["inspect", str(target), "--verify"]) == 0
    out = capsys.readouterr().out
    assert "all tensors match" in out
    assert "double_blocks.0.img_attn.qkv" in out
    assert "vq" in out
    assert (
        cli.main(["inspect", str(source), "--plan", "--method", "vq", "--bits", "2", "--json"]) == 0
    )
    assert json.loads(capsys.readouterr().out)["bits"] == 2
    assert "--rank belongs to --method svdquant" in refused(
        capsys, "quantize", str(source), str(target), "--method", "vq", "--rank", "32"
    )


def test_published_files_are_named_and_converted(tmp_path, capsys):
    blocks, others = RandomFlux(single=1).nunchaku()
    for name, tensors in (("transformer_blocks", blocks), ("unquantized_layers", others)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    for path in (tmp_path, tmp_path / "transformer_blocks.safetensors"):
        assert cli.main(["inspect", str(path)]) == 0
        assert "Nunchaku INT4" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"] == "FLUX.1"
    own, back = tmp_path / "own.safetensors", tmp_path / "back.safetensors"
    assert cli.main(["convert", str(tmp_path), str(own)]) == 0
    assert "Nunchaku INT4 → Nibble" in capsys.readouterr().out
    assert cli.main(["inspect", str(own), "--verify"]) == 0
    assert "from Nunchaku INT4" in capsys.readouterr().out
    assert cli.main(["convert", str(own), str(back), "--to", "nunchaku"]) == 0
    assert "two kinds side by side" in refused(
        capsys, "convert", own, tmp_path / "k.safetensors", "--to", "kitchen"
    )


def test_the_plan_of_flux1_dev_needs_no_file(capsys):
    assert cli.main(["inspect", "--plan", "flux1-dev"]) == 0
    out = capsys.readouterr().out
    assert "predicted file" in out
    assert "228 W4A4" in out
    assert "23.80 GB" in out


def test_refusals_are_one_sentence_and_exit_code_1(source, tmp_path, capsys):
    save_file({"x.lora_A.weight": torch.zeros(4, 4)}, tmp_path / "lora.safetensors")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\0" * 60)
    target = tmp_path / "q.safetensors"
    assert "is a LoRA" in refused(capsys, "quantize", tmp_path / "lora.safetensors", target)
    assert "model.gguf" in refused(capsys, "quantize", tmp_path / "model.gguf", target)
    assert "does not exist" in refused(capsys, "quantize", tmp_path / "no.safetensors", target)
    assert "would be read" in refused(capsys, "quantize", source, source)
    assert "rank=20 is not a multiple of 16" in refused(
        capsys, "quantize", source, target, "--rank", "20"
    )
    assert "solver='magic'" in refused(capsys, "quantize", source, target, "--solver", "magic")
    assert "does not exist" in refused(capsys, "inspect", tmp_path / "no.safetensors")
    assert "no known model; choose a file or one of flux1-dev" in refused(
        capsys, "inspect", "--plan", "flux9"
    )
    assert "no checksums" in refused(capsys, "inspect", source, "--verify")
    assert not target.exists()


def test_only_flux_can_be_calibrated_outside_comfyui(tmp_path, capsys):
    save_file(
        {
            "txt_norm.weight": torch.ones(64),
            "img_in.weight": torch.zeros(128, 64),
            "transformer_blocks.0.attn.add_q_proj.weight": torch.zeros(128, 128),
        },
        tmp_path / "m.safetensors",
    )
    assert "only FLUX.1 and DiT can be calibrated" in refused(
        capsys,
        "quantize",
        tmp_path / "m.safetensors",
        tmp_path / "q.safetensors",
        "--preset",
        "best",
    )


def test_the_best_preset_runs_the_model_first(source, tmp_path, capsys):
    pytest.importorskip(
        "diffusers", reason="diffusers is not installed: the model cannot be run outside ComfyUI"
    )
    save_file(
        {"tokens": torch.randn(2, 4, 64), "pooled": torch.randn(2, 64)},
        tmp_path / "prompts.safetensors",
    )
    assert (
        cli.main(
            [
                "quantize",
                str(source),
                str(tmp_path / "q.safetensors"),
                *QUICK,
                "--preset",
                "best",
                "--keep",
                "double*",
                "--prompts",
                str(tmp_path / "prompts.safetensors"),
            ]
        )
        == 0
    )
    file = open_quantized(tmp_path / "q.safetensors")
    facts = file.fact("calibration")
    assert (facts["kind"], facts["prompts"]) == ("prompts", 2)
    assert len(facts["fingerprint"]) == 16
    assert any(
        "held-out samples" in row["why"] and "GPTQ" in row["why"]
        for row in file.fact("report")["rows"]
    )
    assert "lacks the tensors" in refused(
        capsys,
        "quantize",
        source,
        tmp_path / "p.safetensors",
        "--preset",
        "best",
        "--prompts",
        source,
    )


@pytest.mark.parametrize(
    "options, said",
    [
        (["--width", "100"], "--width 100 is not a multiple of 16"),
        (["--height", "8"], "--height 8 is not a multiple of 16"),
        (["--steps", "0"], "--steps 0 is less than 1"),
    ],
)
def test_a_size_that_no_flux_draws_is_refused(source, tmp_path, capsys, options, said):
    pytest.importorskip(
        "diffusers", reason="diffusers is not installed: the model cannot be run outside ComfyUI"
    )
    assert said in refused(capsys, "quantize", source, tmp_path / "q.safetensors", *QUICK, *options)


def test_prompts_of_another_model_are_refused(source, tmp_path, capsys):
    pytest.importorskip(
        "diffusers", reason="diffusers is not installed: the model cannot be run outside ComfyUI"
    )
    prompts = tmp_path / "prompts.safetensors"
    save_file({"tokens": torch.randn(2, 4, 32), "pooled": torch.randn(2, 64)}, prompts)
    target = tmp_path / "q.safetensors"
    said = refused(capsys, "quantize", source, target, *QUICK, "--prompts", prompts)
    assert "prompts of 32 and 64 channels" in said


def test_a_second_run_records_nothing(source, tmp_path, monkeypatch):
    diffusers = pytest.importorskip(
        "nibble.quant.diffusers",
        reason="diffusers is not installed: the model cannot be run outside ComfyUI",
    )
    arguments = ["quantize", str(source), str(tmp_path / "q.safetensors"), *QUICK]
    assert cli.main(arguments) == 0
    monkeypatch.setattr(diffusers, "record_inputs", lambda *_, **__: pytest.fail("recorded again"))
    assert cli.main(arguments) == 0


def test_wrong_usage_is_exit_code_2_and_help_has_examples(capsys):
    for arguments in ([], ["quantize"], ["nonsense"], ["quantize", "a", "b", "--preset", "slow"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err
    for arguments in (["--help"], ["quantize", "--help"], ["inspect", "--help"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 0
        assert "python -m nibble quantize flux1-dev.safetensors" in capsys.readouterr().out


def test_an_interrupt_is_exit_code_130_and_the_work_is_kept(source, tmp_path, capsys, monkeypatch):
    from nibble.quant.svdquant import quantize as pipeline

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "quantize_w4a16", interrupt)
        assert cli.main(["quantize", str(source), str(tmp_path / "q.safetensors"), *QUICK]) == 130
    assert "goes on from the finished layers" in capsys.readouterr().err
    assert (tmp_path / "q.safetensors.partial").exists()
    assert not (tmp_path / "q.safetensors").exists()
    assert cli.main(["quantize", str(source), str(tmp_path / "q.safetensors"), *QUICK]) == 0


def test_benches_run_in_place_and_are_missed_politely(tmp_path, capsys, monkeypatch):
    (tmp_path / "bench_echo.py").write_text("import sys\nprint('echo', sys.argv[1:], __name__)")
    monkeypatch.setattr(cli, "BENCHES", tmp_path)
    assert cli.main(["bench", "echo", "--fast"]) == 0
    assert cli.main(["bench", "all"]) == 0
    assert capsys.readouterr().out.splitlines() == ["echo ['--fast'] __main__", "echo [] __main__"]
    assert cli.main(["bench"]) == 0
    assert cli.main(["bench", "nothing"]) == 2
    monkeypatch.setattr(cli, "BENCHES", tmp_path / "none")
    assert "run this from a clone" in refused(capsys, "bench", "ops")


def test_the_module_runs_as_a_program(source):
    """As a user starts it, with the package found by its import name; a closed pipe is no error."""
    root = Path(cli.__file__).resolve().parent
    code = (
        "import importlib.util, runpy, sys; s = importlib.util.spec_from_file_location('nibble',"
        " sys.argv[1] + '/__init__.py', submodule_search_locations=[sys.argv[1]]);"
        " sys.modules['nibble'] = m = importlib.util.module_from_spec(s); s.loader.exec_module(m);"
        " root = sys.argv.pop(1); runpy.run_module('nibble', run_name='__main__', alter_sys=True)"
    )
    command = [sys.executable, "-c", code, str(root), "inspect", str(source)]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert result.returncode == 0
    assert "FLUX.1" in result.stdout
    assert result.stderr == ""


def test_inspect_knows_every_small_file_that_nibble_writes_and_finds_damage(tmp_path, capsys):
    made = small_files.files(tmp_path)
    kinds = {
        "CAF": "CAF heads",
        "CAF, whole layers": "CAF heads",
        "IntLoRA": "IntLoRA adapter",
        "training state": "state of a training",
        "couplings' index": "CAF couplings",
        "couplings' captions": "prompts of CAF couplings",
        "couplings' pairs": "pairs of CAF couplings",
    }
    assert made.keys() == kinds.keys()
    for kind, (path, _) in made.items():
        assert cli.main(["inspect", str(path), "--verify"]) == 0
        assert kinds[kind] in capsys.readouterr().out
        assert cli.main(["inspect", str(path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] == kinds[kind]
        whole = path.read_bytes()
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
        said = refused(capsys, "inspect", path, "--verify")
        assert "is damaged" in said or "couplings.json is damaged" in said, said
        path.write_bytes(whole)
    assert cli.main(["inspect", str(tmp_path / "pairs"), "--verify"]) == 0
    assert "CAF couplings" in capsys.readouterr().out
