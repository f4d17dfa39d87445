"""What a skipped step is given: guesses of newer papers beside ours, at equal steps computed.

    python tests/bench/bench_cache_forecasts.py [--prompts 10] [--out FILE.json]

The demo FLUX in 16 and in 4 bits, Euler, 28 steps of FLUX's schedule (shift e^1.15); 14, 10 and 7
of them computed, evenly or where calibration found it best for a line. Velocities are guessed by

    hold, line, parabola    polynomials through the last computed ones
    Padé                    (a + b t) / (1 + c t) through the last three, entry by entry: the
      forecast of TC-Padé (arXiv 2603.02943), without its phases; where a pole is near, that is
      where it leaves the line by more than half of the line's own step, the line
    TACache                 (1 + a) v + b |v| u, a and b means of calibration for the step, u the
      last change's direction across v (arXiv 2605.16789)
    fitted                  accel/caching/fitted.py

dB: PSNR of pictures against those of all 28 steps, mean (least) over prompts that calibration has
not seen.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import numpy as np
import torch

import checkout  # noqa: F401
from bench import machine
from bench.cache.drawing import CALIBRATION_SEED, PROMPT_SEED, SEED, STEPS, scenes
from nibble.accel.caching import mask_search
from nibble.accel.caching.extrapolate import History, Reuse
from nibble.accel.caching.fitted import fit
from nibble.demo import metrics, pictures, prompts, run
from nibble.quant import diffusers as models
from nibble.quant.svdquant.recipe import Recipe

BUDGETS = (14, 10, 7)
DIMS = (1, 2, 3)
MU = math.exp(1.15)
TIMES = [MU / (MU + STEPS / (STEPS - i) - 1) for i in range(STEPS)] + [0.0]


class Pade(History):
    """By Thiele's continued fraction through three points."""

    def __init__(self) -> None:
        super().__init__(Reuse(2))

    def guess(self, time: float, like: torch.Tensor | None = None) -> torch.Tensor:
        line = History(Reuse(1))
        for node, value in zip(self.nodes, self.values, strict=True):
            line.store(node, value)
        guessed = line.guess(time)
        if len(self.nodes) < 3:
            return guessed
        (t0, t1, t2), (f0, f1, f2) = self.nodes, self.values
        first = (t1 - t0) / (f1 - f0)
        second = (t2 - t1) / ((t2 - t0) / (f2 - f0) - first)
        found = f0 + (time - t0) / (first + (time - t1) / second)
        near = (found - guessed).abs() <= 0.5 * (guessed - f2).abs()
        return torch.where(torch.isfinite(found) & near, found, guessed)


class TACache(History):
    """statistics: time → (a, b)."""

    def __init__(self, statistics: dict[float, tuple[float, float]]) -> None:
        super().__init__(Reuse(1))
        self.statistics = statistics

    def guess(self, time: float, like: torch.Tensor | None = None) -> torch.Tensor:
        along, across = self.statistics[time]
        v = self.values[-1]
        if len(self.values) < 2:
            return (1 + along) * v
        change = _across(v - self.values[-2], v)
        return (1 + along) * v + across * _size(v) * change / _size(change)


def _size(v: torch.Tensor) -> torch.Tensor:
    return v.square().sum(DIMS, keepdim=True).sqrt()


def _along(change: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (change * v).sum(DIMS, keepdim=True) / v.square().sum(DIMS, keepdim=True)


def _across(change: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return change - _along(change, v) * v


def statistics(mask: list[bool], known: torch.Tensor) -> dict[float, tuple[float, float]]:
    """Of uncached velocities (steps, prompts, …)."""
    found, last = {}, 0
    for i, wanted in enumerate(mask):
        if wanted:
            last = i
            continue
        change, v = known[i] - known[last], known[last]
        share = _size(_across(change, v)) / _size(v)
        found[TIMES[i]] = (_along(change, v).mean().item(), share.mean().item())
    return found


class Drawn:
    """Prompts that are drawn as one batch."""

    def __init__(self, flux: torch.nn.Module, texts: list[str], seed: int):
        self.flux, count = flux, len(texts)
        self.tokens, self.pooled = prompts.embed(prompts.word_indices(texts))
        draws = [torch.Generator().manual_seed(seed + i) for i in range(count)]
        self.noise = torch.cat([torch.randn(1, 16, 8, 8, generator=draw) for draw in draws])
        self.guidance = torch.full((count,), models.sample.GUIDANCE)

    @torch.no_grad()
    def __call__(self, mask: list[bool], history: History) -> torch.Tensor:
        x = self.noise
        for i, wanted in enumerate(mask):
            if wanted:
                history.store(TIMES[i], self._velocity(x, TIMES[i]))
            v = history.values[-1] if wanted else history.guess(TIMES[i])
            x = x + (TIMES[i + 1] - TIMES[i]) * v
        return x

    def _velocity(self, x: torch.Tensor, time: float) -> torch.Tensor:
        at = torch.full((len(x),), time)
        return models.velocity(self.flux, x, at, self.tokens, self.pooled, self.guidance)


def all_velocities(drawn: Drawn) -> torch.Tensor:
    """(steps, prompts, …) of a run without a cache."""
    history = History(Reuse(0))
    history.reuse = type("Everything", (Reuse,), {"kept": STEPS})(0)
    drawn([True] * STEPS, history)
    return torch.stack(history.values)


def rows_of(flux: torch.nn.Module, count: int) -> list[dict]:
    """Budgets x masks x guesses."""
    asked = scenes(PROMPT_SEED, count)
    known = all_velocities(Drawn(flux, scenes(CALIBRATION_SEED, 6, asked), CALIBRATION_SEED))
    flat = known.flatten(2).double()
    grams = torch.einsum("ipc,jpc->pij", flat, flat).numpy()
    grams /= np.einsum("pii->pi", grams).mean(1)[:, None, None]
    drawn, vae, rows = Drawn(flux, asked, SEED), pictures.load_vae(), []
    reference = pictures.decode(vae, drawn([True] * STEPS, History(Reuse(0))))
    for budget in BUDGETS:
        masks = {
            "even": mask_search.uniform(STEPS, budget),
            "searched": mask_search.search(budget, TIMES, grams, Reuse(1)),
        }
        for name, mask in masks.items():
            guesses = {
                "hold": History(Reuse(0)),
                "line": History(Reuse(1)),
                "parabola": History(Reuse(2)),
                "Padé": Pade(),
                "TACache": TACache(statistics(mask, known)),
                "fitted": History(fit(mask, TIMES, grams, Reuse(1))),
            }
            row = {"computed": budget, "steps": name}
            for guess, history in guesses.items():
                found = metrics.psnr(pictures.decode(vae, drawn(mask, history)), reference)
                row[guess] = [round(found.mean().item(), 2), round(found.min().item(), 2)]
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def quantized(folder: Path) -> torch.nn.Module:
    target = folder / "demo-4bit.safetensors"
    run.quantize(target, Recipe.from_preset("fast"))
    return models.load_quantized(target, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = Path(__file__).resolve().parent / "results"
    parser.add_argument("--out", type=Path, default=results / "cache-forecasts.json")
    parser.add_argument("--prompts", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = {"environment": machine.describe_cpu(), "prompts": options.prompts}
    with tempfile.TemporaryDirectory() as folder:
        facts["16-bit"] = rows_of(pictures.load_flux(), options.prompts)
        facts["4-bit"] = rows_of(quantized(Path(folder)), options.prompts)
    options.out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
