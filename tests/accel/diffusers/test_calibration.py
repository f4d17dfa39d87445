"""Calibrations in scripts: what is measured, by its definition, and what they are used for."""

import diffusers
import numpy as np
import pytest
import torch

import nibble
from nibble.accel.caching import calibration_file
from nibble.accel.caching.extrapolate import Reuse
from nibble.accel.caching.smoothcache import greedy_mask
from nibble.accel.diffusers import cache, calibrate
from nibble.accel.diffusers.parts import parts, shares
from nibble.accel.diffusers.schedules import flow_times, velocity
from nibble.quant.files.errors import FileRefused
from tiny_diffusers import build, normal

STEPS = 8
CALLS = [{"steps": STEPS, "seed": 1}, {"steps": STEPS, "seed": 2}]


@pytest.fixture(scope="module")
def measured():
    loop = build("dit")
    return loop, calibrate(loop, CALLS, name="tiny DiT")


def test_a_calibration_holds_the_errors_of_every_kind_of_part(measured, tmp_path):
    loop, calibration = measured
    assert calibration.curves.keys() == {*shares(loop.transformer), "step"}
    assert calibration.model["class"] == "DiTTransformer2DModel"
    assert len(calibration.sigmas) == STEPS + 1 and len(calibration.grams) == 2
    calibration.save(tmp_path / "dit.json")
    again = calibration_file.read(tmp_path / "dit.json")
    assert again.curves.keys() == calibration.curves.keys()
    assert np.allclose(again.grams, calibration.grams, atol=1e-7)


def test_curves_are_the_paper_s_errors(measured):
    """E(t, k) of the attention layers: mean over layers, pictures and both halves of the batch of
    |L_t - L_(t+k)| / |L_t|, from outputs that a plain hook has seen.
    """
    loop, calibration = measured
    seen: dict[str, list[torch.Tensor]] = {}
    handles = [
        layer.register_forward_hook(
            lambda module, given, output, name=name: seen.setdefault(name, []).append(
                output.clone()
            )
        )
        for kind, name, layer in parts(loop.transformer)
        if kind == "transformer_blocks.attn1"
    ]
    errors = []
    for call in CALLS:
        seen.clear()
        loop(**call)
        for outputs in seen.values():
            now, before = outputs[5], outputs[3]
            errors.append(float((now - before).abs().mean() / now.abs().mean()))
    for handle in handles:
        handle.remove()
    found = calibration.curves["transformer_blocks.attn1"].mean[1][3]
    assert found == pytest.approx(np.mean(errors), rel=1e-4)


def test_smoothcache_reuses_what_its_schedule_says(measured):
    loop, calibration = measured
    plain = loop(STEPS)
    with cache(loop, "smoothcache", calibration=calibration, alpha=0.0):
        assert torch.equal(loop(STEPS), plain)
    alpha = float(np.median(calibration.curves["transformer_blocks.attn1"].mean[0]))
    with cache(loop, "smoothcache", calibration=calibration, alpha=alpha) as caching:
        loop(STEPS)
    record = caching.record
    for kind in shares(loop.transformer):
        mask = greedy_mask(calibration.curves[kind].mean, alpha)
        assert [record.rows[kind][i] for i in range(STEPS)] == mask, kind
    assert record.work < STEPS
    assert torch.equal(loop(STEPS), plain)


