"""The front doors: a folder of any name started as a script, `nibble` after an install, and what
scripts import.
"""

import importlib
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import api_page
import nibble
from checkout import ROOT
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
QUICK = {"rank": 16, "solver": "svd", "memory_cap": 0, "quiet": True}


@pytest.fixture
def source(tmp_path) -> Path:
    draw, path = torch.Generator().manual_seed(0), tmp_path / "m.safetensors"
    shapes = flux1_shapes(1, 1, 128, 64, 64)
    tensors = {key: torch.randn(shape, generator=draw) * 0.05 for key, shape in shapes.items()}
    save_file({key: tensor.bfloat16() for key, tensor in tensors.items()}, path)
    return path


def start(cwd: Path, *arguments) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_a_folder_of_any_name_runs_from_any_folder(tmp_path):
    """Packages of others are not hidden by the plugin's folders (`nodes`, `kernels`, …)."""
    clone = tmp_path / "Any name-1.2"
    clone.symlink_to(ROOT)
    for typed, cwd in ((clone, tmp_path.parent), (clone.name, tmp_path), (".", clone)):
        done = start(cwd, typed, "--version")
        assert (done.stdout, done.stderr) == (f"nibble {nibble.__version__}\n", "")
    done = start(tmp_path, clone.name, "plan", "--help")
    assert f'python "{clone.name}" plan flux1-dev --card "8 GB"' in done.stdout
    done = start(tmp_path, clone.name, "inspect", "no.safetensors")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("nibble: no.safetensors does not exist")


def test_the_plugins_folder_hides_no_other_package(tmp_path):
    (tmp_path / "kernels.py").write_text("raise SystemExit('found: the right one')")
    door = importlib.import_module("nibble.__main__")
    code = f"""
import runpy, sys
sys.path[:0] = [{str(ROOT)!r}, {str(tmp_path)!r}]
sys.argv = ["x", "--help"]
try:
    runpy.run_path({str(Path(door.__file__))!r}, run_name="__main__")
except SystemExit:
    import kernels
"""
    assert start(tmp_path, "-c", code).stderr.strip() == "found: the right one"


def test_the_installed_command_is_the_same_door():
    entry = EntryPoint("nibble", PROJECT["scripts"]["nibble"], "console_scripts")
    assert entry.load() is importlib.import_module("nibble.__main__").main


def test_the_version_is_that_of_the_project():
    assert nibble.__version__ == PROJECT["version"]


def test_the_version_of_an_installed_package_is_its_metadatas(monkeypatch, tmp_path):
    monkeypatch.setattr("nibble.api._PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr("importlib.metadata.version", {"nibble": "7.8.9"}.__getitem__)
    assert nibble.__version__ == "7.8.9"


def test_the_compiled_parts_have_the_version_of_their_own_project():
    """Where they are there: what was built from other sources is another version."""
    text = (ROOT / "kernels" / "pyproject.toml").read_text(encoding="utf-8")
    own = tomllib.loads(text)["project"]["version"]
    native = importlib.import_module("nibble.kernels.backends.native")
    module, why = native.module()
    if module is None:
        pytest.skip(why)
    assert module.__version__ == own


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    (tmp_path / "nibble").symlink_to(ROOT)
    code = "import sys; sys.path[0] = '.'; import nibble; nibble.__version__; assert dir(nibble);"
    heavy = "print({'torch', 'numpy', 'safetensors', 'diffusers', 'tqdm'} & set(sys.modules))"
    assert start(tmp_path, "-c", code + heavy).stdout == "set()\n"


def test_what_scripts_import_is_there_and_nothing_else():
    assert {"quantize", "load", "inspect", "__version__"} <= set(dir(nibble))
    assert callable(nibble.quantize)
    with pytest.raises(AttributeError, match="no attribute 'dequantize'"):
        _ = nibble.dequantize
    assert not hasattr(nibble, "NODE_CLASS_MAPPINGS")  # what ComfyUI looks for in older packs


def test_a_script_quantizes_inspects_and_does_nothing_twice(source, tmp_path, capsys):
    target = tmp_path / "q.safetensors"
    assert nibble.inspect(source)["architecture"] == "FLUX.1"
    report = nibble.quantize(source, target, keep=["single_blocks.*"], **QUICK)
    assert report.bytes_after == target.stat().st_size
    assert open_quantized(target).fact("recipe")["keep"] == ["single_blocks.*"]
    facts = nibble.inspect(target, verify=True)
    assert facts["layers"]["double_blocks.0.img_attn.qkv"]["format"] == "svdquant_w4a4"
    before = target.stat().st_mtime_ns
    nibble.quantize(source, target, keep=["single_blocks.*"], **QUICK)
    assert target.stat().st_mtime_ns == before
    with pytest.raises(FileRefused, match="made with other options"):
        nibble.quantize(source, target, **QUICK)
    nibble.quantize(source, target, **QUICK, overwrite=True)
    assert open_quantized(target).fact("recipe")["keep"] == []


def test_a_script_is_quiet_on_request(source, tmp_path, capsys):
    nibble.quantize(source, tmp_path / "q.safetensors", **QUICK)
    assert capsys.readouterr() == ("", "")


def test_options_that_there_are_not_are_refused(source, tmp_path):
    target = tmp_path / "q.safetensors"
    with pytest.raises(TypeError, match="no option 'ranks'"):
        nibble.quantize(source, target, ranks=3)
    with pytest.raises(ValueError, match="preset='slow' is none of fast, vq4dit, best"):
        nibble.quantize(source, target, preset="slow")
    with pytest.raises(ValueError, match="--bits belongs to --method vq"):
        nibble.quantize(source, target, bits=3)
    assert not target.exists()


def test_a_script_loads_a_file_into_diffusers(source, tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    nibble.quantize(source, tmp_path / "q.safetensors", **QUICK)
    model = nibble.load(tmp_path / "q.safetensors")
    assert type(model).__name__ == "FluxTransformer2DModel"
    assert model.x_embedder.weight.dtype == torch.bfloat16


def test_the_page_of_the_api_is_that_of_the_docstrings():
    """Write it again: python tests/support/api_page.py"""
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page()
