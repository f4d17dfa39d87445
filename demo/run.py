"""``python -m nibble demo``: quantizes the shipped FLUX to 4 bits, draws the same prompts with
both, and says what it cost.

The pictures go side by side into one PNG, 16-bit above 4-bit; size, time and scores are printed and
returned.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..quant import diffusers as models
from ..quant.architectures import plan, recognise
from ..quant.files.source import Source
from ..quant.report import Report
from ..quant.svdquant.quantize import quantize_checkpoint
from ..quant.svdquant.recipe import Recipe
from ..quant.vq4dit import quantize as pipeline
from ..quant.vq4dit import recipe as vq
from . import metrics, pictures, prompts, scorer, world

# drawn at random: neither they nor their noise are those that are scored
CALIBRATION_PROMPTS, CALIBRATION_SEED = 24, 1000


def quantize(
    target: Path,
    recipe: Recipe | vq.Recipe,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    source: Path = pictures.FLUX_FILE,
    zero_data: bool | None = None,
) -> Report:
    """The demo FLUX by either method, after recording what its layers read or calibrating on it:
    while it draws random prompts of the world, or (zero_data; by default all presets but best)
    while it turns noise into something under random conditioning.
    """
    opened = Source(source)
    if recipe.preset != "best" if zero_data is None else zero_data:
        generator = torch.Generator().manual_seed(CALIBRATION_SEED)
        tokens = torch.randn(CALIBRATION_PROMPTS, 4, prompts.WORD_DIM, generator=generator)
        kind, conditioning = "random conditioning", (tokens, tokens.mean(1))
    else:
        rng = np.random.default_rng(CALIBRATION_SEED)
        asked = [str(world.random_scene(rng)) for _ in range(CALIBRATION_PROMPTS)]
        kind, conditioning = "prompts", prompts.embed(prompts.word_indices(asked))
    facts = {"kind": kind, "prompts": len(conditioning[0]), "seed": CALIBRATION_SEED}
    if isinstance(recipe, vq.Recipe):
        return _to_codewords(opened, target, recipe, conditioning, facts, progress)
    statistics = record(opened, recipe, *conditioning)
    return quantize_checkpoint(opened, target, recipe, statistics.get, progress, calibration=facts)


def _to_codewords(
    source: Source,
    target: Path,
    recipe: vq.Recipe,
    conditioning: tuple,
    facts: dict,
    progress: Callable,
) -> Report:
    """Closed form on recorded inputs where the recipe has turns of feedback, from the weights alone
    where not; or calibrated at work.
    """
    if recipe.calibrated:
        state = {name: source.read(name).float() for name in source.shapes}
        teacher = models.flux_teacher(
            state, *conditioning, side=8, seed=CALIBRATION_SEED, batch=8, shift=pictures.SHIFT
        )
        return pipeline.quantize_checkpoint(
            source, target, recipe, None, teacher, progress, calibration=facts
        )
    statistics = record(source, recipe, *conditioning).get if recipe.turns else None
    return pipeline.quantize_checkpoint(
        source, target, recipe, statistics, None, progress, calibration=facts
    )


def record(
    source: Source, recipe: Recipe | vq.Recipe, tokens: torch.Tensor, pooled: torch.Tensor
) -> dict:
    """name → InputStats of the demo model at work under this conditioning."""
    state = {name: source.read(name).float() for name in source.shapes}
    names = [
        layer.name
        for layer in plan(source.shapes, recognise(source.shapes, source.name), recipe, source.name)
        if layer.action != "keep"
    ]
    return models.record_inputs(
        state, names, tokens, pooled, steps=8, side=8, seed=CALIBRATION_SEED, batch=len(tokens)
    )


def draw(flux, vae, count: int, seeds: range, steps: int = 12) -> tuple[torch.Tensor, float]:
    """The first `count` scored prompts with every seed: pictures (count * seeds, 64, 64, 3) in [0,
    1], and the seconds of sampling.
    """
    asked = [prompt for prompt in prompts.SCORED[:count] for _ in seeds]
    start = time.perf_counter()
    latents = pictures.sample(flux, asked, [seed for _ in range(count) for seed in seeds], steps)
    seconds = time.perf_counter() - start
    return pictures.decode(vae, latents), seconds


def compare(
    drawn: torch.Tensor, reference: torch.Tensor, count: int, seeds: range
) -> dict[str, float]:
    """Scores of pictures as `draw` gives them: PSNR (dB) and SSIM against a reference, and the
    shares that show what was asked.
    """
    scenes = [world.parse(prompt) for prompt in prompts.SCORED[:count] for _ in seeds]
    return {
        "psnr": metrics.psnr(drawn, reference).mean().item(),
        "ssim": metrics.ssim(drawn, reference).mean().item(),
        **scorer.score(drawn.numpy(), scenes),
    }


def side_by_side(rows: list[torch.Tensor], columns: int, zoom: int = 2) -> Image.Image:
    """Rows of pictures (batch, height, width, 3), the first of each row's batch, enlarged without
    smoothing.
    """
    sheet = torch.cat([torch.cat(list(row[:columns]), dim=1) for row in rows])
    image = Image.fromarray((sheet * 255).round().byte().numpy())
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def main(
    out: Path,
    preset: str = "best",
    target: Path = Path("demo-svdq-int4.safetensors"),
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    say: Callable[[str], None] = print,
) -> dict:
    """The whole demo; returns what it printed as {"report", "16-bit", "4-bit"}."""
    torch.manual_seed(0)
    start = time.perf_counter()
    report = quantize(target, Recipe.from_preset(preset), progress)
    say(
        f"quantized {pictures.FLUX_FILE.name} with the preset {preset!r} in"
        f" {time.perf_counter() - start:.1f} s → {target}"
    )
    for label, value in report.summary():
        say(f"  {label:<13} {value}")
    vae, seeds = pictures.load_vae(), range(4)
    full, full_seconds = draw(pictures.load_flux(), vae, len(prompts.SCORED), seeds)
    four, four_seconds = draw(
        models.load_quantized(target, torch.float32), vae, len(prompts.SCORED), seeds
    )
    scores = {
        "16-bit": compare(full, full, len(prompts.SCORED), seeds),
        "4-bit": compare(four, full, len(prompts.SCORED), seeds),
    }
    sizes = {"16-bit": pictures.FLUX_FILE.stat().st_size, "4-bit": target.stat().st_size}
    say(f"{len(prompts.SCORED)} prompts x {len(seeds)} seeds, 12 steps each")
    say(f"  {'':8} {'size':>9} {'sampling':>9} {'PSNR':>9} {'SSIM':>6} {'obeys the prompt':>17}")
    for name, seconds in (("16-bit", full_seconds), ("4-bit", four_seconds)):
        s = scores[name]
        close = f"{s['psnr']:6.1f} dB {s['ssim']:6.3f}" if name == "4-bit" else f"{'-':>9} {'-':>6}"
        say(
            f"  {name:8} {sizes[name] / 1e6:6.1f} MB {seconds:7.1f} s {close}"
            f" {100 * s['all']:15.1f} %"
        )
    side_by_side([full[:: len(seeds)], four[:: len(seeds)]], columns=10).save(out)
    say(f"pictures: {out} (16-bit above, 4-bit below)")
    return {
        "report": report,
        **scores,
        "bytes": sizes,
        "seconds": {"16-bit": full_seconds, "4-bit": four_seconds},
    }
