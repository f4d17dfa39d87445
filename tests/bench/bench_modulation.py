"""Modulation out of VRAM: bytes saved, what its products cost a CPU, and how often a step finds
them made: `python -m nibble bench modulation`.

    bytes   of the 4-bit modulation layers of FLUX.1 dev, from its shapes
    time    of all of them for one step, and for 28 steps at once (each weight read once), each
      route in turn in every round; in time of one core
            (the process's own, so that whoever else uses the machine hardly counts)
    run     28 steps and the same again through `ModulationCache`, at a share of FLUX's layers: how
      many steps found their results made, and how long the steps waited. Between two steps the
      caller sleeps for --step seconds, in the place of the GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import machine
from nibble.kernels import ops, which
from nibble.quant.files.architectures import plan, recognise
from nibble.quant.files.known_shapes import known_shapes
from nibble.quant.modulation.cpu_int4 import CpuInt4Matrix
from nibble.quant.modulation.precompute import LayerState, ModulationCache
from nibble.quant.svdquant.recipe import Recipe
from nibble.quant.weights.awq_w4a16 import W4A16Weight

STEPS = 28


def layers_of(model: str) -> list[tuple[int, int]]:
    """(N, K) of every modulation layer that can stay in RAM."""
    shapes = known_shapes(model)
    planned = plan(shapes, recognise(shapes, model), Recipe.from_preset("fast"), model)
    return [
        (layer.N, layer.K) for layer in planned if layer.action == "w4a16" and layer.N > layer.K
    ]


def stored(n: int, k: int) -> int:
    """Bytes of codes, scales and bias."""
    return n * k // 2 + 2 * (n * k // 64) + 2 * n


def matrix(n: int, k: int, seed: int = 0) -> W4A16Weight:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(-128, 128, (n, k // 2), generator=draw, dtype=torch.int8)
    return W4A16Weight(
        codes,
        (torch.rand(k // 64, n, generator=draw) * 0.01).bfloat16(),
        None,
        torch.zeros(n, dtype=torch.bfloat16),
    )


def timed(calls: dict, rounds: int) -> dict[str, float]:
    """Milliseconds of processor time, the least of the rounds, in each of which every call takes
    its turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    return {name: 1e3 * min(found[1:]) for name, found in seconds.items()}


def products(shapes: list[tuple[int, int]], rounds: int, copies: int) -> dict:
    """Milliseconds of all layers, from one layer of each shape (several copies of it, so that no
    cache holds them).
    """
    found: dict[str, dict[str, float]] = {}
    for n, k in sorted(set(shapes)):
        weights, count = [matrix(n, k, seed) for seed in range(copies)], shapes.count((n, k))
        packed, dense = (
            [CpuInt4Matrix(w, torch.bfloat16) for w in weights],
            [torch.randn(n, k).bfloat16() for _ in range(copies)],
        )
        for m in (1, STEPS):
            x = torch.randn(m, k).bfloat16()
            calls = {
                "nibble": lambda x=x, all=weights: [
                    ops.linear_w4a16(x, w.qweight, w.scale, None, w.bias) for w in all
                ],
                "torch 4-bit": lambda x=x, all=packed: [p.product(x) for p in all],
                "torch bfloat16": lambda x=x, all=dense: [
                    torch.nn.functional.linear(x, d) for d in all
                ],
            }
            for name, ms in timed(calls, rounds).items():
                row = found.setdefault(name, {})
                row[f"{m} step{'s' * (m > 1)}"] = (
                    row.get(f"{m} step{'s' * (m > 1)}", 0.0) + ms / copies * count
                )
    return found


class Layer:
    """One of the cache's layers."""

    def __init__(self, name: str, n: int, k: int, seed: int):
        self.name, self.in_features, self.out_features, self._packed = (
            name,
            k,
            n,
            CpuInt4Matrix(matrix(n, k, seed), torch.bfloat16),
        )

    def state(self) -> LayerState:
        """Nothing changes it."""
        return LayerState(())

    def compute(self, rows: torch.Tensor, fast: bool, state: LayerState) -> torch.Tensor:
        return self._packed.product(rows)


