"""ComfyUI's own library in this process, on the CPU, and a FLUX small enough to quantize in
a test.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

COMFYUI = os.environ.get("COMFYUI_PATH", "")


def _start_comfyui() -> None:
    """Puts ComfyUI on the path and makes it use the CPU, once a process."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_launch", Path(__file__).parent.parent / "comfyui" / "launch.py"
    )
    launch = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launch)
    launch.make_torchvision_importable()
    sys.path.insert(0, COMFYUI)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    import comfy.sd  # noqa: F401  (its import order matters: it must come before its submodules)


if COMFYUI:
    _start_comfyui()


def pytest_ignore_collect(collection_path):
    """Without ComfyUI these modules cannot be imported; test_comfyui_found.py says so aloud."""
    return True if not COMFYUI and collection_path.name.startswith("test_bridge") else None


HIDDEN, CONTEXT = 128, 64


def flux_shapes(
    hidden: int = HIDDEN, double: int = 1, single: int = 2, context: int = CONTEXT
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a FLUX with a guidance embedder, as Black Forest Labs names them."""
    mlp = 4 * hidden
    linears = {
        "img_in": (hidden, 64),
        "txt_in": (hidden, context),
        "final_layer.linear": (64, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }
    for name, width in {"time_in": 256, "guidance_in": 256, "vector_in": context}.items():
        linears |= {f"{name}.in_layer": (hidden, width), f"{name}.out_layer": (hidden, hidden)}
    norms = []
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            linears |= {
                f"{block}_mod.lin": (6 * hidden, hidden),
                f"{block}_attn.qkv": (3 * hidden, hidden),
                f"{block}_attn.proj": (hidden, hidden),
                f"{block}_mlp.0": (mlp, hidden),
                f"{block}_mlp.2": (hidden, mlp),
            }
            norms += [f"{block}_attn.norm.query_norm.scale", f"{block}_attn.norm.key_norm.scale"]
    for i in range(single):
        block = f"single_blocks.{i}"
        linears |= {
            f"{block}.modulation.lin": (3 * hidden, hidden),
            f"{block}.linear1": (3 * hidden + mlp, hidden),
            f"{block}.linear2": (hidden, hidden + mlp),
        }
        norms += [f"{block}.norm.query_norm.scale", f"{block}.norm.key_norm.scale"]
    shapes = {f"{name}.weight": shape for name, shape in linears.items()} | {
        f"{name}.bias": shape[:1] for name, shape in linears.items()
    }
    return shapes | {name: (128,) for name in norms}


def flux_state(seed: int = 0, **sizes) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights of that FLUX, scaled so that signals neither die nor grow."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        if name.endswith("scale"):
            return torch.ones(shape)
        return torch.randn(shape, generator=generator) * (
            0.02 if len(shape) == 1 else 0.7 / shape[1] ** 0.5
        )

    return {name: draw(name, shape).bfloat16() for name, shape in flux_shapes(**sizes).items()}


@pytest.fixture(scope="session")
def flux_file(tmp_path_factory) -> Path:
    """A random 16-bit FLUX as a file."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("models") / "random-flux.safetensors"
    save_file(flux_state(), path)
    return path


def quantize(source: Path, name: str, **options) -> Path:
    """A 4-bit file beside the source, made by the pipeline."""
    from nibble.quant.svdquant.quantize import quantize_checkpoint
    from nibble.quant.svdquant.recipe import Recipe

    quantize_checkpoint(
        source, source.with_name(name), Recipe.from_preset("fast", rank=16, solver="svd", **options)
    )
    return source.with_name(name)


@pytest.fixture(scope="session")
def quantized_file(flux_file) -> Path:
    """The same FLUX at 4 bits, with unsigned inputs behind its GELUs."""
    return quantize(flux_file, "unsigned.safetensors", rotation="off")


@pytest.fixture(scope="session")
def rotated_file(flux_file) -> Path:
    """The same FLUX at 4 bits, rotated."""
    return quantize(flux_file, "rotated.safetensors", rotation="on")


@pytest.fixture
def model(quantized_file):
    """The quantized FLUX as ComfyUI's model patcher, fresh for each test."""
    from nibble.nodes.bridge.quantized import loading

    return loading.load(quantized_file)


@pytest.fixture
def dense_model(flux_file):
    """The 16-bit FLUX as ComfyUI loads it."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(flux_file))
