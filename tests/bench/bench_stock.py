"""Fidelity of whole pictures in the formats that stock ComfyUI opens: the demo model drawn in 16
bit, with each format as comfy-kitchen's own codec makes it (no data), and as Nibble's presets do.

    python tests/bench/bench_stock.py

Needs comfy-kitchen, whose layouts decode both. Activations take the same trip through 8 or 4 bits,
in float32. Modulation layers stay in 16 bit, so that codecs are compared on equal terms; what they
lose in the same format is the row "best, all".
"""

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import checkout  # noqa: F401
from bench.bench_pictures import Lambda
from nibble.demo import metrics, pictures, run
from nibble.quant import diffusers as models
from nibble.quant.calibration import recorder
from nibble.quant.files.source import Source
from nibble.quant.svdquant.stock.formats import FORMATS, StockFormat
from nibble.quant.svdquant.stock.quantize import StockJob
from nibble.quant.svdquant.stock.recipe import StockRecipe
from nibble.quant.weights import linears

RESULTS = Path(__file__).resolve().parent / "results"
# of comfy-kitchen, and how its codec is asked for the format
LAYOUTS: dict[str, tuple[str, dict]] = {
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", {}),
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
}
Made = Callable[[str], tuple[torch.Tensor, torch.Tensor]]  # a layer's weight (N, K) and bias


def drawn_with(form: StockFormat, names: list[str], made: Made) -> torch.nn.Module:
    """The demo FLUX with these linears in a format."""
    flux = pictures.load_flux()
    found = recorder.find_linears(flux)
    for name in names:
        weight, bias = made(name)
        if name.startswith("final_layer"):  # diffusers has scale before shift
            weight, bias = (torch.cat(t.chunk(2)[::-1]) for t in (weight, bias))
        weight, start = form.rotated(weight), 0
        for part in models.diffusers_parts(name):
            rows = slice(start, start + recorder.outputs(found[part]))
            linears.replace(flux, part, Lambda(_linear(form, weight[rows], bias[rows])))
            start = rows.stop
    return flux


def _linear(form: StockFormat, weight: torch.Tensor, bias: torch.Tensor):
    def forward(x: torch.Tensor) -> torch.Tensor:
        seen = form.activations(form.rotated(x.reshape(-1, x.shape[-1])))
        return torch.nn.functional.linear(seen, weight, bias).reshape(*x.shape[:-1], -1)

    return forward


def _layers(source: Source, recipe: StockRecipe) -> list[str]:
    """The layers that a recipe quantizes."""
    return StockJob.prepare(source, "planned.safetensors", recipe).quantized_names


def of_kitchen(name: str, source: Source) -> Made:
    """Weights through comfy-kitchen's codec and back."""
    layout_name, options = LAYOUTS[name]
    layout = getattr(importlib.import_module("comfy_kitchen.tensor"), layout_name)

    def made(layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = source.weight(layer)
        decoded = layout.dequantize(*layout.quantize(weight, **options))
        return decoded[: weight.shape[0]], source.bias(layer)

    return made


def of_file(path: Path, recipe: StockRecipe) -> Made:
    """Weights of a file made by a recipe, read by comfy-kitchen's layouts."""
    path.unlink(missing_ok=True)
    run.quantize(path, recipe)
    return opened(path)


def opened(path: Path) -> Made:
    """Weights of a file."""
    file = Source(path)
    return lambda layer: (file.weight(layer), file.bias(layer))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "stock.json")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--methods", nargs="+", help="of the rows; by default all")
    options = parser.parse_args()
    vae, seeds = pictures.load_vae(), range(options.seeds)
    full, _ = run.draw(pictures.load_flux(), vae, options.prompts, seeds)
    source, rows = Source(pictures.FLUX_FILE), []
    for name in options.formats:
        best = StockRecipe.from_preset("best", format=name)
        kept = StockRecipe.from_preset("best", format=name, modulation="keep")
        blocks, everything = _layers(source, kept), _layers(source, best)
        path = options.out.with_name(f"demo-{name}.safetensors")
        fast = StockRecipe.from_preset("fast", format=name)
        makers: dict[str, tuple[list[str], Callable[[], Made]]] = {
            "comfy-kitchen": (blocks, lambda name=name: of_kitchen(name, source)),
            "nibble fast": (blocks, lambda fast=fast, path=path: of_file(path, fast)),
            "nibble best": (blocks, lambda best=best, path=path: of_file(path, best)),
            "nibble best, all": (everything, lambda path=path: opened(path)),
        }
        for method, (layers, make) in makers.items():
            if options.methods and method not in options.methods:
                continue
            start = time.perf_counter()
            model = drawn_with(FORMATS[name], layers, make())
            drawn, _ = run.draw(model, vae, options.prompts, seeds)
            each = metrics.psnr(drawn, full)
            rows.append(
                {
                    "format": name,
                    "method": method,
                    "psnr": round(each.mean().item(), 2),
                    "worst_psnr": round(each.min().item(), 2),
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            print(rows[-1], flush=True)
        path.unlink(missing_ok=True)
    facts = {
        "command": " ".join(sys.argv),
        "prompts": options.prompts,
        "seeds": options.seeds,
        "steps": 12,
        "torch": torch.__version__,
        "rows": rows,
    }
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
