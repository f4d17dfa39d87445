"""What a command cannot do is one sentence before it starts; no unfinished file is left."""

import importlib

import pytest
import torch
from safetensors.torch import save_file

from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.known_shapes import flux1_shapes
from published_files import RandomFlux

cli = importlib.import_module("nibble.__main__")
QUICK = ["--rank", "16", "--solver", "svd", "--memory-cap", "0"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A source, and a quantized file of it."""
    folder = tmp_path_factory.mktemp("made")
    source, target = folder / "m.safetensors", folder / "q.safetensors"
    draw, shapes = torch.Generator().manual_seed(0), flux1_shapes(1, 1, 128, 64, 64)
    tensors = {key: torch.randn(shape, generator=draw) * 0.05 for key, shape in shapes.items()}
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, source)
    assert cli.main(["quantize", str(source), str(target), *QUICK]) == 0
    return source, target


def only_line(capsys, *arguments) -> str:
    """Runs a command that must be refused with one line and nothing else, a bar included."""
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.removeprefix("nibble: ")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--device", "cudaa"], "--device cudaa cannot be used by this torch"),
        (["--device", "xla"], "--device xla cannot be used by this torch"),
        (["--memory-cap", "-1"], "--memory-cap -1 is less than nothing"),
        (["--memory-cap", "nan"], "--memory-cap nan is less than nothing"),
    ],
)
def test_what_no_machine_has_is_refused(made, tmp_path, capsys, options, said):
    line = only_line(capsys, "quantize", made[0], tmp_path / "q.safetensors", *options)
    assert line.startswith(said)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(made, tmp_path, capsys):
    line = only_line(capsys, "quantize", made[0], tmp_path / "q.safetensors", "--device", "cuda")
    assert line.startswith("--device cuda cannot be used by this torch")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--seed", "1"], ["--keep", "single*"], ["--method", "vq"]])
def test_a_file_made_with_other_options_is_kept(made, capsys, options):
    """The options of QUICK belong to svdquant."""
    source, target = made
    before = target.read_bytes()
    quick = QUICK[4:] if "vq" in options else QUICK
    line = only_line(capsys, "quantize", source, target, *quick, *options)
    assert line.startswith("q.safetensors exists and was made with other options")
    assert target.read_bytes() == before
    assert not list(target.parent.glob("*.partial*"))


def test_a_file_measured_otherwise_is_kept(made, tmp_path, capsys):
    pytest.importorskip("diffusers", reason="diffusers is not installed: nothing is measured")
    source, target = made
    before = target.read_bytes()
    prompts = tmp_path / "prompts.safetensors"
    save_file({"tokens": torch.randn(2, 4, 64), "pooled": torch.randn(2, 64)}, prompts)
    line = only_line(capsys, "quantize", source, target, *QUICK, "--prompts", prompts)
    assert line.startswith("q.safetensors exists and was made with other options")
    assert target.read_bytes() == before


def test_a_file_is_replaced_on_request_and_one_of_another_version_always(made, tmp_path):
    source, target = made[0], tmp_path / "q.safetensors"
    whole = made[1].read_bytes()
    target.write_bytes(whole)
    again = ["quantize", str(source), str(target), *QUICK]
    assert cli.main([*again, "--seed", "1", "--overwrite"]) == 0
    assert open_quantized(target).fact("recipe")["seed"] == 1
    older = {"format": "nibble", "nibble_version": "0"}
    save_file({"x": torch.zeros(1)}, target, older)
    assert cli.main(again) == 0
    assert open_quantized(target).fact("recipe")["seed"] == 0


def test_what_cannot_be_converted_is_said_before_a_bar(tmp_path, capsys, monkeypatch):
    blocks, others = RandomFlux(single=1).nunchaku()
    for name, tensors in (("transformer_blocks", blocks), ("unquantized_layers", others)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    own = tmp_path / "own.safetensors"
    assert cli.main(["convert", str(tmp_path), str(own)]) == 0
    kitchen = tmp_path / "k.safetensors"
    assert "two kinds side by side" in only_line(capsys, "convert", own, kitchen, "--to", "kitchen")
    assert "in this format already" in only_line(capsys, "convert", own, kitchen)
    assert not kitchen.exists()
    assert not list(tmp_path.glob("*.partial*"))