class Network:
    """Turns timestep and pooled text into a vector that every layer reads; a step of it takes
    `seconds`.
    """

    def __init__(self, cache: ModulationCache, hidden: int, seconds: float):
        self.cache, self.seconds = cache, seconds
        self.embed = torch.randn(1, hidden).bfloat16()

    def original(self, x, timestep, context, y, transformer_options=None):
        vector = (timestep[:, None] * self.embed + y).bfloat16()
        return [self.cache.output(layer, vector) for layer in self.cache.layers]

    def __call__(self, *args, **kwargs):
        out = self.original(*args, **kwargs)
        time.sleep(self.seconds)
        return out


def run(shapes: list[tuple[int, int]], share: int, seconds: float) -> dict:
    """Hits and waits of two runs of 28 steps, on every share-th layer."""
    cache = ModulationCache(lambda sigmas: sigmas)
    cache.layers += [Layer(f"blocks.{i}", n, k, i) for i, (n, k) in enumerate(shapes[::share])]
    network, y, sigmas = (
        Network(cache, shapes[0][1], seconds),
        torch.randn(1, shapes[0][1]),
        torch.linspace(1, 0, STEPS + 1),
    )
    runs = []
    with torch.no_grad():
        for _ in range(2):
            before, waits = (cache.steps, cache.hits), []
            for sigma in sigmas[:-1]:
                began = time.perf_counter()
                cache.around(
                    network,
                    torch.zeros(1, 16, 64, 64),
                    sigma.reshape(1),
                    torch.zeros(1),
                    y,
                    transformer_options={"sample_sigmas": sigmas},
                )
                waits.append(max(0.0, time.perf_counter() - began - seconds))
            runs.append(
                {
                    "steps": STEPS,
                    "ready": cache.hits - before[1],
                    "wait_ms": {
                        "first": 1e3 * waits[0],
                        "second": 1e3 * waits[1],
                        "others, median": 1e3 * statistics.median(waits[2:]),
                    },
                }
            )
    return {
        "layers": len(cache.layers),
        "of": len(shapes),
        "step_seconds": seconds,
        "products": cache.computed,
        "runs": runs,
    }


def report(found: dict) -> None:
    size = found["bytes"]
    print(
        f"FLUX.1 dev: {size['layers']} modulation layers, {size['weights'] / 1e9:.3f} GB out of"
        f" VRAM for {size['a_step'] / 1e6:.2f} MB a step"
    )
    for name, row in found["time_ms"].items():
        print(
            f"  {name:16}"
            + "".join(f"{steps:>10} {ms:8.0f} ms" for steps, ms in row.items())
            + f"   ({row['28 steps'] / 28:.0f} ms a step of 28)"
        )
    for number, row in enumerate(found["run"]["runs"], 1):
        waits = ", ".join(f"{name} {ms:.0f} ms" for name, ms in row["wait_ms"].items())
        print(
            f"  run {number} ({found['run']['layers']} of {found['run']['of']} layers):"
            f" {row['ready']} of {row['steps']} steps found their results made; waits: {waits}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parent / "results" / "modulation.json"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--copies",
        type=int,
        default=3,
        help="of each layer, so that none stays in a cache (default: %(default)s)",
    )
    parser.add_argument(
        "--share",
        type=int,
        default=12,
        help="every so many-th layer in the run (default: %(default)s)",
    )
    parser.add_argument(
        "--step",
        type=float,
        default=0.3,
        help="seconds of a step without its modulation (default: %(default)s)",
    )
    options = parser.parse_args()
    shapes = layers_of("flux1-dev")
    found = {
        "environment": machine.describe_cpu() | {"gemv_w4a16": which("gemv_w4a16", "cpu")},
        "bytes": {
            "layers": len(shapes),
            "weights": sum(stored(n, k) for n, k in shapes),
            "a_step": 2 * sum(n for n, _ in shapes),
        },
        "time_ms": products(shapes, options.rounds, options.copies),
        "run": run(shapes, options.share, options.step),
    }
    report(found)
    options.out.write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
