"""What activations of 8 bits and finer weights are worth: the demo model drawn in 16 bit and from
files of each kind, same prompts and noise, with the bits that a weight of a W4A4 or W4A8 layer
takes, all in (codes, scales, table, smoothing, low-rank branch).

    python tests/bench/bench_w4a8.py [ROW ...]

A row is a preset and changes of its recipe, as in best,format=svdquant_w4a8,rank=0; run=8 loads the
file with activations of another width than it was fitted for. The demo's layers are narrow, so that
a branch of rank 32 takes 2.5 bits a weight there and a quarter of one in FLUX.1: `bits_flux` has
the same recipe's bits for FLUX.1's shapes.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from nibble.demo import metrics, pictures, run
from nibble.quant import diffusers as models
from nibble.quant.files.architectures import plan, recognise
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.known_shapes import known_shapes
from nibble.quant.files.safetensors import TensorSpec
from nibble.quant.svdquant.quantize import layout
from nibble.quant.svdquant.recipe import Recipe

RESULTS = Path(__file__).resolve().parent / "results"
W4A4, W4A8 = "svdquant_w4a4", "svdquant_w4a8"
ROWS = (
    "fast",
    "fast,run=8",
    "fast,act_bits=8",
    f"fast,format={W4A8}",
    f"fast,format={W4A8},group=16,rank=0",
    "best",
    "best,run=8",
    "best,act_bits=8",
    "best,act_bits=8,run=4",
    f"best,format={W4A8}",
    f"best,format={W4A8},group=16,rank=0",
    f"best,format={W4A8},group=32,rank=0",
    f"best,format={W4A8},group=16,rank=0,modulation=keep",
    f"best,format={W4A8},group=32,rank=0,modulation=keep",
)


def parsed(row: str) -> tuple[Recipe, int | None]:
    """(recipe, width of the activations to run with where it is not the recipe's)."""
    preset, *changes = row.split(",")
    options: dict[str, str | int] = {}
    for change in changes:
        name, value = change.split("=")
        options[name] = int(value) if value.isdigit() else value
    runs = options.pop("run", None)
    assert runs is None or isinstance(runs, int)
    return Recipe.from_preset(preset, **options), runs


def bits_of(specs: Iterable[TensorSpec], layers: set[str]) -> float:
    """Bits a weight of some layers, but for biases and JSON."""
    bits = weights = 0
    for spec in specs:
        layer, _, suffix = spec.name.rpartition(".")
        if layer in layers and suffix not in ("bias", "comfy_quant"):
            bits += 8 * spec.nbytes
            weights += 2 * math.prod(spec.shape) if suffix == "weight" else 0
    return round(bits / weights, 3)


def flux_bits(recipe: Recipe) -> float:
    """The same recipe's bits a weight for FLUX.1-dev's shapes."""
    shapes = known_shapes("flux1-dev")
    assert shapes is not None
    layers = plan(shapes, recognise(shapes, "flux1-dev"), recipe, "flux1-dev")
    kind = {"w4a4": recipe.format, "group": recipe.group}
    specs = layout(shapes, layers, recipe.rank, **kind)
    return bits_of(specs, {layer.name for layer in layers if layer.action == "w4a4"})


def with_activations(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """The model, its W4A4 layers running with activations of so many bits."""
    for module in model.modules():
        facts = getattr(module, "facts", None)
        if isinstance(facts, dict) and facts.get("format") == W4A4:
            module.facts = facts | {"act_bits": bits}
    return model


def measured(row: str, full: torch.Tensor, folder: Path, options: argparse.Namespace) -> dict:
    recipe, runs = parsed(row)
    target = folder / "demo.safetensors"
    target.unlink(missing_ok=True)
    report = run.quantize(target, recipe)
    file = open_quantized(target)
    ours = {name for name, facts in file.layers.items() if facts["format"] in (W4A4, W4A8)}
    specs = [spec for name in ours for spec in file.specs(name)]
    model = models.load_quantized(target, torch.float32)
    model = model if runs is None else with_activations(model, runs)
    drawn, _ = run.draw(model, pictures.load_vae(), options.prompts, range(options.seeds))
    each, decibels = metrics.psnr(drawn, full), sorted(report.decibels(("w4a4",)))
    return {
        "row": row,
        "psnr": round(each.mean().item(), 2),
        "worst": round(each.min().item(), 2),
        "layer_db": decibels[len(decibels) // 2],
        "bits_demo": bits_of(specs, ours),
        "bits_flux": flux_bits(recipe),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", default=ROWS, metavar="ROW")
    parser.add_argument("--out", type=Path, default=RESULTS / "w4a8.json")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    options = parser.parse_args()
    seeds = range(options.seeds)
    full, _ = run.draw(pictures.load_flux(), pictures.load_vae(), options.prompts, seeds)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in options.rows:
            rows.append(measured(row, full, Path(folder), options))
            print(rows[-1], flush=True)
    facts = {"prompts": options.prompts, "seeds": options.seeds, "steps": 12}
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
