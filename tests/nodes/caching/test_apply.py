"""Caching inside ComfyUI's samplers on a tiny random FLUX: identical where nothing is reused, right
where something is, and nothing left behind.
"""

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from caching_runs import STEPS, blocks_run, conditioning, draw, left_behind
from nibble.accel.caching.teacache import IDENTITY
from nibble.nodes.bridge.caching.apply import apply_smoothcache, apply_teacache, notes
from nibble.nodes.bridge.caching.measure import Measurement, measure
from nibble.nodes.bridge.caching.models import level_of, published
from nibble.nodes.bridge.caching.run import KEY
from nibble.nodes.bridge.caching.settings import (
    PRESETS,
    SmoothCacheSettings,
    TeaCacheSettings,
    preset,
)
from nibble.nodes.bridge.host.fingerprint import PLAIN, fingerprint
from nibble.nodes.bridge.host.progress import Progress
from nibble.quant.files.errors import FileRefused


@pytest.fixture
def flux(dense_model):
    return dense_model


@pytest.fixture
def calibration(flux):
    sigmas = comfy.samplers.calculate_sigmas(
        flux.get_model_object("model_sampling"), "simple", STEPS
    )
    return measure(
        Measurement(
            model=flux,
            positive=conditioning(3) + conditioning(4),
            negative=None,
            cfg=1.0,
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=sigmas,
            latent={"samples": torch.zeros(1, 16, 8, 8)},
            seed=5,
        ),
        Progress("calibrating"),
    )


BLOCK_0 = {"rule": "teacache", "coefficients": IDENTITY, "feature": "first_residual"}
ZERO = {
    "error, steps": TeaCacheSettings(0.0),
    "error, blocks": TeaCacheSettings(0.0, level="blocks"),
    "TeaCache": TeaCacheSettings(0.0, rule="teacache", coefficients=IDENTITY),
    "block-0 probe": TeaCacheSettings(0.0, **BLOCK_0),
    "SmoothCache step": SmoothCacheSettings(0.0),
    "SmoothCache block": SmoothCacheSettings(0.0, "block"),
    "SmoothCache sublayer": SmoothCacheSettings(0.0, "sublayer"),
}


def cached(model, settings, calibration, watch):
    """The MODEL with the cache of these settings; SmoothCache's with a calibration."""
    if isinstance(settings, TeaCacheSettings):
        return apply_teacache(model, settings, watch=watch)
    return apply_smoothcache(model, settings, calibration, watch)


@pytest.mark.parametrize("cfg", [None, 3.0])
@pytest.mark.parametrize("method", ZERO)
def test_a_threshold_of_zero_is_bit_identical(flux, calibration, method, cfg):
    seen = []
    found = draw(cached(flux, ZERO[method], calibration, seen.append), cfg)
    assert torch.equal(found, draw(flux, cfg))
    assert seen[-1].reused == 0
    assert seen[-1].done == STEPS
    assert left_behind(flux) == []


USED = {
    "error, steps": TeaCacheSettings(0.5),
    "error, blocks": TeaCacheSettings(1.0, level="blocks"),
    "TeaCache": TeaCacheSettings(0.5, rule="teacache", coefficients=IDENTITY),
    "block-0 probe": TeaCacheSettings(0.5, **BLOCK_0),
    "budget": SmoothCacheSettings(budget=5),
    "budget without calibration": SmoothCacheSettings(budget=5),
    "SmoothCache step": SmoothCacheSettings(0.6),
    "SmoothCache block": SmoothCacheSettings(0.6, "block"),
    "SmoothCache sublayer": SmoothCacheSettings(0.6, "sublayer"),
}


@pytest.mark.parametrize("method", USED)
def test_reuse_saves_work_keeps_the_ends_and_stays_close(flux, calibration, method):
    seen, count, plain = [], blocks_run(flux), draw(flux)
    known = None if method.endswith("without calibration") else calibration
    patched = cached(flux, USED[method], known, seen.append)
    count[0] = 0
    found = draw(patched)
    record = seen[-1]
    assert record.reused > 0
    assert record.cells[0].computed
    assert record.cells[STEPS - 1].computed
    assert count[0] < STEPS
    assert record.work < record.calls
    far, size = (found - plain).square().mean().sqrt(), plain.square().mean().sqrt()
    assert 0 < far < 0.25 * size
    assert torch.equal(draw(patched), found)
    assert torch.equal(draw(flux), plain)
    assert left_behind(flux) == []


