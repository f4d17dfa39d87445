"""How many prompts *best* needs: the demo model quantized by *fast* (no data) and by *best* on 1,
3, 10 and 30 prompts of its world, drawn beside 16 bit.

    python tests/bench/bench_prompts.py
    python tests/bench/bench_prompts.py --scored 20 --seeds 4 --counts 24

Scored prompts are none that were calibrated on by choice, and their noise is another. "velocity" is
the signal to noise of the model's velocity where 16-bit sampling passes, in dB: unlike pictures, it
tells methods apart that differ by a tenth.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from nibble.demo import metrics, pictures, prompts, run
from nibble.quant import diffusers as models
from nibble.quant.calibration.pictures import ENOUGH_PICTURES, PROMPTS
from nibble.quant.files.report import DATA_FREE, Report
from nibble.quant.job.measurement import Measurement
from nibble.quant.svdquant.quantize import SVDQuantJob
from nibble.quant.svdquant.recipe import Recipe

RESULTS = Path(__file__).resolve().parent / "results"
STEPS = 12


@dataclass
class Reference:
    """The 16-bit model's pictures, and its velocities on the way to them."""

    options: argparse.Namespace
    first: torch.Tensor | None = None

    def __post_init__(self):
        flux = pictures.load_flux()
        self.seeds = range(self.options.seeds)
        self.vae = pictures.load_vae()
        self.drawn, _ = run.draw(flux, self.vae, self.options.scored, self.seeds, STEPS)
        asked = list(prompts.SCORED)
        self.given = prompts.embed(prompts.word_indices(asked))
        seeds = [torch.Generator().manual_seed(seed) for seed in range(len(asked))]
        x = torch.stack([torch.randn(16, 8, 8, generator=seed) for seed in seeds])
        times = models.schedule(STEPS, pictures.SHIFT)
        self.path = []
        for now, after in zip(times[:-1], times[1:], strict=True):
            v = self._velocity(flux, x, now)
            self.path.append((x, now, v))
            x = x + (after - now) * v

    @torch.no_grad()
    def _velocity(self, flux, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        ones = torch.ones(len(x))
        return models.velocity(flux, x, t * ones, *self.given, 3.5 * ones)

    def score(self, model) -> dict:
        """{"psnr", "worst_psnr", "velocity"} of a quantized model, in dB; and beside the first
        model that was scored, "over_first": [mean difference of PSNR, its standard error].
        """
        drawn, _ = run.draw(model, self.vae, self.options.scored, self.seeds, STEPS)
        each = metrics.psnr(drawn, self.drawn)
        noise = [
            10 * (v.square().mean() / (self._velocity(model, x, t) - v).square().mean()).log10()
            for x, t, v in self.path
        ]
        if self.first is None:
            self.first = each
        over = each - self.first
        return {
            "over_first": [over.mean().item(), (over.std() / len(over) ** 0.5).item()],
            "psnr": each.mean().item(),
            "worst_psnr": each.min().item(),
            "velocity": torch.stack(noise).mean().item(),
        }


def calibrated(target: Path, recipe: Recipe, count: int) -> Report:
    """The demo FLUX by a recipe, measured on so many prompts."""
    job = SVDQuantJob.prepare(pictures.FLUX_FILE, target, recipe)
    state = {name: job.source.read(name).float() for name in job.source.shapes}
    asked = run.calibration_prompts(count)
    drawing = models.Drawing(
        *prompts.embed(prompts.word_indices(asked)),
        PROMPTS,
        size=(8, 8),
        shift=pictures.SHIFT,
        seed=run.CALIBRATION_SEED,
        batch=max(count, ENOUGH_PICTURES + 1),
    )
    statistics = models.record_inputs(state, job.quantized_names, drawing)
    return job.write(Measurement(drawing.provenance(), statistics.get))


def row(name: str, report: Report, scores: dict, seconds: float) -> dict:
    """A method's line of the results."""
    errors = report.decibels()
    return {
        "method": name,
        **scores,
        "layer_db_median": errors[len(errors) // 2],
        "layer_db_worst": errors[0],
        "data_free_layers": sum(DATA_FREE in line.why for line in report.rows),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "prompts.json")
    parser.add_argument("--counts", type=int, nargs="*", default=[0, 1, 3, 10, 30], help="0: fast")
    parser.add_argument("--scored", type=int, default=4, help="prompts that are drawn")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--iterations", type=int, help="of the solver, for a quick look")
    parser.add_argument("--smoothing-grid", type=int, help="the same")
    options = parser.parse_args()
    reference = Reference(options)
    quick = dict(iterations=options.iterations, smoothing_grid=options.smoothing_grid)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for count in options.counts:
            began = time.perf_counter()
            target = Path(folder) / f"{count}.safetensors"
            if count:
                report = calibrated(target, Recipe.from_preset("best", **quick), count)
            else:
                report = run.quantize(target, Recipe.from_preset("fast"))
            seconds = time.perf_counter() - began
            scores = reference.score(models.load_quantized(target, torch.float32))
            rows.append(row(f"best, {count} prompts" if count else "fast", report, scores, seconds))
            print(json.dumps(rows[-1]), flush=True)
            facts = {
                "command": " ".join(sys.argv),
                "scored": options.scored,
                "seeds": options.seeds,
                "steps": STEPS,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "rows": rows,
            }
            options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
