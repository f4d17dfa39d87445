"""Run where the pack is installed and nothing can compile: loads it by its path, as ComfyUI does,
and runs layers through the package's CPU library.

    python in_package.py FOLDER_OF_THE_PACK

Exits with an error where a compiler is on PATH, where something else than the library runs a layer,
or where a result is wrong.
"""

import importlib
import importlib.util
import logging
import os
import shutil
import sys
from pathlib import Path

COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "clang++", "cl", "nvcc", "cmake", "zig")


def load(folder: Path) -> str:
    """Imports the pack under a name of its own; returns the name. ComfyUI's name is the folder's
    path, under which the nodes are imported too, so that is taken where ComfyUI is at hand.
    """
    comfyui = os.environ.get("COMFYUI_PATH")
    name = str(folder).replace(".", "_x_") if comfyui else "pack"
    if comfyui:
        sys.path.insert(0, comfyui)
        sys.argv = ["main.py", "--cpu"]
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("nodes")  # ComfyUI's own
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return name


def layers(name: str) -> None:
    """A W4A4 and a W4A16 layer, compared with plain torch."""
    import torch

    ops = importlib.import_module(f"{name}.kernels")
    native = importlib.import_module(f"{name}.kernels.backends.native")
    reference = importlib.import_module(f"{name}.kernels.reference")
    compiled, why = native.module()
    assert compiled is not None and compiled.kind == "library", why
    print(why)
    backend, words = ops.which("linear_w4a4", "cpu")
    assert backend == "native" and "library" in words, words
    torch.manual_seed(0)
    m, n, k, rank = 37, 128, 192, 32
    x = torch.randn(m, k)
    scales = torch.rand(k // 64, n) * 0.02 + 0.01
    weight = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)
    w4a4 = (
        torch.rand(k) + 0.5,
        weight,
        scales,
        torch.randn(k, rank) * 0.1,
        torch.randn(n, rank) * 0.1,
        torch.randn(n),
    )
    names = ("smooth_factor", "weight", "weight_scale", "proj_down", "proj_up", "bias")
    arguments = dict(zip(names, w4a4, strict=True))
    found = ops.linear_w4a4(x, **arguments)
    torch.testing.assert_close(found, reference.linear_w4a4(x, **arguments), rtol=1e-3, atol=1e-3)
    weights = {"weight": weight, "weight_scale": scales, "weight_zeros": None, "bias": None}
    found = ops.linear_w4a16(x, **weights)
    torch.testing.assert_close(found, reference.gemv_w4a16(x, **weights), rtol=1e-4, atol=1e-4)
    print(f"layers agree with plain torch; this CPU runs {', '.join(compiled.cpu_isas())}")


def no_compiler() -> None:
    there = [name for name in COMPILERS if shutil.which(name)]
    assert not there, f"PATH has {', '.join(there)}"


def main() -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    no_compiler()
    layers(load(Path(sys.argv[1]).resolve()))


if __name__ == "__main__":
    main()
