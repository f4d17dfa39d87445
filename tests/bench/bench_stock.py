"""Fidelity of whole pictures in the formats that stock ComfyUI opens: the demo model drawn in 16
bit, with each format as comfy-kitchen's own codec makes it (no data), and as Nibble's presets do.

    python tests/bench/bench_stock.py

Needs comfy-kitchen, whose layouts decode both. Activations take the same trip through 8 or 4 bits,
in float32. Modulation layers stay in 16 bit, so that codecs are compared on equal terms; what they
lose in the same format is the row "best, all".
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import checkout  # noqa: F401
from bench.stock_formats import Made, in_format, layers_of, of_kitchen
from nibble.demo import metrics, pictures, run
from nibble.quant.files.source import Source
from nibble.quant.svdquant.stock.formats import FORMATS
from nibble.quant.svdquant.stock.recipe import StockRecipe

RESULTS = Path(__file__).resolve().parent / "results"


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
        blocks, everything = layers_of(source, kept), layers_of(source, best)
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
            model = in_format(FORMATS[name], layers, make())
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
