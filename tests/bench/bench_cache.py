"""Caching against its rivals: how close to the uncached picture, at how many forwards and how much
time.

    COMFYUI_PATH=/path/to/ComfyUI python tests/bench/bench_cache.py --model 16-bit

The demo model inside ComfyUI's samplers, Euler, 28 steps, in 16 bit (computed in float32) and in 4
bits. Reference: the same run without a cache. Rivals in the same run: fewer steps, evenly skipped
steps, ComfyUI's EasyCache and LazyCache, TeaCache as published with FLUX's coefficients. EasyCache
adds its cached difference into the sampler's own tensor where a flow model computes in float32; it
is given a copy here, so that it is not broken. Prompts and noise are held out: disjoint from those
of calibration and from `prompts.SCORED`, with sight of which thresholds and presets were chosen.
Rules that decide while they draw see each prompt alone; schedules fixed before draw them as one
batch. Time is CPU time of the sampling loop over that of uncached runs of the same form in between;
a forward is a run through the model's blocks, counted by a hook. "schedules": the presets under
every way of ComfyUI to mix and space noise, beside as many plain steps (--only schedules: these
alone).
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
import comfyui_in_process
from bench.cache import drawing, methods, overhead, schedules, summary


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="16-bit", choices=["16-bit", "4-bit"])
    parser.add_argument("--out", type=Path, help="default: results/cache-MODEL.json")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--calibration-prompts", type=int, default=6)
    parser.add_argument(
        "--quick", action="store_true", help="one setting of each method: to see that it runs"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], help="methods whose names hold one of these words"
    )
    parser.add_argument("--comfyui", default=os.environ.get("COMFYUI_PATH", ""))
    options = parser.parse_args()
    if not options.comfyui:
        sys.exit("Set COMFYUI_PATH to a ComfyUI folder: the bench draws with its samplers.")
    out = options.out or Path(__file__).resolve().parent / "results" / f"cache-{options.model}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    comfyui_in_process.start(options.comfyui)
    import torch

    torch.set_num_threads(1)
    methods.guard_easycache()
    few = slice(2, 3) if options.quick else slice(None)
    measured = drawing.scenes(drawing.PROMPT_SEED, options.prompts)
    fitted = drawing.scenes(drawing.CALIBRATION_SEED, options.calibration_prompts, measured)
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "finished": False,
        "steps": drawing.STEPS,
        "torch": torch.__version__,
        "held_out": (
            "prompts and noise that neither the thresholds and presets nor the calibration were"
            " chosen with"
        ),
        "prompts": measured,
        "calibration_prompts": fitted,
        "flux_overhead_of_a_skipped_step": round(overhead.flux_overhead(), 5),
        "rows": [],
    }

    def save(**more):
        facts.update(more, summary=summary.summarise(facts["rows"]))
        out.write_text(json.dumps(facts, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        bench = drawing.Bench(drawing.load(options.model, Path(folder)), options.model, measured)
        bench.rows = facts["rows"]
        calibration = methods.calibrate(bench, fitted)
        save(calibration_r2=calibration.teacache["r2"])
        for method, settings, measure in (
            *methods.fixed_schedules(bench, calibration, few),
            *methods.adaptive_rules(bench, calibration, few),
        ):
            for setting in (
                settings if not options.only or any(word in method for word in options.only) else ()
            ):
                measure(setting)
            save()
        if not options.only or "schedules" in options.only:
            save(schedules=schedules.by_schedule(bench))
        save(overhead=overhead.overhead(bench, 16 if options.quick else 48), finished=True)
    for row in facts["summary"]:
        found = row["at_half_forwards"]
        print(
            f"{row['model']:7} {row['method']:34} "
            + (
                f"{found['psnr']:6.2f} dB, least {found['psnr_min']:6.2f}, at {summary.AT} forwards"
                if found
                else "-"
            )
        )


if __name__ == "__main__":
    main()