@pytest.mark.parametrize("method", ["error, steps", "TeaCache", "SmoothCache block"])
def test_computed_steps_return_what_the_plain_model_returns(flux, calibration, method):
    """Every call of a run is repeated, same x and sigma, by the model without a cache."""
    calls, seen = [], []

    def noted(executor, x, t, *args, **kwargs):
        given = x.clone()
        out = executor(x, t, *args, **kwargs)
        calls.append((given, t, args, kwargs, out))
        return out

    outside = flux.clone()
    outside.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "noted", noted)
    draw(cached(outside, USED[method], calibration, seen.append))
    comfy.model_management.load_models_gpu([flux])
    checked = 0
    for (x, t, args, kwargs, out), cell in zip(calls, seen[-1].cells.values(), strict=True):
        bare = [{} if isinstance(value, dict) else value for value in args]
        if cell.computed:
            checked += 1
            assert torch.equal(out, flux.model.apply_model(x, t, *bare, **kwargs))
    assert 2 <= checked < len(calls)


def test_blocks_that_write_into_their_input_do_not_spoil_the_residual(flux):
    """The same x at nearly the same noise level, asked twice: the reused answer must be the
    computed one, up to rounding.
    """

    def twice(model, x, sigmas, extra_args=None, callback=None, disable=None, **options):
        sigma = sigmas[0] * x.new_ones([x.shape[0]])
        answers.append(model(x, sigma, **extra_args))
        answers.append(model(x, sigma * 0.9999, **extra_args))
        return x

    answers, seen = [], []
    patched = apply_teacache(
        flux,
        TeaCacheSettings(1.0, rule="teacache", order=0, coefficients=IDENTITY, first=0, last=0),
        watch=seen.append,
    )
    guider = comfy.samplers.CFGGuider(patched)
    guider.inner_set_conds({"positive": conditioning()})
    x = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    count = blocks_run(flux)
    guider.sample(
        x,
        torch.zeros_like(x),
        comfy.samplers.KSAMPLER(twice),
        torch.tensor([0.7, 0.4, 0.0]),
        disable_pbar=True,
        seed=0,
    )
    assert count[0] == 1
    assert (answers[0] - answers[1]).abs().max() < 1e-2 * answers[0].abs().max()


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2m", "euler_ancestral"])
def test_other_samplers(flux, sampler):
    """Samplers of two stages ask twice a step; each stage has a history of its own. Fresh noise
    leaves a random model nothing to foretell.
    """
    plain = draw(flux, sampler=sampler)
    assert torch.equal(draw(apply_teacache(flux, TeaCacheSettings(0.0)), sampler=sampler), plain)
    if sampler == "euler_ancestral":
        assert torch.isfinite(
            draw(apply_smoothcache(flux, SmoothCacheSettings(budget=5)), sampler=sampler)
        ).all()
        return
    seen = []
    found = draw(apply_teacache(flux, TeaCacheSettings(0.5), watch=seen.append), sampler=sampler)
    assert seen[-1].computed_calls < seen[-1].calls
    assert (found - plain).square().mean() < 0.1 * plain.square().mean()


def test_applying_again_replaces_and_the_model_given_stays_plain(flux):
    patched = apply_smoothcache(
        apply_teacache(flux, TeaCacheSettings(0.5)), SmoothCacheSettings(budget=5)
    )
    assert KEY not in flux.wrappers.get(WrappersMP.OUTER_SAMPLE, {})
    assert {
        kind: len(entries[KEY]) for kind, entries in patched.wrappers.items() if entries.get(KEY)
    } == {WrappersMP.OUTER_SAMPLE: 1, WrappersMP.CALC_COND_BATCH: 1, WrappersMP.APPLY_MODEL: 1}


