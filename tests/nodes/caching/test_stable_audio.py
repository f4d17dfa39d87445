"""Stable Audio's layers, one module down: measured by the paper's definition, reused by what was
measured. That reuse is exact and right is tested on every family (test_families,
test_reused_formula).
"""

import numpy as np
import pytest
import torch

import tiny_models
from family_caching import calibrated
from nibble.accel.caching.smoothcache import greedy_mask
from nibble.nodes.bridge.caching.apply import apply_smoothcache
from nibble.nodes.bridge.caching.settings import SmoothCacheSettings

STEPS = 6
PARTS = ("self_attn", "cross_attn", "ff")


@pytest.mark.parametrize("family", ["stable audio", "stable audio 3"])
def test_its_parts_are_measured_and_reused_each_by_its_own_errors(family):
    model = tiny_models.build(family)
    layers = model.model.diffusion_model.transformer.layers
    seen: dict[int, list[torch.Tensor]] = {}
    handles = [
        layer.self_attn.register_forward_hook(
            lambda module, given, out, place=place: seen.setdefault(place, []).append(out.clone())
        )
        for place, layer in enumerate(layers)
    ]
    calibration = calibrated(model, family, STEPS)
    for handle in handles:
        handle.remove()
    kinds = [f"layer.{part}" for part in PARTS]
    assert calibration.curves.keys() == {"step", "layer", *kinds}
    errors = [
        float((outs[4] - outs[2]).abs().mean() / outs[4].abs().mean()) for outs in seen.values()
    ]
    assert len(errors) == len(layers)
    found = calibration.curves["layer.self_attn"].mean[1][2]
    assert found == pytest.approx(np.mean(errors), rel=1e-4)

    alpha, records = float(np.median(calibration.curves["layer.ff"].mean[0])), []
    settings = SmoothCacheSettings(alpha=alpha, depth="sublayer")
    cached = apply_smoothcache(model, settings, calibration, records.append)
    tiny_models.sample(cached, family, STEPS)
    for kind in kinds:
        mask = greedy_mask(calibration.curves[kind].mean, alpha)
        assert [records[-1].rows[kind][i] for i in range(STEPS)] == mask, kind
