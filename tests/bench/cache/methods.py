"""The compared methods, each with its settings: schedules fixed before, and adaptive rules."""

from bench.cache.drawing import CALIBRATION_SEED, STEPS, Bench

FLUX = (4.98651651e2, -2.83781631e2, 5.58554382e1, -3.82021401, 2.64230861e-1)
BUDGETS = (8, 11, 14, 17, 20)
ERRORS = (0.01, 0.02, 0.03, 0.05, 0.1)  # the presets of plain and of low-bit weights


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
        "TeaCache calibrated, linear",
        (0.03, 0.05, 0.1, 0.15, 0.2),
        calibration,
        rule="teacache",
        order=1,
    )
    yield ours("error control, quadratic", ERRORS, order=2)
    yield ours(
        "block-0 probe, linear",
        (0.05, 0.08, 0.12, 0.2, 0.3),
        rule="teacache",
        order=1,
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
