"""The house's directions, kept by reading every import (those hidden in functions too), and its
promises of size and lightness.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

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
}
# fmt: off
#    room              may import these rooms                       and these hosts
RULES = {
    "kernels":         ({"kernels"},                                set()),
    "kernels.backends.kitchen": ({"kernels"},                       {"comfy_kitchen"}),
    "kernels.backends.native": ({"kernels"},                        {"nibble_kernels"}),
    "quant":           ({"kernels", "quant.container", "quant.training"}, set()),
    "quant.container": (set(),                                      set()),
    "quant.training":  ({"quant.container"},                        set()),
    "quant.sources":   ({"kernels", "quant"},                       {"comfy_kitchen"}),
    "quant.conversion": ({"kernels", "quant"},                      set()),
    "quant.diffusers": ({"kernels", "quant"},                       {"diffusers"}),
    "quant.svdquant":  ({"kernels", "quant"},                       set()),
    "quant.intlora":   ({"kernels", "quant"},                       set()),
    "quant.vq4dit":    ({"kernels", "quant"},                       set()),
    "quant.published": ({"kernels", "quant"},                       set()),
    "accel":           ({"kernels", "quant.container", "quant.training"},  set()),
    "nodes":           ({"nodes.bridge", "quant", "accel", "demo"}, {"comfy_api"}),
    "nodes.bridge":    ({"quant", "accel", "kernels", "demo"},      HOSTS - {"diffusers", "nibble_kernels"}),
    "demo":            ({"quant", "kernels"},                       set()),
    "__main__":        ({"quant", "demo", "kernels"},               set()),
    "__init__":        ({"nodes"},                                  set()),
}
# fmt: on
METHODS = ("quant.svdquant", "quant.intlora", "quant.vq4dit")
SHIPPED = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0]
    in {"kernels", "quant", "accel", "nodes", "demo", "__init__.py", "__main__.py"}
)


def dotted(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def room_of(name: str) -> str | None:
    return max(
        (room for room in RULES if name == room or name.startswith(room + ".")),
        key=len,
        default=None,
    )


def imports(path: Path):
    """(line, absolute dotted target inside the package or host's top name, inside?) of each import
    in a file.
    """
    package = list(path.relative_to(ROOT).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)] + (
                node.module.split(".") if node.module else []
            )
            yield from ((node.lineno, ".".join([*base, alias.name]), True) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module, False


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


SOURCES = {".py", ".mjs", ".js", ".cu", ".cuh", ".cpp", ".h", ".inl", ".cmake"}


@pytest.mark.parametrize(
    "path",
    [
        p
        for p in ROOT.rglob("*")
        if p.suffix in SOURCES
        and ".git" not in p.parts
        and not any(part.startswith(".") or part == "build" for part in p.relative_to(ROOT).parts)
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_stay_under_400_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 800


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
    assert (
        "csrc" not in pack
        and "nibble-kernels" not in pack.split("[project.optional-dependencies]")[0]
    )
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
spec = importlib.util.spec_from_file_location("nibble", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}])
package = importlib.util.module_from_spec(spec); sys.modules["nibble"] = package; spec.loader.exec_module(package)
import nibble.kernels, nibble.quant.container, nibble.quant.svdquant.weight, nibble.quant.intlora.train
import torch
assert not torch.cuda.is_initialized()
heavy = set(sys.modules) & {{"diffusers", "transformers", "comfy", "comfy_kitchen"}}
assert not heavy, heavy
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
