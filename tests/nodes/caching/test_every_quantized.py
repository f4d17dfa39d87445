"""The caching nodes on a 4-bit model of every family: calibrated on itself, exact where nothing may
be reused, close where something is.
"""

import comfy.samplers
import pytest

import class_walk
import tiny_models
from class_walk import draw, relative
from nibble.nodes.bridge.caching.apply import apply_smoothcache, apply_teacache
from nibble.nodes.bridge.caching.measure import Measurement, measure
from nibble.nodes.bridge.caching.models import DEPTHS, level_of
from nibble.nodes.bridge.caching.settings import SmoothCacheSettings, TeaCacheSettings
from nibble.nodes.bridge.host.progress import Progress

STEPS = 8
LEVELS = {"step": DEPTHS[:1], "blocks": DEPTHS[:2], "sublayer": DEPTHS}


@pytest.fixture(params=class_walk.EVERY)
def name(request) -> str:
    return request.param


def test_a_4_bit_model_is_calibrated_and_cached(name, tmp_path, monkeypatch):
    class_walk.widen(monkeypatch)
    model = class_walk.load(name, class_walk.quantized(name, tmp_path), monkeypatch)
    plain = draw(model, name, STEPS)
    for rule in ("error", "teacache"):
        never = TeaCacheSettings(threshold=0.0, rule=rule)
        assert relative(draw(apply_teacache(model, never), name, STEPS), plain) == 0
    calibration = measure(
        Measurement(
            model=model,
            positive=tiny_models.prompt(name),
            negative=None,
            cfg=1.0,
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=tiny_models.schedule(model, STEPS),
            # not zeros, to which ComfyUI gives as many channels as the published model has
            latent={"samples": tiny_models.latent(name) * 1e-6},
            seed=1,
        ),
        Progress("measuring"),
    )
    for depth in LEVELS[level_of(model)]:
        drawn = {}
        for alpha in (0.0, 3.0):
            records, settings = [], SmoothCacheSettings(alpha=alpha, depth=depth, order=0)
            patched = apply_smoothcache(model, settings, calibration, records.append)
            drawn[alpha] = (relative(draw(patched, name, STEPS), plain), records[-1].work)
        assert drawn[0.0][0] == 0, depth
        assert drawn[3.0][1] < STEPS, depth
        assert 0 < drawn[3.0][0] < 1, depth
    assert relative(draw(model, name, STEPS), plain) == 0