def test_an_exception_in_a_reused_step_leaves_nothing(flux, calibration):
    class Stop(Exception):
        pass

    for method in ("SmoothCache block", "SmoothCache sublayer", "TeaCache"):
        seen, plain = [], draw(flux)

        def stop(step, *_, seen=seen):
            if seen and seen[-1].reused:
                raise Stop

        patched = cached(flux, USED[method], calibration, seen.append)
        with pytest.raises(Stop):
            draw(patched, callback=stop)
        assert left_behind(flux) == []
        assert left_behind(patched) == []
        assert torch.equal(draw(flux), plain)


def test_a_quantized_model_is_calibrated_and_cached_by_its_own_file(model, dense_model):
    sigmas = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", STEPS
    )
    found = measure(
        Measurement(
            model=model,
            positive=conditioning(3),
            negative=None,
            cfg=1.0,
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=sigmas,
            latent={"samples": torch.zeros(1, 16, 8, 8)},
            seed=5,
        ),
        Progress("calibrating"),
    )
    assert found.model["weights"] != PLAIN
    assert found.model["fingerprint"] != fingerprint(dense_model)
    seen, plain = [], draw(model)
    assert torch.equal(draw(apply_teacache(model, TeaCacheSettings(0.0))), plain)
    drawn = draw(apply_smoothcache(model, SmoothCacheSettings(budget=6), found, seen.append))
    assert seen[-1].computed == 6
    assert (drawn - plain).square().mean() < 0.1 * plain.square().mean()
    with pytest.raises(FileRefused, match="was made for"):
        apply_smoothcache(dense_model, SmoothCacheSettings(0.1), found)


# a random model's residuals are harder to guess than its velocity
@pytest.mark.parametrize("depth, threshold", [("step", 0.5), ("blocks", 1.0)])
def test_torch_compile_of_blocks_and_of_the_model(flux, depth, threshold):
    """Per-block keys with hooks on the blocks; the whole model with whole steps, where caching adds
    no graph.
    """
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    keys = (
        ["diffusion_model"]
        if depth == "step"
        else [
            "diffusion_model.double_blocks.0",
            "diffusion_model.single_blocks.0",
            "diffusion_model.single_blocks.1",
        ]
    )
    torch._dynamo.reset()
    compiled = flux.clone()
    set_torch_compile_wrapper(compiled, backend=backend, keys=keys)
    plain, without = draw(compiled), len(graphs)
    torch._dynamo.reset()
    graphs.clear()
    cached = flux.clone()
    set_torch_compile_wrapper(cached, backend=backend, keys=keys)
    seen = []
    cached = apply_teacache(cached, TeaCacheSettings(threshold, level=depth), watch=seen.append)
    found = draw(cached)
    assert seen[-1].reused > 0
    assert (found - plain).square().mean() < 0.1 * plain.square().mean()
    assert len(graphs) == without > 0
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "wrong",
    [
        {"threshold": -1},
        {"threshold": 9.0},
        {"threshold": 0.1, "start": 0.9, "end": 0.1},
        {"threshold": 0.1, "order": 7},
        {"threshold": 0.1, "rule": "magic"},
        {"threshold": 0.1, "damping": 2},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError):
        TeaCacheSettings(**wrong)


def test_smoothcache_says_what_it_needs(flux):
    with pytest.raises(ValueError, match="Calibrate Cache"):
        apply_smoothcache(flux, SmoothCacheSettings(0.1))
    with pytest.raises(ValueError, match="budget"):
        SmoothCacheSettings(budget=5, depth="block")


def test_a_low_bit_models_presets_skip_more_easily(flux, model):
    assert all(preset(name, model).threshold >= preset(name, flux).threshold for name in PRESETS)
    assert preset("quality", model) != preset("quality", flux)


def test_presets_and_notes(flux):
    thresholds = [preset(name, flux).threshold for name in ("quality", "balanced", "fast")]
    assert thresholds == sorted(thresholds)
    assert level_of(flux) == "sublayer"
    assert published(flux) is None
    said = notes(flux, TeaCacheSettings(0.3, rule="teacache"), sigmas=torch.linspace(1, 0, 5))
    assert "4 steps" in said[0]
    assert "coefficients" in said[1]
    assert notes(flux, preset("fast", flux), sigmas=torch.linspace(1, 0, 29)) == []
