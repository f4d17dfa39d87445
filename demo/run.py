"""``python -m nibble demo``: quantizes the shipped FLUX to 4 bits, draws the same prompts with
both, and says what it cost.

The pictures go side by side into one PNG, 16-bit above 4-bit; size, time and scores are printed and
returned.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..quant import diffusers as models
from ..quant.calibration.pictures import PROMPTS, RANDOM
from ..quant.cli import methods
from ..quant.files.report import Report
from ..quant.job.checkpoint_run import QuantizeJob
from ..quant.job.measurement import Measurement
from ..quant.job.monitor import Monitor, ignore
from ..quant.svdquant.recipe import Recipe
from ..quant.svdquant.stock.recipe import StockRecipe
from ..quant.vq4dit.recipe import Recipe as VQRecipe
from . import metrics, pictures, prompts, scorer, world

# drawn at random: neither they nor their noise are those that are scored
CALIBRATION_PROMPTS, CALIBRATION_SEED = 24, 1000


def quantize(
    target: Path,
    recipe: Recipe | StockRecipe | VQRecipe,
    progress: Callable[[int, int, str], None] = ignore,
    source: Path = pictures.FLUX_FILE,
    zero_data: bool | None = None,
) -> Report:
    """The demo FLUX by either method, after recording what its layers read or calibrating on it:
    while it draws random prompts of the world, or (zero_data; by default all presets but best)
    while it turns noise into something under random conditioning.
    """
    job = methods.prepare(source, target, recipe)
    if zero_data is None:
        zero_data = recipe.preset != "best"
    return job.write(_measure(job, zero_data), Monitor(progress=progress))


def _measure(job: QuantizeJob, zero_data: bool) -> Measurement:
    """A teacher where the recipe calibrates; recorded inputs where it has a use for them."""
    drawing = _drawing(zero_data)
    provenance = drawing.provenance()
    codewords = isinstance(job.recipe, VQRecipe)
    if codewords and not job.recipe.calibrated and not job.recipe.turns:
        return Measurement(provenance)
    if job.existing_report(provenance) is not None:
        return Measurement(provenance)
    state = {name: job.source.read(name).float() for name in job.source.shapes}
    if codewords and job.recipe.calibrated:
        teacher = models.flux_teacher(state, replace(drawing, batch=8))
        return Measurement(provenance, teacher=teacher)
    statistics = models.record_inputs(state, job.quantized_names, drawing)
    return Measurement(provenance, statistics.get)


def calibration_prompts(count: int) -> list[str]:
    """Prompts of the world, drawn at random: none of those that are scored was chosen for it."""
    rng = np.random.default_rng(CALIBRATION_SEED)
    return [str(world.random_scene(rng)) for _ in range(count)]


def _drawing(zero_data: bool) -> models.Drawing:
    """What to draw while measuring: in the demo's own size and schedule."""
    generator = torch.Generator().manual_seed(CALIBRATION_SEED)
    tokens = torch.randn(CALIBRATION_PROMPTS, 4, prompts.WORD_DIM, generator=generator)
    pooled = tokens.mean(1)
    if not zero_data:
        asked = calibration_prompts(CALIBRATION_PROMPTS)
        tokens, pooled = prompts.embed(prompts.word_indices(asked))
    return models.Drawing(
        tokens,
        pooled,
        RANDOM if zero_data else PROMPTS,
        size=(8, 8),
        shift=pictures.SHIFT,
        seed=CALIBRATION_SEED,
        batch=CALIBRATION_PROMPTS,
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
