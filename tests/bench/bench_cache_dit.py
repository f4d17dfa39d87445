"""SmoothCache on what its paper shows first, a class-conditional DiT (arXiv 2411.10510, table 1):
attention and feed-forward layers by measured errors, beside FORA's every n-th step, at equal work.

    python tests/bench/bench_cache_dit.py [--training-steps 1000] [--out FILE.json]

diffusers' DiTTransformer2DModel, four blocks of width 64 on 12 x 12 pictures of eight shapes,
trained here for some minutes; then DDIM, 50 steps, guidance 1.5 as in the paper. Calibrated on 10
pictures, judged on 16 others: PSNR against the same pictures without a cache. computed: blocks'
layers that were, as a share of all; alphas are quantiles of the measured errors. FORA (arXiv
2407.01425) computes all layers at every n-th step and at both ends, and holds their outputs in
between. Beside them whole steps: evenly spread, or placed by the calibration.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import diffusers
import numpy as np
import torch

import checkout  # noqa: F401
from bench import machine
from nibble.accel.caching.calibration_file import Calibration
from nibble.accel.diffusers import cache, calibrate

RESULTS = Path(__file__).resolve().parent / "results"
SIDE, SHAPES, NO_CLASS, STEPS, GUIDANCE = 12, 8, 1000, 50, 1.5
QUANTILES = (0.1, 0.25, 0.45, 0.7)


def drawn(classes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(n, 1, SIDE, SIDE) in -1 to 1: a shape of each class, placed, sized and shaded at random."""
    count = len(classes)
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    random = torch.rand(count, 4, 1, 1, generator=generator)
    dx, dy = x - 3.5 - 4 * random[:, 0], y - 3.5 - 4 * random[:, 1]
    size = 2 + 2 * random[:, 2]
    far, near = torch.maximum(dx.abs(), dy.abs()), torch.minimum(dx.abs(), dy.abs())
    round_ = (dx**2 + dy**2).sqrt()
    held = torch.stack(
        [
            round_ < size,
            (round_ < size) & (round_ > size - 1.8),
            far < size,
            (far < size) & (far > size - 1.6),
            (near < 1.2) & (far < size + 1),
            dx.abs() + dy.abs() < size * 1.3,
            (dx.round() % 4 < 2).expand(count, SIDE, SIDE),
            (dy.round() % 4 < 2).expand(count, SIDE, SIDE),
        ],
        1,
    )[torch.arange(count), classes]
    shade = 0.4 + 0.6 * random[:, 3]
    return (torch.where(held, shade, -shade)).unsqueeze(1)


def scheduler() -> Any:
    return diffusers.DDIMScheduler(clip_sample=False)


def built() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=1, out_channels=1, num_layers=4,
        sample_size=SIDE, patch_size=2, num_embeds_ada_norm=NO_CLASS,
    )  # fmt: skip


def trained(steps: int, batch: int = 64) -> torch.nn.Module:
    model = built()
    noise_of, generator = scheduler(), torch.Generator().manual_seed(1)
    learner = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    slower = torch.optim.lr_scheduler.OneCycleLR(learner, 2e-3, total_steps=steps)
    begin = time.monotonic()
    for step in range(steps):
        classes = torch.randint(SHAPES, (batch,), generator=generator)
        data, noise = drawn(classes, generator), torch.randn(batch, 1, SIDE, SIDE)
        times = torch.randint(1000, (batch,), generator=generator)
        found = model(noise_of.add_noise(data, noise, times), times, classes).sample
        loss = (found - noise).square().mean()
        learner.zero_grad()
        loss.backward()
        learner.step()
        slower.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: {loss.item():.4f}, {time.monotonic() - begin:.0f} s", flush=True)
    return model.eval()


