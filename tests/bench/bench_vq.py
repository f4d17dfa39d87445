"""Vector quantization of the demo model: pictures, bytes, time and memory at 4, 3 and 2 bits, and
what FLUX.1 would cost.

    python tests/bench/bench_vq.py [--arms "best 3" "round to nearest 2" …]

Each arm runs in a process of its own (its peak memory is its own) and is written down as soon as it
is there. Weights alone are quantized, of the same layers in all arms; round to nearest has groups
of 64 with a 16-bit scale each (0.25 bits a weight more than its name says), OrbitQuant a norm a
row. "best, equal bits" is the preset without mixed bits. Prompts for calibration are drawn at
random and are not those that are scored; "on noise" means random conditioning instead. FLUX.1 is
extrapolated from single layers of its shapes, by weights; closed form only.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import baselines
from nibble.demo import pictures, run
from nibble.quant import diffusers as models
from nibble.quant.calibration import recorder
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.files.known_shapes import known_shapes
from nibble.quant.files.source import Source
from nibble.quant.vq4dit import fit as fitting
from nibble.quant.vq4dit import quantize as pipeline
from nibble.quant.vq4dit.recipe import Recipe
from nibble.quant.weights.packing import dequantize_groups, group_absmax, quantize_groups

GROUP = 64
RESULTS = Path(__file__).resolve().parent / "results"
ARMS = [
    "16-bit",
    "best 3",
    "best 2",
    *(f"round to nearest {bits}" for bits in (4, 3, 2)),
    *(f"OrbitQuant {bits}" for bits in (4, 3, 2)),
    "round to nearest, a scale a row 4",
    "k-means 2",
    "k-means 3",
    "fast 2",
    "fast 3",
    "vq4dit 2",
    "vq4dit 3",
    "k-means 4",
    "fast 4",
    "best on noise 3",
    "best on noise 2",
    "best 4",
    "best, equal bits 3",
    "best, equal bits 2",
]
FLUX_LAYERS = ["fast", "best"]


def changes(kind: str) -> tuple[str, dict]:
    """(preset, changes) of an arm."""
    return {
        "k-means": ("fast", {"scaled": False, "turns": 0}),
        "best on noise": ("best", {}),
        "best, equal bits": ("best", {"mixed": False}),
    }.get(kind, (kind, {}))


def round_to_nearest(weight: torch.Tensor, bits: int, group: int = GROUP) -> torch.Tensor:
    """Rounded with a scale for each group of weights, or for each row (group 0)."""
    top = 2 ** (bits - 1) - 1
    scale = group_absmax(weight) / top
    scale = scale if group else scale.amax(0, keepdim=True).expand_as(scale)
    return dequantize_groups(quantize_groups(weight, scale).clamp(-top, top), scale)


# weights (N, K) and bits → what they become, and the weights that share a scale (0: a row)
ROUNDED: dict[str, tuple[Callable[[torch.Tensor, int], torch.Tensor], int]] = {
    "round to nearest": (round_to_nearest, GROUP),
    "round to nearest, a scale a row": (partial(round_to_nearest, group=0), 0),
    "OrbitQuant": (baselines.orbitquant, 0),
}


def rounded(kind: str, bits: int) -> tuple[torch.nn.Module, int]:
    """The demo FLUX with the layers that codewords would replace rounded in one of these ways, and
    the bytes that it would take.
    """
    change, group = ROUNDED[kind]
    source, flux = Source(pictures.FLUX_FILE), pictures.load_flux()
    modules, size = recorder.find_linears(flux), source.bytes
    target = pictures.FLUX_FILE.with_name("rounded.safetensors")  # never written
    with torch.no_grad():
        job = pipeline.VQJob.prepare(source, target, Recipe.from_preset("fast"))
        for layer in job.layers:
            if layer.action == "keep":
                continue
            scales = layer.K // group if group else 1
            size += layer.N * (layer.K * bits // 8 + scales * 2) - 2 * layer.N * layer.K
            for part in models.diffusers_parts(layer.name):
                modules[part].weight.copy_(change(modules[part].weight, bits))
    return flux, size


def one(name: str, options: argparse.Namespace) -> dict:
    """An arm's row."""
    kind, _, bits = name.rpartition(" ")
    began = time.process_time()
    row = {"arm": name, "prompts": options.prompts, "seeds": options.seeds}
    if name == "16-bit":
        model, size = pictures.load_flux(), pictures.FLUX_FILE.stat().st_size
    elif kind in ROUNDED:
        model, size = rounded(kind, int(bits))
    else:
        preset, other = changes(kind)
        recipe, target = (
            Recipe.from_preset(preset, bits=int(bits), **other),
            options.scratch / f"demo-{name.replace(' ', '-')}.safetensors",
        )
        target.unlink(missing_ok=True)
        report = run.quantize(target, recipe, zero_data=kind == "best on noise" or preset != "best")
        model, size = models.load_quantized(target, torch.float32), target.stat().st_size
        row |= {
            "bits_per_weight": _bits(report),
            "layer_db_median": sorted(report.decibels())[len(report.decibels()) // 2],
        }
        target.unlink()
    row |= {
        "bytes": size,
        "cpu_seconds": time.process_time() - began,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    full = _full(options)
    drawn, _ = run.draw(model, pictures.load_vae(), options.prompts, range(options.seeds))
    if options.sheet:
        run.side_by_side([drawn[:: options.seeds]], columns=10).save(options.sheet)
    return row | run.compare(drawn, full, options.prompts, range(options.seeds))


def _full(options: argparse.Namespace) -> torch.Tensor:
    """The 16-bit pictures, drawn once for all arms and kept in `options.scratch` between them."""
    cached = options.scratch / f"16-bit-{options.prompts}x{options.seeds}.safetensors"
    if not cached.exists():
        drawn, _ = run.draw(
            pictures.load_flux(), pictures.load_vae(), options.prompts, range(options.seeds)
        )
        save_file({"pictures": drawn.contiguous()}, cached)
    return load_file(cached)["pictures"]


def _bits(report) -> float:
    """Bytes of the layers of codewords over their weights."""
    shapes = Source(pictures.FLUX_FILE).shapes
    rows = [row for row in report.rows if row.action == "vq"]
    return (
        8
        * sum(row.bytes_after for row in rows)
        / sum(math.prod(shapes[f"{row.name}.weight"]) for row in rows)
    )


def flux_layer(preset: str, bits: int, n: int, k: int) -> dict:
    """Seconds and memory of one layer of FLUX.1's shape in closed form, and what all its layers
    would take.
    """
    generator = torch.Generator().manual_seed(0)
    recipe, weight = (
        Recipe.from_preset(preset, bits=bits),
        torch.randn(n, k, generator=generator) * 0.02,
    )
    stats = None
    if preset == "best":
        stats = InputStats.empty(k)
        stats.update(torch.randn(2048, k, generator=generator))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    fitting.fit(weight, None, stats, recipe.layer_options(recipe.layout((n, k))), generator)
    seconds = time.process_time() - began
    planned = pipeline.predict(known_shapes("flux1-dev"), recipe, "flux1-dev")
    weights = sum(
        math.prod(known_shapes("flux1-dev")[f"{row.name}.weight"])
        for row in planned.rows
        if row.action == "vq"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "arm": f"FLUX.1 {preset} {bits}",
        "shape": [n, k],
        "layer_cpu_seconds": seconds,
        "layer_peak_mb": peak / 1024,
        "layer_extra_mb": (peak - before) / 1024,
        "all_layers_hours_one_core": seconds * weights / (n * k) / 3600,
        "file_bytes": planned.bytes_after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "vq.json")
    parser.add_argument("--arms", nargs="*", default=ARMS)
    parser.add_argument(
        "--flux",
        nargs="*",
        default=[f"{preset} {bits}" for preset in FLUX_LAYERS for bits in (2, 3)],
        help="layers of FLUX.1 to time",
    )
    parser.add_argument("--flux-shape", type=int, nargs=2, default=(3072, 3072))
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--sheet", type=Path, help="with --one: also write the pictures")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:  # what arms share, and their quantized files
        options.scratch = options.scratch or Path(scratch)
        if options.one:
            print("ROW " + json.dumps(one_row(options)))
        else:
            run_arms(options)


def one_row(options: argparse.Namespace) -> dict:
    """The row of the arm `options.one`."""
    if not options.one.startswith("FLUX.1"):
        return one(options.one, options)
    preset, _, bits = options.one.removeprefix("FLUX.1 ").rpartition(" ")
    return flux_layer(preset, int(bits), *options.flux_shape)


def run_arms(options: argparse.Namespace) -> None:
    """Each arm in a process of its own; its row replaces the older one of the same name."""
    facts = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in [*options.arms, *(f"FLUX.1 {arm}" for arm in options.flux)]:
        command = [
            sys.executable,
            __file__,
            "--one",
            name,
            "--out",
            str(options.out),
            "--scratch",
            str(options.scratch),
            "--prompts",
            str(options.prompts),
            "--seeds",
            str(options.seeds),
            "--flux-shape",
            *map(str, options.flux_shape),
        ]
        printed = subprocess.run(command, capture_output=True, text=True)
        if printed.returncode:
            sys.exit(printed.stderr[-3000:])
        row = json.loads(
            next(line for line in printed.stdout.splitlines() if line.startswith("ROW "))[4:]
        )
        facts["rows"] = [kept for kept in facts["rows"] if kept["arm"] != name] + [row]
        options.out.write_text(json.dumps(facts, indent=1) + "\n")
        print(
            {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in row.items()
            },
            flush=True,
        )


if __name__ == "__main__":
    main()
