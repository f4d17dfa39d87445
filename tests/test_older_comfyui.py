"""An older ComfyUI says in a sentence which one is needed, and imports nothing of ours before."""

import json
import subprocess
import sys

import pytest

import nibble
from checkout import ROOT

# as ComfyUI's nodes.py does it: by the path since 2024, before by the folder's name
LOADER = """
import importlib.util, json, os, sys
path, by_path = sys.argv[1], sys.argv[2] == "path"
import folder_paths
name = path.replace(".", "_x_") if by_path else os.path.basename(path)
spec = importlib.util.spec_from_file_location(name, os.path.join(path, "__init__.py"))
module = importlib.util.module_from_spec(spec)
sys.modules[name] = module
try:
    spec.loader.exec_module(module)
    said = None
except Exception as error:
    said = f"{type(error).__name__}: {error}"
ours = [module for module in sys.modules if module.startswith(f"{name}.")]
print(json.dumps([said, ours, "torch" in sys.modules]))
"""
NEEDED = f"ImportError: Nibble needs ComfyUI {nibble.COMFYUI} or newer, this is"


@pytest.fixture
def load(tmp_path):
    """Loads the plugin in a ComfyUI that has nothing but what is written here."""

    def load(version: str | None, by: str) -> list:
        (tmp_path / "main.py").write_text(LOADER)
        (tmp_path / "folder_paths.py").touch()
        if version is not None:
            (tmp_path / "comfyui_version.py").write_text(f"__version__ = {version!r}\n")
        plugin = tmp_path / "custom_nodes" / "ComfyUI-Nibble"
        plugin.parent.mkdir()
        plugin.symlink_to(ROOT)
        command = [sys.executable, str(tmp_path / "main.py"), str(plugin), by]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return load


@pytest.mark.parametrize("by", ["path", "name"])
@pytest.mark.parametrize("version", ["0.8.0", "0.3.64", "v0.2.7"])
def test_an_older_comfyui_is_told_what_it_needs(load, version, by):
    assert load(version, by) == [f"{NEEDED} {version}; update it.", [], False]


@pytest.mark.parametrize("by", ["path", "name"])
def test_a_comfyui_without_a_version_is_told_too(load, by):
    assert load(None, by) == [f"{NEEDED} older still; update it.", [], False]


def test_a_library_beside_no_comfyui_is_told_nothing(tmp_path):
    (tmp_path / "nibble").symlink_to(ROOT)
    code = "import sys; sys.path.insert(0, sys.argv[1]); import nibble; print(nibble.__version__)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{nibble.__version__}\n", "")
