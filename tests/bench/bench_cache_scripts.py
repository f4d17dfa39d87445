"""Caching in scripts beside diffusers' own hooks and cache-dit: the demo FLUX as diffusers'
transformer, 28 Euler steps, PSNR against the same pictures without a cache.

    python tests/bench/bench_cache_scripts.py [--prompts 6] [--seeds 2] [--out FILE.json]

computed: attention layers that were computed, as a share of all, counted at their first Linear; so
whoever computes some layers at every step is charged for them. seconds: of a batch of one, beside
those without a cache. cache-dit's rows need it installed (it wants transformers).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import diffusers
import torch
from diffusers import FirstBlockCacheConfig, TaylorSeerCacheConfig

import checkout  # noqa: F401
from bench import machine
from nibble import api
from nibble.demo import metrics, pictures, prompts
from nibble.quant import diffusers as models

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = 28


class Pipeline:
    """The demo drawn as FluxPipeline does, whose text encoders it has none of."""

    def __init__(self) -> None:
        self.transformer = pictures.load_flux()
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=math.exp(pictures.SHIFT))

    @torch.no_grad()
    def __call__(self, prompt: str, seed: int, steps: int = STEPS) -> torch.Tensor:
        """Latents (1, 16, 8, 8)."""
        tokens, pooled = prompts.embed(prompts.word_indices([prompt]))
        guidance = torch.full((1,), models.sample.GUIDANCE)
        x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(steps)
        for at in self.scheduler.timesteps:
            with self.transformer.cache_context("cond"):
                time_ = at.expand(1) / 1000
                found = models.velocity(self.transformer, x, time_, tokens, pooled, guidance)
            x = self.scheduler.step(found, at, x, return_dict=False)[0]
        return x


Method = Callable[[Pipeline], contextlib.AbstractContextManager]


def nibble(**options: Any) -> Method:
    return lambda pipe: api.cache(pipe, **options)


def of_diffusers(config: Any) -> Method:
    @contextlib.contextmanager
    def cached(pipe: Pipeline) -> Iterator[None]:
        pipe.transformer.enable_cache(config)
        yield
        pipe.transformer.disable_cache()

    return cached


def cache_dit(order: int | None, **options: Any) -> Method:
    @contextlib.contextmanager
    def cached(pipe: Pipeline) -> Iterator[None]:
        import cache_dit as package

        calibrator = order and package.TaylorSeerCalibratorConfig(taylorseer_order=order)
        package.enable_cache(
            pipe.transformer,
            cache_config=package.DBCacheConfig(num_inference_steps=STEPS, **options),
            calibrator_config=calibrator or None,
        )
        yield
        package.disable_cache(pipe.transformer)

    return cached


def methods(calibration: Any) -> dict[str, Method]:
    found: dict[str, Method] = {}
    for budget in (14, 10, 7):
        found[f"nibble, budget {budget}"] = nibble(rule="budget", budget=budget)
        found[f"nibble, budget {budget}, calibrated"] = nibble(
            rule="budget", budget=budget, calibration=calibration
        )
    for threshold in (0.03, 0.1, 0.3):
        found[f"nibble, error {threshold:g}"] = nibble(rule="error", threshold=threshold)
    for alpha in (0.1, 0.3):
        found[f"nibble, smoothcache {alpha:g}"] = nibble(
            rule="smoothcache", calibration=calibration, alpha=alpha
        )
    for threshold in (0.05, 0.1, 0.2):
        name = f"diffusers, FirstBlockCache {threshold:g}"
        found[name] = of_diffusers(FirstBlockCacheConfig(threshold=threshold))
    for interval in (2, 3, 4):
        found[f"diffusers, TaylorSeer every {interval}"] = of_diffusers(
            TaylorSeerCacheConfig(cache_interval=interval, disable_cache_before_step=2)
        )
    for threshold in (0.1, 0.3):
        common = {"Fn_compute_blocks": 1, "max_warmup_steps": 2}
        common["residual_diff_threshold"] = threshold
        found[f"cache-dit, DBCache {threshold:g}"] = cache_dit(None, **common)
        found[f"cache-dit, DBCache {threshold:g}, TaylorSeer"] = cache_dit(1, **common)
    return found


class Counter:
    """Attention layers that computed."""

    def __init__(self, model: torch.nn.Module):
        self.count = 0
        layers = [m for name, m in model.named_modules() if name.endswith("attn.to_q")]
        self.layers = len(layers)
        for layer in layers:
            layer.register_forward_hook(self._saw)

    def _saw(self, *call: Any) -> None:
        self.count += 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "cache-scripts.json")
    options = parser.parse_args()
    pipe, vae = Pipeline(), pictures.load_vae()
    counter = Counter(pipe.transformer)
    asked = [(prompt, seed) for prompt in prompts.SCORED[: options.prompts]
             for seed in range(options.seeds)]  # fmt: skip
    learnt = [{"prompt": prompt, "seed": 1000 + i}
              for i, prompt in enumerate(prompts.SCORED[-4:])]  # fmt: skip
    calibration = api.calibrate_cache(pipe, learnt, name="demo")

    def drawn() -> tuple[torch.Tensor, float, float]:
        counter.count, start = 0, time.perf_counter()
        latents = torch.cat([pipe(prompt, seed) for prompt, seed in asked])
        seconds = (time.perf_counter() - start) / len(asked)
        share = counter.count / (counter.layers * STEPS * len(asked))
        return pictures.decode(vae, latents), share, seconds

    drawn()
    reference, _, plain = drawn()
    rows = [{"method": "none", "computed": 1.0, "seconds": round(plain, 3)}]
    for name, method in methods(calibration).items():
        try:
            with method(pipe):
                found, share, seconds = drawn()
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        values = metrics.psnr(found, reference)
        rows.append({
            "method": name, "computed": round(share, 3),
            "psnr": round(values.mean().item(), 1), "worst": round(values.min().item(), 1),
            "seconds": round(seconds, 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    facts = {"environment": machine.describe_cpu(), "rows": rows}
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
