"""The house's directions, kept by reading every import (those hidden in functions too):
docs/architecture.md draws them. Sizes: test_sizes.py.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import import_graph
from support.import_graph import dotted, graph, imports

ROOT = Path(__file__).resolve().parent.parent
HOSTS = {
    "comfy",
    "comfy_api",
    "comfy_api_nodes",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "server",
    "nodes",
    "diffusers",
    "comfy_kitchen",
    "nibble_kernels",
    "triton",
    "ray",
}
ROOMS_OF_COMFYUI = HOSTS - {"diffusers", "nibble_kernels", "triton", "ray"}
# fmt: off
#    room              may import these rooms                       and these hosts
RULES = {
    "kernels":           ({"kernels"},                                   set()),
    "kernels.backends.kitchen": ({"kernels"},                            {"comfy_kitchen"}),
    "kernels.backends.native": ({"kernels"},                             {"nibble_kernels"}),
    "kernels.backends.triton_w4a4": ({"kernels"},                        {"triton"}),
    "kernels.backends.triton_kernels": (set(),                           {"triton"}),
    "kernels.backends.triton_w4a8": ({"kernels"},                        {"triton"}),
    "kernels.backends.triton_w4a8_kernels": ({"kernels.backends.triton_kernels"}, {"triton"}),
    "kernels.backends.triton_vq": ({"kernels"},                          {"triton"}),
    "kernels.backends.triton_vq_kernels": (set(),                        {"triton"}),
    "kernels.backends.triton_nvfp4": ({"kernels"},                       {"triton"}),
    "kernels.backends.triton_nvfp4_kernels": ({"kernels.backends.triton_kernels"}, {"triton"}),
    "quant":             ({"kernels", "quant"},                          set()),
    "quant.files":       ({"quant.files"},                               set()),
    "quant.files.source_layouts": ({"kernels", "quant.files"},           {"comfy_kitchen"}),
    "quant.files.gguf_file": ({"kernels", "quant.files"},                set()),
    "quant.weights":     ({"kernels", "quant.files"},                    set()),
    "quant.calibration": ({"quant.calibration"},                         set()),
    "quant.training":    ({"quant.files"},                               set()),
    "quant.job":         ({"kernels", "quant.files", "quant.calibration"}, set()),
    "quant.modulation":  ({"quant.weights"},                             set()),
    "quant.diffusers":   ({"kernels", "quant"},                          {"diffusers"}),
    "accel":             ({"kernels", "quant.files", "quant.training"},  set()),
    "accel.diffusers":   ({"accel", "quant.files"},                      {"diffusers"}),
    "nodes":             ({"nodes.bridge", "quant", "accel", "demo"},    {"comfy_api"}),
    "nodes.bridge":      ({"quant", "accel", "kernels", "demo", "farm"}, ROOMS_OF_COMFYUI),
    "demo.taesd":        (set(),                                         {"diffusers"}),
    "demo":              ({"quant", "kernels", "demo.taesd"},            set()),
    "farm.ray_driver":   (set(),                                         {"ray"}),
    "farm.work":         (set(),                                         set()),
    "farm":              ({"farm", "quant", "kernels"},                  set()),
    "__main__":          ({"quant", "accel", "demo", "farm", "kernels", "api"}, set()),
    "api":               ({"quant", "accel", "kernels"},                 set()),
    "__init__":          ({"nodes", "api", "quant.diffusers"},           set()),
}
# fmt: on
METHODS = ("quant.svdquant", "quant.intlora", "quant.vq4dit")
SHIPPED = import_graph.shipped()
FOLDERS = sorted({path.parent for path in SHIPPED} - {ROOT})
# A room of the bridge imports these others at most: everybody the host room, systems what they
# share, and no system another one.
BRIDGE = {
    "host": set(),
    "quantized": {"host"},
    "training": {"host"},
    "caching": {"host"},
    "feather": {"host"},
    "quantize": {"host", "quantized", "training"},
    "intlora": {"host", "quantized", "training"},
    "caf": {"host", "quantized", "training"},
}


def room_of(name: str) -> str | None:
    return max(
        (room for room in RULES if name == room or name.startswith(room + ".")),
        key=len,
        default=None,
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path):
    here = room_of(dotted(path))
    assert here, f"{path} is in no room; add one to the table or move it"
    rooms, hosts = RULES[here]
    for line, target, inside in imports(path):
        if inside:
            room = room_of(target)
            assert room == here or any(
                room == r or (room or "").startswith(r + ".") for r in rooms
            ), f"{path}:{line} {here} may not import {target}"
            assert not (room in METHODS and here in METHODS and room != here), (
                f"{path}:{line} methods do not import one another"
            )
        else:
            top = target.split(".")[0]
            assert top != "nibble", f"{path}:{line} only relative imports inside the package"
            assert top not in HOSTS - hosts, f"{path}:{line} {here} may not import {target}"


def test_rooms_of_the_bridge_import_what_they_may():
    bridge = graph("nodes/bridge")
    assert set(bridge.rooms) == set(BRIDGE), "a room without a rule, or a rule without a room"
    for (room, target), places in bridge.arrows.items():
        assert target in BRIDGE[room], f"{room} may not import {target}: {places}"


def test_the_bridge_is_few_rooms_few_arrows_and_low():
    bridge = graph("nodes/bridge")
    assert len(bridge.rooms) <= 8
    assert len(bridge.arrows) <= 20
    assert max(bridge.heights().values()) < 4  # floors


def test_quant_is_few_rooms_and_few_arrows():
    quant = graph("quant")
    assert len(quant.rooms) <= 14
    assert len(quant.arrows) <= 32


FLOORS = ["nodes", "nodes/bridge", "farm", "quant", "accel", "kernels", "demo"]


@pytest.mark.parametrize("floor", FLOORS)
def test_no_floor_has_a_circle(floor):
    assert graph(floor).heights()


@pytest.fixture
def house(monkeypatch, tmp_path):
    """A floor `floor` of three rooms in an empty house; returns what writes a file of it."""
    monkeypatch.setattr(import_graph, "ROOT", tmp_path)

    def write(name: str, text: str) -> None:
        path = tmp_path / "floor" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("__init__.py", "from . import top")
    write("top.py", "def late():\n    from .middle.file import name\n")
    write("middle/file.py", "from ..low import name\nfrom .other import name\nimport torch")
    write("middle/other.py", "")
    write("low.py", "")
    return write


def test_a_graph_has_the_arrows_and_heights_of_its_imports(house):
    drawn = graph("floor")
    assert drawn.rooms == ["low", "middle", "top"]
    assert drawn.arrows == {
        ("middle", "low"): ["floor/middle/file.py:1"],
        ("top", "middle"): ["floor/top.py:2"],
    }
    assert drawn.heights() == {"low": 0, "middle": 1, "top": 2}
    assert graph("floor", loose="shared").rooms == ["middle", "shared"]


def test_a_circle_is_named(house):
    house("low.py", "from . import top")
    with pytest.raises(ValueError, match="low → top → middle → low"):
        graph("floor").heights()


def test_every_folder_with_python_is_in_the_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 cannot read pyproject.toml")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {".".join(["nibble", *path.parent.relative_to(ROOT).parts]) for path in SHIPPED}
    assert set(listed["tool"]["setuptools"]["packages"]) == folders


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_has_a_front_page(folder):
    """Its __init__.py says what it is for and names every file and folder in it."""
    page = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    rooms = {
        path.stem if path.parent == folder else path.parent.name
        for path in SHIPPED
        if folder in (path.parent, path.parent.parent)
    }
    missing = sorted(room for room in rooms - {"__init__"} if not re.search(rf"\b{room}\b", page))
    assert page
    assert not missing, f"not named: {', '.join(missing)}"


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in (ROOT / "kernels" / "csrc").rglob("*")
        if p.suffix in {".cu", ".cuh", ".cpp", ".h", ".inl"}
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_compiled_sources_keep_to_their_side(path):
    """Nothing of torch anywhere; Python only in the bindings; CPU and GPU know the contract
    (nibble.h) and not each other.
    """
    included = re.findall(
        r'^\s*#\s*include\s*[<"]([^>"]+)', path.read_text(encoding="utf-8"), re.MULTILINE
    )
    strangers = {"torch", "ATen", "c10"} | (
        {"pybind11", "Python.h"} if path.name != "module.cpp" else set()
    )
    assert not [name for name in included if name.split("/")[0] in strangers]
    side = path.relative_to(ROOT / "kernels" / "csrc").parts[0]
    other = {"cpu": "cuda", "cuda": "cpu"}.get(side)
    assert not [name for name in included if other and other in name.split("/")[:-1]]


def test_the_packs_wheel_and_the_compiled_wheel_do_not_hold_each_other():
    pack, compiled = (
        (ROOT / place).read_text(encoding="utf-8")
        for place in ("pyproject.toml", "kernels/pyproject.toml")
    )
    assert "csrc" not in pack
    assert "nibble-kernels" not in pack.split("[project.optional-dependencies]")[0]
    assert "wheel.packages = []" in compiled


def test_there_is_no_room_without_a_purpose():
    forbidden = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not [path for path in SHIPPED if path.name in forbidden]


def test_no_bare_except():
    for path in SHIPPED:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
                f"{path}:{node.lineno}"
            )


def test_importing_the_package_is_light():
    """No GPU touched, no host imported, no file written: checked in a fresh interpreter."""
    code = f"""
import importlib.util, sys
sys.dont_write_bytecode = True
root, init = {str(ROOT)!r}, {str(ROOT / "__init__.py")!r}
spec = importlib.util.spec_from_file_location("nibble", init, submodule_search_locations=[root])
package = importlib.util.module_from_spec(spec)
sys.modules["nibble"] = package
spec.loader.exec_module(package)
import nibble.kernels, nibble.quant.files.checkpoint
import nibble.quant.weights.svdquant_w4a4, nibble.quant.intlora.train
import torch
assert not torch.cuda.is_initialized()
heavy = set(sys.modules) & {{"diffusers", "transformers", "comfy", "comfy_kitchen"}}
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
