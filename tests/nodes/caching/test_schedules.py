"""Error control and calibrations on the trained demo FLUX under every schedule of noise: a
threshold means the same error of the picture in all of them.
"""

import comfy.samplers
import comfy.sd
import pytest
import torch

from nibble.accel.caching.flow_time import FlowTime
from nibble.demo import pictures, prompts
from nibble.nodes.bridge.caching.apply import apply_smoothcache, apply_teacache
from nibble.nodes.bridge.caching.measure import Measurement, measure
from nibble.nodes.bridge.caching.run import flow_time
from nibble.nodes.bridge.caching.settings import PRESETS, SmoothCacheSettings, TeaCacheSettings
from nibble.nodes.bridge.host.progress import Progress
from noise_schedules import SCHEDULES

STEPS = 28
# what is computed where every row of skipped steps is as long as may be
SHORTEST = 8


def conditioning(*texts: str) -> list:
    tokens, pooled = prompts.embed(prompts.word_indices(texts))
    return [[tokens, {"pooled_output": pooled, "guidance": 3.5}]]


DRAWN = (
    "a green star top on navy",
    "a cyan triangle bottom left on navy",
    "a red cross top on white",
    "a purple circle bottom left on grey",
)


def draw(model, sigmas) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": conditioning(*DRAWN)})
    noise = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(20000))
    euler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), euler, sigmas, disable_pbar=True, seed=1)


def psnr(found: torch.Tensor, reference: torch.Tensor) -> float:
    """dB of latents, the mean over the batch; the peak is a latent's range."""
    peaks = (reference.amax((1, 2, 3)) - reference.amin((1, 2, 3))).square()
    return float(10 * torch.log10(peaks / (found - reference).square().mean((1, 2, 3))).mean())


@pytest.fixture(scope="module")
def demo():
    return comfy.sd.load_diffusion_model(
        str(pictures.FLUX_FILE), model_options={"dtype": torch.float32}
    )


TRIED = ("flow", "cosmos", "cosmos, karras", "eps", "v, zero SNR", "EDM")


@pytest.mark.parametrize("name", TRIED)
def test_each_preset_is_better_than_as_many_plain_steps(demo, name):
    schedule = SCHEDULES[name]
    model = schedule.on(demo)
    sigmas = schedule.sigmas(model, STEPS)
    reference = draw(model, sigmas)
    reached, counts = [], []
    for threshold in PRESETS.values():
        seen = []
        cached = apply_teacache(model, TeaCacheSettings(threshold), watch=seen.append)
        reached.append(psnr(draw(cached, sigmas), reference))
        record = seen[-1]
        counts.append(record.computed)
        plain = psnr(draw(model, schedule.sigmas(model, record.computed)), reference)
        assert reached[-1] > plain + 1, (name, threshold, reached, plain)
        judged = [cell for cell in record.cells.values() if cell.why == "threshold"]
        assert any(cell.change >= threshold for cell in judged), "capped by the row's length alone"
    assert counts == sorted(counts, reverse=True)
    assert counts[1] > SHORTEST
    assert reached == sorted(reached, reverse=True)
    assert reached[0] > 58
    assert reached[1] > 53
    assert reached[2] > 46


def calibrated(model, sigmas):
    return measure(
        Measurement(
            model=model,
            positive=conditioning("a pink ring left on white"),
            negative=None,
            cfg=1.0,
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=sigmas,
            latent={"samples": torch.zeros(1, 16, 8, 8)},
            seed=5,
            depths=("step",),
        ),
        Progress("calibrating"),
    )


@pytest.mark.parametrize("name", ["cosmos", "EDM"])
def test_a_calibration_serves_its_schedule(demo, name):
    """alpha and a budget on a schedule to sigma 80."""
    schedule = SCHEDULES[name]
    model = schedule.on(demo)
    sigmas = schedule.sigmas(model, STEPS)
    calibration = calibrated(model, sigmas)
    reference = draw(model, sigmas)
    for settings in (SmoothCacheSettings(alpha=0.15), SmoothCacheSettings(budget=14)):
        seen = []
        cached = apply_smoothcache(model, settings, calibration, seen.append)
        reached = psnr(draw(cached, sigmas), reference)
        plain = psnr(draw(model, schedule.sigmas(model, seen[-1].computed)), reference)
        assert seen[-1].computed < STEPS
        assert reached > plain, (name, settings, reached, plain)


def test_skipped_steps_are_guessed_by_fitted_weights_on_the_calibrated_schedule_alone(demo):
    schedule = SCHEDULES["flow"]
    model = schedule.on(demo)
    sigmas = schedule.sigmas(model, STEPS)
    calibration = calibrated(model, sigmas)
    fitted, line = (
        apply_smoothcache(model, SmoothCacheSettings(budget=7, order=order), calibration)
        for order in (None, 1)
    )
    reference = draw(model, sigmas)
    assert psnr(draw(fitted, sigmas), reference) > psnr(draw(line, sigmas), reference) + 1
    other = schedule.sigmas(model, STEPS - 1)
    assert torch.equal(draw(fitted, other), draw(line, other))


def test_the_time_is_read_from_comfyuis_own_kinds_of_sampling(demo):
    assert flow_time(demo) == FlowTime()
    kinds = {name: flow_time(SCHEDULES[name].on(demo)) for name in ("cosmos", "eps", "EDM")}
    assert kinds == {
        "cosmos": FlowTime(mixes=False),
        "eps": FlowTime(mixes=False),
        "EDM": FlowTime(mixes=False, data=0.5),
    }
