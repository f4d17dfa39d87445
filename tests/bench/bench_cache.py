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
a forward is a run through the model's blocks, counted by a hook.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
import comfyui_in_process

STEPS, CALIBRATION_SEED, PROMPT_SEED, SEED = 28, 5000, 7000, 20000
FLUX = (4.98651651e2, -2.83781631e2, 5.58554382e1, -3.82021401, 2.64230861e-1)
BUDGETS = (8, 11, 14, 17, 20)
ERRORS = (0.01, 0.02, 0.03, 0.05, 0.1)  # the presets of plain and of low-bit weights
AT = 14  # forwards at which methods are compared: half


def scenes(seed: int, count: int, taken=()) -> list[str]:
    """`count` different random prompts of the demo's world that are neither among the scored ones
    nor `taken`.
    """
    import numpy as np

    from nibble.demo import prompts, world

    rng, found = np.random.default_rng(seed), []
    while len(found) < count:
        text = str(world.random_scene(rng))
        if text not in prompts.SCORED and text not in taken and text not in found:
            found.append(text)
    return found


class Bench:
    """One model, its prompts and its uncached pictures."""

    def __init__(self, model, name: str, asked: list[str]):
        import torch

        from nibble.demo import pictures, prompts

        self.torch, self.model, self.name, self.count = torch, model, name, len(asked)
        self.tokens, self.pooled = prompts.embed(prompts.word_indices(asked))
        self.vae, self.rows, self.forwards = pictures.load_vae(), [], 0
        model.model.diffusion_model.single_blocks[0].register_forward_hook(self._count)
        self.noise = torch.cat(
            [
                torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(SEED + i))
                for i in range(self.count)
            ]
        )
        self.reference = {
            batched: self.decode(self.draw(model, STEPS, self.groups(batched))[0])
            for batched in (True, False)
        }

    def groups(self, batched: bool) -> list[slice]:
        """What is drawn together."""
        return [slice(0, self.count)] if batched else [slice(i, i + 1) for i in range(self.count)]

    def _count(self, *_):
        self.forwards += 1

    def sigmas(self, steps: int):
        import comfy.samplers

        return comfy.samplers.calculate_sigmas(
            self.model.get_model_object("model_sampling"), "simple", steps
        )

    def conditioning(self, which: slice) -> list:
        return [[self.tokens[which], {"pooled_output": self.pooled[which], "guidance": 3.5}]]

    def draw(self, model, steps: int, groups: list[slice]):
        """(latents, forwards a group, CPU seconds a group)."""
        import comfy.samplers

        found, seconds, self.forwards = [], 0.0, 0
        for group in groups:
            guider = comfy.samplers.CFGGuider(model)
            guider.inner_set_conds({"positive": self.conditioning(group)})
            noise, begin = self.noise[group], time.process_time()
            found.append(
                guider.sample(
                    noise,
                    self.torch.zeros_like(noise),
                    comfy.samplers.sampler_object("euler"),
                    self.sigmas(steps),
                    disable_pbar=True,
                    seed=SEED,
                )
            )
            seconds += time.process_time() - begin
        return self.torch.cat(found), self.forwards / len(groups), seconds / len(groups)

    def decode(self, latents):
        from nibble.demo import pictures

        return pictures.decode(self.vae, self.model.model.process_latent_in(latents))

    def measure(
        self, method: str, setting, model, steps: int = STEPS, batched: bool = True, work=None
    ) -> None:
        """One row: a method with one setting."""
        from nibble.demo import metrics

        groups = self.groups(batched)
        latents, forwards, seconds = self.draw(model, steps, groups)
        uncached = self.draw(self.model, STEPS, groups[:: max(1, len(groups) // 2)])[2]
        drawn, reference = self.decode(latents), self.reference[batched]
        psnr, ssim = metrics.psnr(drawn, reference), metrics.ssim(drawn, reference)
        row = {
            "model": self.name,
            "method": method,
            "setting": setting,
            "forwards": round(work() * STEPS if work else forwards, 2),
            "time": round(seconds / uncached, 3),
            "psnr": round(psnr.mean().item(), 2),
            "psnr_min": round(psnr.min().item(), 2),
            "ssim": round(ssim.mean().item(), 5),
            "ssim_min": round(ssim.min().item(), 5),
        }
        self.rows.append(row)
        print(
            f"{row['model']:7} {method:34} {setting!s:6} {row['forwards']:6.2f} forwards"
            f" {row['time']:6.3f} time {row['psnr']:6.2f} dB, least {row['psnr_min']:6.2f}, SSIM"
            f" {row['ssim']:.4f} / {row['ssim_min']:.4f}",
            flush=True,
        )


def calibrate(bench: Bench, asked: list[str]):
    """Calibration on other prompts than the measured ones."""
    import comfy.samplers

    from nibble.demo import prompts
    from nibble.nodes.bridge.caching.measure import Measurement, measure
    from nibble.nodes.bridge.host.progress import Progress

    tokens, pooled = prompts.embed(prompts.word_indices(asked))
    entries = [
        [tokens[i : i + 1], {"pooled_output": pooled[i : i + 1], "guidance": 3.5}]
        for i in range(len(asked))
    ]
    return measure(
        Measurement(
            model=bench.model,
            positive=entries,
            negative=None,
            cfg=1.0,
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=bench.sigmas(STEPS),
            latent={"samples": bench.torch.zeros(1, 16, 8, 8)},
            seed=CALIBRATION_SEED,
        ),
        Progress("calibrating"),
    )


def fixed_schedules(bench: Bench, calibration, few: slice):
    """(method, [(setting, measure)]): what is decided before the picture is drawn."""
    from nibble.nodes.bridge.caching.apply import apply_smoothcache
    from nibble.nodes.bridge.caching.settings import SmoothCacheSettings

    def by_budget(name, order, given):
        def measure(budget):
            settings = SmoothCacheSettings(budget=budget, order=order)
            if given:
                # searched once and kept: not part of the sampling time
                given.mask(budget, [float(s) for s in bench.sigmas(STEPS)], settings.reuse)
            bench.measure(name, budget, apply_smoothcache(bench.model, settings, given))

        return name, BUDGETS[few], measure

    def by_alpha(name, depth, order):
        def measure(alpha):
            seen = []
            patched = apply_smoothcache(
                bench.model,
                SmoothCacheSettings(alpha, depth, order=order),
                calibration,
                watch=seen.append,
            )
            bench.measure(name, alpha, patched, work=lambda: seen[-1].work / seen[-1].calls)

        return name, (0.02, 0.04, 0.07, 0.1, 0.15)[few], measure

    yield (
        "fewer steps",
        BUDGETS[few],
        lambda steps: bench.measure("fewer steps", steps, bench.model, steps),
    )
    yield by_budget("uniform, hold", 0, None)
    yield by_budget("uniform, linear", 1, None)
    yield by_budget("mask search, linear", 1, calibration)
    yield by_budget("mask search, quadratic", 2, calibration)
    yield by_alpha("SmoothCache block, linear", "block", 1)


def adaptive_rules(bench: Bench, calibration, few: slice):
    """The same for what decides while it draws, one prompt at a time."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    from nibble.accel.caching.teacache import IDENTITY, Polynomial
    from nibble.nodes.bridge.caching.apply import apply_teacache
    from nibble.nodes.bridge.caching.settings import TeaCacheSettings

    def ours(name, thresholds, given=None, **settings):
        return (
            name,
            thresholds[few],
            lambda t: bench.measure(
                name,
                t,
                apply_teacache(bench.model, TeaCacheSettings(t, **settings), given),
                batched=False,
            ),
        )

    def native(name, thresholds, node):
        return (
            name,
            thresholds[few],
            lambda t: bench.measure(
                name, t, node.execute(bench.model, t, 0.15, 0.95, False).result[0], batched=False
            ),
        )

    yield ours("error control, linear", ERRORS)
    yield native("EasyCache (guarded)", (0.02, 0.04, 0.07, 0.1, 0.2), EasyCacheNode)
    yield native("LazyCache", (0.02, 0.04, 0.07, 0.1, 0.2), LazyCacheNode)
    yield ours(
        "TeaCache, FLUX coefficients",
        (0.2, 0.25, 0.4, 0.6, 0.8),
        rule="teacache",
        order=0,
        coefficients=Polynomial(FLUX),
    )
    yield ours(
        "TeaCache calibrated, linear", (0.03, 0.05, 0.1, 0.15, 0.2), calibration, rule="teacache"
    )
    yield ours("error control, quadratic", ERRORS, order=2)
    yield ours(
        "block-0 probe, linear",
        (0.05, 0.08, 0.12, 0.2, 0.3),
        rule="teacache",
        coefficients=IDENTITY,
        feature="first_residual",
    )


def guard_easycache() -> None:
    """EasyCache adds into the tensor that it is given, which in float32 is the sampler's own: here
    it gets a copy.
    """
    from comfy_extras.nodes_easycache import EasyCacheHolder

    unguarded = EasyCacheHolder.apply_cache_diff
    EasyCacheHolder.apply_cache_diff = lambda self, x, *args, **kwargs: unguarded(
        self, x.clone(), *args, **kwargs
    )


def overhead(bench: Bench, side: int) -> dict:
    """CPU time of a reused step over that of a computed one, medians, at a latent of side x side:
    {"step", "blocks", "tokens"}.
    """
    import statistics

    import comfy.samplers

    from nibble.accel.caching.teacache import IDENTITY
    from nibble.nodes.bridge.caching.apply import apply_smoothcache, apply_teacache
    from nibble.nodes.bridge.caching.settings import SmoothCacheSettings, TeaCacheSettings

    found = {"tokens": side * side // 4}
    noise = bench.torch.randn(1, 16, side, side, generator=bench.torch.Generator().manual_seed(0))
    plans = {
        "step": lambda watch: apply_smoothcache(
            bench.model, SmoothCacheSettings(budget=8), watch=watch
        ),
        "blocks": lambda watch: apply_teacache(
            bench.model,
            TeaCacheSettings(0.3, rule="teacache", order=1, coefficients=IDENTITY),
            watch=watch,
        ),
    }
    for level, plan in plans.items():
        times, records, last = [], [], [time.process_time()]

        def stepped(*_, times=times, last=last):
            now = time.process_time()
            times.append(now - last[0])
            last[0] = now

        guider = comfy.samplers.CFGGuider(plan(records.append))
        guider.inner_set_conds({"positive": bench.conditioning(slice(0, 1))})
        guider.sample(
            noise,
            bench.torch.zeros_like(noise),
            comfy.samplers.sampler_object("euler"),
            bench.sigmas(16),
            callback=stepped,
            disable_pbar=True,
            seed=0,
        )
        computed = [t for i, t in enumerate(times) if records[-1].cells[i].computed and i]
        reused = [t for i, t in enumerate(times) if not records[-1].cells[i].computed]
        found[level] = (
            round(statistics.median(reused) / statistics.median(computed), 4)
            if reused and computed
            else None
        )
    return found


def flux_overhead(image: int = 4096, text: int = 512) -> float:
    """Multiplications of a step whose blocks are all skipped over those of a whole step, FLUX.1 at
    1024 x 1024.
    """
    width, mlp = 3072, 12288
    outside = (
        image * 64 * width * 2
        + text * 4096 * width
        + 3 * (256 + width) * width
        + 8 * width * width
        + 6 * width * width
    )
    double = (
        (image + text) * (4 * width * width + 2 * width * mlp)
        + 2 * (image + text) ** 2 * width
        + 12 * width * width
    )
    single = (
        (image + text) * (width * (3 * width + mlp) + (width + mlp) * width)
        + 2 * (image + text) ** 2 * width
        + 3 * width * width
    )
    return outside / (outside + 19 * double + 38 * single)


def at(rows: list[dict], x: str, wanted: float) -> dict | None:
    """PSNR and SSIM of a method at `wanted` forwards or time, read between its two nearest
    settings; None outside what it reached.
    """
    rows = sorted(rows, key=lambda row: row[x])
    for low, high in zip(rows, rows[1:], strict=False):
        if low[x] <= wanted <= high[x]:
            share = (wanted - low[x]) / (high[x] - low[x]) if high[x] > low[x] else 1.0
            return {
                name: round(low[name] + share * (high[name] - low[name]), 4)
                for name in ("psnr", "psnr_min", "ssim", "ssim_min")
            }
    return None


def summarise(rows: list[dict]) -> list[dict]:
    """For each model and method: at half the forwards, and at half the time."""
    groups = dict.fromkeys((row["model"], row["method"]) for row in rows)
    out = []
    for model, method in groups:
        part = [row for row in rows if (row["model"], row["method"]) == (model, method)]
        out.append(
            {
                "model": model,
                "method": method,
                "at_half_forwards": at(part, "forwards", AT),
                "at_half_time": at(part, "time", 0.5),
            }
        )
    return out


def load(name: str, folder: Path):
    """The demo model, "16-bit" or "4-bit"; both compute in float32."""
    import comfy.sd
    import torch

    from nibble.demo import pictures, run
    from nibble.nodes.bridge.quantized import loading
    from nibble.quant.svdquant.recipe import Recipe

    if name == "16-bit":
        return comfy.sd.load_diffusion_model(
            str(pictures.FLUX_FILE), model_options={"dtype": torch.float32}
        )
    target = folder / "demo-4bit.safetensors"
    run.quantize(target, Recipe.from_preset("fast"))
    return loading.load(target, dtype="fp32")


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
    guard_easycache()
    few = slice(2, 3) if options.quick else slice(None)
    measured = scenes(PROMPT_SEED, options.prompts)
    fitted = scenes(CALIBRATION_SEED, options.calibration_prompts, measured)
    facts = {
        "command": " ".join(["python", *sys.argv]),
        "finished": False,
        "steps": STEPS,
        "torch": torch.__version__,
        "held_out": (
            "prompts and noise that neither the thresholds and presets nor the calibration were"
            " chosen with"
        ),
        "prompts": measured,
        "calibration_prompts": fitted,
        "flux_overhead_of_a_skipped_step": round(flux_overhead(), 5),
        "rows": [],
    }

    def save(**more):
        facts.update(more, summary=summarise(facts["rows"]))
        out.write_text(json.dumps(facts, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(load(options.model, Path(folder)), options.model, measured)
        bench.rows = facts["rows"]
        calibration = calibrate(bench, fitted)
        save(calibration_r2=calibration.teacache["r2"])
        for method, settings, measure in (
            *fixed_schedules(bench, calibration, few),
            *adaptive_rules(bench, calibration, few),
        ):
            for setting in (
                settings if not options.only or any(word in method for word in options.only) else ()
            ):
                measure(setting)
            save()
        save(overhead=overhead(bench, 16 if options.quick else 48), finished=True)
    for row in facts["summary"]:
        found = row["at_half_forwards"]
        print(
            f"{row['model']:7} {row['method']:34} "
            + (
                f"{found['psnr']:6.2f} dB, least {found['psnr_min']:6.2f}, at {AT} forwards"
                if found
                else "-"
            )
        )


if __name__ == "__main__":
    main()
