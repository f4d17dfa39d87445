"""What a step costs whose blocks are skipped: measured, and counted for FLUX.1."""

import time

from bench.cache.drawing import Bench


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
