"""FLUX's attention as a part of its own: where it is reused, neither its projections nor the
attention run, and other nodes' patches of it are left out. What it gives then is tested on every
family (test_reused_formula).
"""

import copy
from collections import Counter

import pytest
import torch

from caching_runs import STEPS, conditioning, draw, left_behind
from family_caching import measured
from nibble.nodes.bridge.caching.apply import apply_smoothcache, notes
from nibble.nodes.bridge.caching.models import family_of
from nibble.nodes.bridge.caching.settings import SmoothCacheSettings
from nibble.nodes.bridge.caching.wrap_sublayers import shares

SETTINGS = SmoothCacheSettings(alpha=0.1, depth="sublayer", order=0)


@pytest.fixture
def calibration(dense_model):
    """Attention may always be reused, nothing else ever."""
    found = measured(dense_model, "flux", error=0.0)
    found.run = found.run | {"sigmas": [1 - i / STEPS for i in range(STEPS + 1)], "steps": STEPS}
    for kind, curve in found.curves.items():
        error = 0.0 if kind == "double.attn" else 1.0
        curve.mean = [[error] * (STEPS - k) for k in (1, 2, 3)]
    return found


def calls_in_the_first_block(model) -> Counter:
    """How often each of its layers runs from now on."""
    counts = Counter()
    for name, layer in model.model.diffusion_model.double_blocks[0].named_modules():
        layer.register_forward_hook(lambda *_, name=name: counts.update([name]))
    return counts


def test_a_reused_attention_computes_none_of_its_layers(dense_model, calibration):
    calls, records = calls_in_the_first_block(dense_model), []
    draw(apply_smoothcache(dense_model, SETTINGS, calibration, records.append))
    row = records[-1].rows["double.attn"]
    computed = sum(row.values())
    assert 2 <= computed < STEPS / 2
    for stream in ("img", "txt"):
        assert calls[f"{stream}_attn.qkv"] == computed
        assert calls[f"{stream}_attn.proj"] == computed
        assert calls[f"{stream}_mlp.0"] == STEPS
    assert all(records[-1].rows["double.img_mlp"].values())
    assert left_behind(dense_model) == []


def test_attention_itself_and_its_patches_run_where_it_is_computed_alone(dense_model, calibration):
    """Eyes on the function that attends, in double blocks and single ones."""
    seen = {"double": 0, "single": 0, "patched": 0}
    watched, records = dense_model.clone(), []

    def attend(func, q, k, v, *args, **kwargs):
        seen[kwargs["transformer_options"]["block_type"]] += 1
        return func(q, k, v, *args, **kwargs)

    def patch(q, k, v, pe, attn_mask, extra_options):
        seen["patched"] += extra_options["block_type"] == "double"
        return {}

    options = watched.model_options["transformer_options"]
    options["optimized_attention_override"] = attend
    watched.set_model_attn1_patch(patch)
    draw(apply_smoothcache(watched, SETTINGS, calibration, records.append))
    network = dense_model.model.diffusion_model
    computed = sum(records[-1].rows["double.attn"].values())
    assert seen["double"] == seen["patched"] == computed * len(network.double_blocks)
    assert seen["single"] == STEPS * len(network.single_blocks)


def test_two_prompts_of_a_batch_reuse_what_each_of_them_had(dense_model, calibration):
    """With guidance, both prompts in a call: what a prompt gets is what it gets alone."""
    cached = apply_smoothcache(dense_model, SETTINGS, calibration)
    both = draw(cached, cfg=1.0 + 1e-6)
    torch.testing.assert_close(both, draw(cached), rtol=1e-3, atol=1e-3)


def test_another_number_of_words_is_computed(dense_model, calibration):
    """A conditioning that grows in mid-run (a schedule of prompts by Conditioning's ranges)."""
    short, long = conditioning(3), conditioning(3)
    short[0][1] |= {"start_percent": 0.0, "end_percent": 0.5}
    long[0][0] = torch.cat([long[0][0]] * 2, 1)
    long[0][1] |= {"start_percent": 0.5, "end_percent": 1.0}
    found = draw(apply_smoothcache(dense_model, SETTINGS, calibration), positive=short + long)
    plain = draw(dense_model, positive=short + long)
    assert (found - plain).norm() < 0.3 * plain.norm()


def test_a_calibration_of_before_computes_attention(dense_model, calibration):
    """It does not know of it; it reuses what it always did, and says so."""
    old = copy.deepcopy(calibration)
    del old.curves["double.attn"]
    for kind, curve in old.curves.items():
        error = 0.0 if kind == "double.txt_mlp" else 1.0
        curve.mean = [[error] * (STEPS - k) for k in (1, 2, 3)]
    records = []
    draw(apply_smoothcache(dense_model, SETTINGS, old, records.append))
    rows = records[-1].rows
    assert all(rows["double.attn"].values())
    assert not all(rows["double.txt_mlp"].values())
    (said,) = notes(dense_model, SETTINGS, old)
    assert "did not measure double.attn" in said
    assert "Calibrate again" in said
    assert notes(dense_model, SETTINGS, calibration) == []


def test_the_share_of_attention_is_that_of_its_weights(dense_model):
    network = dense_model.model.diffusion_model
    found = shares(network, family_of(network), "sublayer")
    held = {
        name: weight.numel()
        for name, weight in network.named_parameters()
        if name.startswith(("double_blocks.", "single_blocks."))
    }
    attention = sum(size for name, size in held.items() if "_attn." in name)
    assert found["double.attn"] == pytest.approx(attention / sum(held.values()))
