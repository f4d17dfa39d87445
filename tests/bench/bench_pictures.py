"""Fidelity of whole pictures: the demo model drawn in 16 bit, and with its linears at 4 bits by
several methods, same prompts and noise.

    python tests/bench/bench_pictures.py

Where the compiled kernels are installed, our model is drawn once more in plain torch: how much
faster they are, and how close the pictures. Round-to-nearest W4A4, comfy-kitchen's convrot_w4a4
and, where it is installed, its codecs of ComfyUI's own formats quantize exactly the linears that
our own presets quantize to W4A4, and leave the others (modulation, embedders, final layer) in 16
bit, which favours them.
"""

import argparse
import json
import sys
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import stock_formats
from bench.baselines import BASELINES, Lambda
from nibble.demo import metrics, pictures, run
from nibble.kernels import which
from nibble.kernels.backends import native
from nibble.quant import diffusers as models
from nibble.quant.calibration import recorder
from nibble.quant.files.architectures import plan, recognise
from nibble.quant.files.source import Source
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights import linears
from plain import plain_torch

RESULTS = Path(__file__).resolve().parent / "results"


def baseline(name: str) -> torch.nn.Module:
    """The demo FLUX with every W4A4 linear of our plan replaced by a baseline's."""
    source = Source(pictures.FLUX_FILE)
    layers = plan(
        source.shapes,
        recognise(source.shapes, source.name),
        Recipe.from_preset("fast"),
        source.name,
    )
    flux = pictures.load_flux()
    found = recorder.find_linears(flux)
    for layer in (layer for layer in layers if layer.action == "w4a4"):
        for part in models.diffusers_parts(layer.name):
            linears.replace(
                flux,
                part,
                Lambda(BASELINES[name](found[part].weight.detach(), found[part].bias.detach())),
            )
    return flux


def ours(preset: str, folder: Path, **changes) -> torch.nn.Module:
    """The demo FLUX quantized by a preset with changes, through the file and back."""
    target = folder / f"demo-{'-'.join([preset, *map(str, changes.values())])}.safetensors"
    run.quantize(target, Recipe.from_preset(preset, **changes))
    return models.load_quantized(target, torch.float32)


def through_plain_torch(
    model: torch.nn.Module, vae, drawn: torch.Tensor, seconds: float, options: argparse.Namespace
) -> dict:
    """Our model once more without the compiled kernels: {"times_as_fast", "sampling_seconds",
    "psnr" and "worst_psnr" between the two}.
    """
    with plain_torch():
        plain, slow = run.draw(model, vae, options.prompts, range(options.seeds))
    each = metrics.psnr(drawn, plain)
    return {
        "times_as_fast": slow / seconds,
        "sampling_seconds": slow,
        "psnr": each.median().item(),
        "worst_psnr": each.min().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "pictures.json")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument(
        "--sheet", type=Path, help="also write the pictures as one PNG, a method a row"
    )
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    vae, seeds = pictures.load_vae(), range(options.seeds)
    full, sampling = run.draw(pictures.load_flux(), vae, options.prompts, seeds)
    rows, sheet = (
        [
            {"method": "16-bit", "sampling_seconds": sampling}
            | run.compare(full, full, options.prompts, seeds)
        ],
        [full],
    )
    makers = {
        "round-to-nearest W4A4": lambda: baseline("rtn"),
        "convrot_w4a4": lambda: baseline("convrot"),
        **{
            f"comfy-kitchen {name}": partial(stock_formats.rival, name)
            for name in stock_formats.LAYOUTS
            if find_spec("comfy_kitchen")
        },
        "nibble fast": lambda: ours("fast", options.out.parent),
        "nibble best": lambda: ours("best", options.out.parent),
        "nibble fast, W4A8": lambda: ours("fast", options.out.parent, act_bits=8),
        "nibble best, W4A8": lambda: ours("best", options.out.parent, act_bits=8),
        "nibble best, svdquant_w4a8": lambda: ours(
            "best", options.out.parent, format="svdquant_w4a8"
        ),
        "nibble best, svdquant_nvfp4": lambda: ours(
            "best", options.out.parent, format="svdquant_nvfp4"
        ),
    }
    for name, make in makers.items():
        start = time.perf_counter()
        model = make()
        drawn, sampling = run.draw(model, vae, options.prompts, seeds)
        seconds = {"seconds": time.perf_counter() - start, "sampling_seconds": sampling}
        rows.append({"method": name} | seconds | run.compare(drawn, full, options.prompts, seeds))
        sheet.append(drawn)
        if name.startswith("nibble") and native.module()[0] is not None:
            rows[-1]["plain_torch"] = through_plain_torch(model, vae, drawn, sampling, options)
        print(
            {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in rows[-1].items()
            }
        )
    for path in options.out.parent.glob("demo-*.safetensors"):
        path.unlink()
    facts = {
        "command": " ".join(sys.argv),
        "prompts": options.prompts,
        "seeds": options.seeds,
        "steps": 12,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "linear_w4a4": which("linear_w4a4", "cpu", torch.float32)[1],
        "rows": rows,
    }
    options.out.write_text(json.dumps(facts, indent=1) + "\n")
    if options.sheet:
        run.side_by_side([row[:: options.seeds] for row in sheet], columns=10).save(options.sheet)


if __name__ == "__main__":
    main()