KINDS = {
    "dit": {"transformer_blocks.attn1", "transformer_blocks.ff"},
    # the paper's Open-Sora: over space and over time, attention to itself, to the prompt, MLP
    "latte": {
        "transformer_blocks.attn1",
        "transformer_blocks.attn2",
        "transformer_blocks.ff",
        "temporal_transformer_blocks.attn1",
        "temporal_transformer_blocks.ff",
    },
    "flux": {
        "transformer_blocks.attn",
        "transformer_blocks.ff",
        "transformer_blocks.ff_context",
        "single_transformer_blocks.attn",
        "single_transformer_blocks.proj_mlp",
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_layer_gives_what_it_gave_when_its_schedule_computed_it(name):
    """By plain forward hooks on the model's own layers; another alpha for each kind, so that no two
    schedules are alike.
    """
    loop = build(name)
    assert shares(loop.transformer).keys() == KINDS[name]
    calibration = calibrate(loop, CALLS)
    for place, kind in enumerate(sorted(KINDS[name])):
        errors = [[9.0] * (STEPS - k) for k in (1, 2, 3)]
        errors[place % 3][place // 3] = 0.0
        calibration.curves[kind].mean = errors
    with cache(loop, "smoothcache", calibration=calibration, alpha=0.5, order=0) as caching:
        found = loop(STEPS)
    rows = caching.record.rows
    assert len({tuple(row.items()) for row in rows.values()}) == len(KINDS[name])
    assert all(False in row.values() for row in rows.values())

    streams = 2 if loop.guided else 1
    for kind, _, layer in parts(loop.transformer):
        counts, held = [], {}

        def reuse(module, given, out, kind=kind, counts=counts, held=held):
            step, stream = divmod(len(counts), streams)
            counts.append(step)
            if rows[kind][step]:
                held[stream] = out
            return held[stream]

        layer.register_forward_hook(reuse)
    torch.testing.assert_close(loop(STEPS), found, rtol=1e-4, atol=1e-5)


def test_a_budget_is_placed_where_the_calibration_found_least_error():
    loop = build("flux")
    calibration = calibrate(loop, [{"steps": STEPS, "seed": 3}])
    loop.scheduler.set_timesteps(STEPS)
    wanted = calibration.mask(4, flow_times(loop.scheduler), Reuse(1))
    with cache(loop, "budget", budget=4, calibration=calibration) as caching:
        loop(STEPS)
    assert [caching.record.cells[i].computed for i in range(STEPS)] == wanted


def test_a_calibration_s_file_will_do(tmp_path):
    loop = build("flux")
    calibration = nibble.calibrate_cache(loop, [{"steps": STEPS}])
    calibration.save(tmp_path / "flux.json")
    drawn = []
    for given in (calibration, tmp_path / "flux.json", str(tmp_path / "flux.json")):
        with nibble.cache(loop, "budget", budget=4, calibration=given):
            drawn.append(loop(STEPS))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_another_model_s_calibration_is_refused(measured):
    with pytest.raises(FileRefused, match="was made for tiny DiT"):
        cache(build("flux"), "budget", budget=4, calibration=measured[1])


def test_too_few_steps_and_no_picture_are_refused():
    loop = build("flux")
    with pytest.raises(ValueError, match="4 steps are too few"):
        calibrate(loop, [{"steps": 4}])
    with pytest.raises(ValueError, match="at least one call"):
        calibrate(loop, [])
    assert "step" not in vars(loop.scheduler)
    assert not any(
        "nibble_cache" in m._diffusers_hook.hooks
        for m in loop.transformer.modules()
        if hasattr(m, "_diffusers_hook")
    )


SCHEDULERS = {
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "DDIM": diffusers.DDIMScheduler(),
    "DDIM, v": diffusers.DDIMScheduler(prediction_type="v_prediction"),
    "DDIM, data": diffusers.DDIMScheduler(prediction_type="sample"),
    "Euler": diffusers.EulerDiscreteScheduler(),
    "DPM++": diffusers.DPMSolverMultistepScheduler(),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_velocities_are_noise_less_data_in_every_scheduler_s_unit(name):
    scheduler = SCHEDULERS[name]
    scheduler.set_timesteps(10)
    data, noise = normal(2, 4, seed=1), normal(2, 4, seed=2)
    i = 4
    time = float(scheduler.timesteps[i])
    if name == "flow":
        sigma = float(scheduler.sigmas[i])
        x, predicted = (1 - sigma) * data + sigma * noise, noise - data
    elif name == "Euler":
        x, predicted = data + float(scheduler.sigmas[i]) * noise, noise
    else:
        share = float(scheduler.alphas_cumprod[int(time)])
        a, b = share**0.5, (1 - share) ** 0.5
        x = a * data + b * noise
        predicted = {"DDIM, v": a * noise - b * data, "DDIM, data": data}.get(name, noise)
    found = velocity(scheduler, predicted, x, i)
    torch.testing.assert_close(found, noise - data, rtol=2e-3, atol=2e-3)
    times = flow_times(scheduler)
    assert len(times) == 11 and all(a > b for a, b in zip(times, times[1:], strict=False))
    assert times[-1] == 0