class Pipeline:
    """As DiTPipeline draws, whose VAE it has none of."""

    def __init__(self, model: torch.nn.Module):
        self.transformer, self.scheduler = model, scheduler()

    @torch.no_grad()
    def __call__(self, seeds: range) -> torch.Tensor:
        """(n, 1, SIDE, SIDE), a class after the other."""
        self.scheduler.set_timesteps(STEPS)
        x = torch.cat([torch.randn(1, 1, SIDE, SIDE, generator=_seeded(seed)) for seed in seeds])
        classes = torch.tensor([seed % SHAPES for seed in seeds])
        both = torch.cat([classes, torch.full_like(classes, NO_CLASS)])
        for at in self.scheduler.timesteps:
            found = self.transformer(torch.cat([x, x]), at.expand(2 * len(x)), both).sample
            known, unknown = found.chunk(2)
            x = self.scheduler.step(unknown + GUIDANCE * (known - unknown), at, x).prev_sample
        return x


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fora(calibration: Calibration, every: int) -> Calibration:
    """A calibration by which each `every`-th step is computed, whatever the layers."""
    found = copy.deepcopy(calibration)
    for curve in found.curves.values():
        curve.mean = [
            [0.0 if k < every else 9.0 for _ in row] for k, row in enumerate(curve.mean, 1)
        ]
    return found


def nearest(calibration: Calibration) -> Calibration:
    """The same where a result is held for one step only."""
    found = copy.deepcopy(calibration)
    for curve in found.curves.values():
        curve.mean = [curve.mean[0], *([9.0] * len(row) for row in curve.mean[1:])]
    return found


def alphas_of(calibration: Calibration) -> list[float]:
    """Quantiles of the errors that it allows at all."""
    errors = [
        error
        for kind, curve in calibration.curves.items()
        for row in curve.mean
        for error in row
        if kind != "step" and error < 9.0
    ]
    return [round(float(alpha), 4) for alpha in np.quantile(errors, QUANTILES)]


def psnr(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Of each picture; values span 2."""
    error = (found - wanted).square().mean((1, 2, 3)).clamp_min(1e-12)
    return 10 * torch.log10(4 / error)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--training-steps", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--weights", type=Path, help="where the trained model is kept, if anywhere")
    parser.add_argument("--out", type=Path, default=RESULTS / "cache-dit.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.weights and options.weights.exists():
        model = built().eval()
        model.load_state_dict(torch.load(options.weights))
    else:
        model = trained(options.training_steps)
        if options.weights:
            torch.save(model.state_dict(), options.weights)
    pipe = Pipeline(model)
    calibration = calibrate(pipe, [{"seeds": range(1000, 1010)}], name="shapes")
    seeds = range(options.pictures)
    plain, rows = pipe(seeds), []

    def measure(method: str, setting: float, **options: Any) -> None:
        with cache(pipe, **options) as caching:
            found = psnr(pipe(seeds), plain)
        record = caching.record
        masks = [list(row.values()) for row in record.rows.values()]
        masks = masks or [[cell.computed for cell in record.cells.values()]]
        row = {
            "method": method,
            "setting": setting,
            "computed": round(sum(map(sum, masks)) / sum(map(len, masks)), 4),
            "psnr": round(found.mean().item(), 2),
            "psnr_min": round(found.min().item(), 2),
        }
        rows.append(row)
        print(*row.values(), flush=True)

    for order, how in ((0, "held"), (1, "on the line")):
        parts: dict[str, Any] = {"rule": "smoothcache", "order": order}
        for every in (2, 3):
            given = fora(calibration, every)
            measure(f"FORA, {how}", every, **parts, calibration=given, alpha=1.0)
        for name, given in (("k to 3", calibration), ("k 1", nearest(calibration))):
            for alpha in alphas_of(given):
                measure(
                    f"SmoothCache, {name}, {how}", alpha, **parts, calibration=given, alpha=alpha
                )
        for budget in (26, 18):
            steps: dict[str, Any] = {"rule": "budget", "budget": budget, "order": order}
            measure(f"steps, evenly spread, {how}", budget, **steps)
            measure(f"steps, placed, {how}", budget, **steps, calibration=calibration)
    facts = {
        "command": "python tests/bench/bench_cache_dit.py",
        "versions": machine.versions(),
        "training_steps": options.training_steps,
        "pictures": options.pictures,
        "curves": {kind: curve.mean for kind, curve in calibration.curves.items()},
        "rows": rows,
    }
    options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
