"""What Nibble needs and has not got: one sentence; and what it can do without."""

import importlib
import importlib.abc
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

import nibble
from checkout import ROOT
from nibble.kernels.optional import optional
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.known_shapes import flux1_shapes

cli = importlib.import_module("nibble.__main__")
ERRORS = {
    "absent": ModuleNotFoundError("No module named 'diffusers'", name="diffusers"),
    "broken": RuntimeError("Failed to import diffusers.models\noperator torchvision::nms"),
    "no library": OSError("libcudart.so.12: cannot open shared object file"),
}


class Broken(importlib.abc.MetaPathFinder):
    """Raises where a package is imported."""

    def __init__(self, package: str, error: Exception):
        self.package = package
        self.error = error

    def find_spec(self, name, *_):
        if name.partition(".")[0] == self.package:
            raise self.error
        return None


@pytest.fixture
def without(monkeypatch):
    """Makes a package fail on import, and forgets what has imported it."""

    def forget(package: str, error: Exception) -> None:
        dependents = (package, "nibble.quant.diffusers", "nibble.demo.run", "nibble.demo.pictures")
        for name in list(sys.modules):
            if name.startswith(dependents):
                monkeypatch.delitem(sys.modules, name)
        for parent, child in (("nibble.quant", "diffusers"), ("nibble.demo", "run")):
            monkeypatch.delattr(sys.modules.get(parent), child, raising=False)
        monkeypatch.setattr(sys, "meta_path", [Broken(package, error), *sys.meta_path])

    return forget


@pytest.fixture
def source(tmp_path):
    draw, path = torch.Generator().manual_seed(0), tmp_path / "m.safetensors"
    shapes = flux1_shapes(1, 1, 128, 64, 64)
    tensors = {key: torch.randn(shape, generator=draw) * 0.05 for key, shape in shapes.items()}
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_package_that_cannot_be_imported_is_told_in_half_a_sentence(without, error):
    without("diffusers", error)
    found, why = optional("diffusers")
    assert found is None
    assert why.startswith("diffusers is not installed") or str(error).partition("\n")[0] in why
    assert "\n" not in why


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_fast_goes_on_without_diffusers_and_says_so(without, source, tmp_path, capsys, error):
    without("diffusers", error)
    target = tmp_path / "q.safetensors"
    quick = ["--rank", "16", "--solver", "svd", "--rotation", "off"]
    assert cli.main(["quantize", str(source), str(target), *quick]) == 0
    said = capsys.readouterr()
    assert "so the weights alone were used" in said.err
    assert "Traceback" not in said.err
    made = open_quantized(target)
    assert made.fact("calibration") == {"kind": "weights only"}
    assert "weights alone" in made.fact("report")["notes"][0]


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.parametrize("command", ["best", "demo"])
def test_best_and_the_demo_end_in_a_sentence_without_diffusers(
    without, source, tmp_path, capsys, command, error
):
    without("diffusers", error)
    target = tmp_path / "q.safetensors"
    asked = {
        "best": ["quantize", str(source), str(target), "--preset", "best", "--rank", "16"],
        "demo": ["demo", "--out", str(tmp_path / "d.png"), "--target", str(target)],
    }
    assert cli.main(asked[command]) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "pip install --upgrade diffusers" in said[0]
    assert not target.exists()


def test_a_command_goes_on_without_a_progress_bar(without, source, tmp_path, capsys):
    without("tqdm", ModuleNotFoundError("No module named 'tqdm'", name="tqdm"))
    quick = ["--rank", "16", "--solver", "svd", "--memory-cap", "0"]
    assert cli.main(["quantize", str(source), str(tmp_path / "q.safetensors"), *quick]) == 0
    assert "tqdm is not installed, so there is no progress bar" in capsys.readouterr().err


def test_a_package_that_a_command_cannot_do_without_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "nibble.quant.cli.inspect", raising=False)
    monkeypatch.delattr(sys.modules["nibble.quant.cli"], "inspect", raising=False)
    error = ModuleNotFoundError("No module named 'torch'", name="torch")
    monkeypatch.setattr(sys, "meta_path", [Broken("nibble", error), *sys.meta_path])
    assert cli.main(["inspect", "x.safetensors"]) == 1
    assert capsys.readouterr().err.strip() == "nibble: torch is not installed; pip install torch"


@pytest.mark.parametrize(
    "version, said",
    [
        ("0.8.0", "Nibble needs ComfyUI 0.33.0 or newer, this is 0.8.0; update it."),
        ("0.3.64", "Nibble needs ComfyUI 0.33.0 or newer, this is 0.3.64; update it."),
        (None, "Nibble needs ComfyUI 0.33.0 or newer, this is older still; update it."),
    ],
)
def test_an_older_comfyui_is_told_in_a_sentence(monkeypatch, version, said):
    older = ModuleType("comfyui_version")
    older.__version__ = version
    monkeypatch.setitem(sys.modules, "comfyui_version", None if version is None else older)
    with pytest.raises(ImportError) as refusal:
        nibble.check_comfyui()
    assert str(refusal.value) == said


@pytest.mark.parametrize("version", ["0.33.0", "0.33.1", "0.100.0", "1.0.0", "0.34.0rc1"])
def test_the_oldest_comfyui_and_newer_ones_are_taken(monkeypatch, version):
    newer = ModuleType("comfyui_version")
    newer.__version__ = version
    monkeypatch.setitem(sys.modules, "comfyui_version", newer)
    nibble.check_comfyui()


def test_the_oldest_comfyui_is_the_one_of_the_registry():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["comfy"]["requires-comfyui"] == f">={nibble.COMFYUI}"


def test_the_front_door_names_torch_where_it_is_missing(tmp_path):
    """In a process of its own: nothing that the door itself imports needs torch."""
    (tmp_path / "nibble").symlink_to(ROOT)
    (tmp_path / "torch.py").write_text('raise ModuleNotFoundError("", name="torch")\n')
    command = [sys.executable, "-m", "nibble", "demo"]
    path = {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "nibble: torch is not installed; pip install torch"
