"""CAF Invert inside ComfyUI: there and back again, and what the nodes refuse and tell."""

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch

import tiny_models
from caching_runs import conditioning
from caf_files import heads, worn
from caf_sampling_runs import FILE, draw, noise
from nibble.accel.caf import flow
from nibble.accel.caf import heads as nets
from nibble.accel.caf.coordinates import Coordinates
from nibble.nodes import caf as nodes
from nibble.nodes.bridge.caf import invert as caf_invert
from nibble.nodes.bridge.caf import load as caf_model
from nibble.nodes.bridge.caf import sample as caf_sampling


@pytest.fixture
def model(dense_model):
    return worn(dense_model, h=1.5)


def directly(model, latent, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noise, velocity, latent again) by the equations on the model's two nets, without our
    samplers.
    """
    found = []

    def both_ways(model, x, sigmas, extra_args=None, **_):
        ask, h = (
            caf_model.asking(model, extra_args, Coordinates()),
            caf_model.heads_of(model.inner_model.model_patcher).adapter.h,
        )
        velocity, accelerate, times = (
            nets.velocity_net(ask, h),
            nets.acceleration_net(ask, h),
            flow.uniform(steps),
        )
        start, v = flow.invert(velocity, accelerate, model.latent_image, times[::-1], flow.AHEAD, h)
        found.extend(
            [start, v, flow.sample(velocity, accelerate, start, times, v, ahead=flow.AHEAD, h=h)]
        )
        return x

    draw(model, comfy.samplers.KSAMPLER(both_ways), torch.tensor([1.0, 0.0]), latent=latent)
    return found[0], found[1], model.model.process_latent_out(found[2])


@pytest.mark.parametrize("trained", [False, True])
def test_inverted_and_drawn_again_it_is_what_the_equations_give(dense_model, trained):
    model, latent = worn(dense_model, seed=0 if trained else None, h=1.5), 0.5 * noise(7, batch=2)
    errors = []
    for steps in (2, 16):
        found, velocity = caf_invert.invert(model, conditioning(), {"samples": latent}, steps)
        again = draw(
            model,
            caf_sampling.sampler(velocity),
            caf_sampling.sigmas(model, steps),
            found.generate_noise({"samples": latent}),
        )
        expected = directly(model, latent, steps)
        for ours, theirs in zip((found.noise, velocity.start, again), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        errors.append(((again - latent).norm() / latent.norm()).item())
        assert velocity.name == FILE
        assert found.seed == 0
    assert errors[1] < 0.5 * errors[0], errors


def test_another_prompt_makes_another_picture_of_the_same_noise(model):
    latent = noise(7)
    found, velocity = caf_invert.invert(model, conditioning(), {"samples": latent}, 4)
    sigmas, start = caf_sampling.sigmas(model, 4), found.generate_noise({"samples": latent})
    again, edited = (
        draw(model, caf_sampling.sampler(velocity), sigmas, start, positive=conditioning(seed))
        for seed in (0, 5)
    )
    free = draw(model, caf_sampling.sampler(), sigmas, start, positive=conditioning(5))
    assert not torch.allclose(again, edited)
    assert not torch.allclose(free, edited)


@pytest.mark.parametrize("family", ["wan 2.1", "sd3"])
def test_other_latents_come_back_too(family):
    """A video, and a picture of another family, through a NOISE and a guider as
    SamplerCustomAdvanced does it.
    """
    model = worn(tiny_models.build(family), seed=None)
    latent = {"samples": tiny_models.latent(family)}
    found, velocity = caf_invert.invert(model, tiny_models.prompt(family), latent, 24)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(tiny_models.prompt(family), tiny_models.prompt(family))
    again = guider.sample(
        found.generate_noise(latent),
        latent["samples"] * 0,
        caf_sampling.sampler(velocity),
        caf_sampling.sigmas(model, 24),
        disable_pbar=True,
        seed=0,
    )
    assert (again - latent["samples"]).norm() < 0.2 * latent["samples"].norm()


def test_noise_that_a_model_scales_is_given_unscaled():
    model = worn(tiny_models.build("flux"))
    latent = {"samples": tiny_models.latent("flux")}
    plain, _ = caf_invert.invert(model, tiny_models.prompt("flux"), latent, 2)
    model.get_model_object("model_sampling").noise_scale = 8.0
    scaled, _ = caf_invert.invert(model, tiny_models.prompt("flux"), latent, 2)
    torch.testing.assert_close(scaled.noise * 8, plain.noise)


def test_what_does_not_fit_is_refused_in_words(model, dense_model):
    latent = noise(7)
    found, velocity = caf_invert.invert(model, conditioning(), {"samples": latent}, 1)
    with pytest.raises(
        ValueError,
        match="noise from CAF Invert is of a latent 1 x 16 x 8 x 8, and this one is 2 x 16 x 8 x 8",
    ):
        found.generate_noise({"samples": noise(batch=2)})
    with pytest.raises(
        ValueError,
        match="velocity from CAF Invert is of a latent 1 x 16 x 8 x 8, and this one is 2 x",
    ):
        draw(model, caf_sampling.sampler(velocity), caf_sampling.sigmas(model, 1), noise(batch=2))
    other = caf_model.with_heads(dense_model, heads(dense_model), "other.caf.safetensors")
    with pytest.raises(
        ValueError, match="found with test.caf.safetensors.*has other.caf.safetensors"
    ):
        draw(other, caf_sampling.sampler(velocity), caf_sampling.sigmas(other, 1))
    for wrong, words in (
        (torch.zeros(1, 16, 8, 8), "latent is empty"),
        (noise()[:, :4], "1 x 4 x 8 x 8.*16 channels"),
    ):
        with pytest.raises(ValueError, match=words):
            caf_invert.invert(model, conditioning(), {"samples": wrong}, 1)
    with pytest.raises(ValueError, match="no CAF heads"):
        caf_invert.invert(dense_model, conditioning(), {"samples": latent}, 1)


def test_the_nodes_tell_what_they_cost(model):
    output = nodes.NibbleCAFSampler.execute(model=model, steps=2, denoise=1.0, ahead=0.5)
    chart = output.ui["nibble_chart"][0]
    assert chart["title"] == "2 steps, 3 calls of the model"
    assert output[1].tolist() == [1.0, 0.375, 0.0]
    assert dict(chart["summary"]) | {"calls": ""} == {
        "calls": "",
        "pace": "h = 1.5",
        "sigmas": "1.000  0.375  0.000",
        "file": FILE,
    }
    result = nodes.NibbleCAFInvert.execute(
        model=model, positive=conditioning(), latent_image={"samples": noise()}, steps=1, ahead=0.5
    )
    noise_, velocity, ui = result[0], result[1], result.ui
    assert ui["nibble_chart"][0]["title"] == "inverted in 1 step, 2 calls of the model"
    assert isinstance(noise_, caf_invert.InvertedNoise)
    given = nodes.NibbleCAFSampler.execute(
        model=model, steps=1, denoise=1.0, ahead=0.0, velocity=velocity
    )
    assert given.ui["nibble_chart"][0]["title"] == "1 step, 1 call of the model"
    assert given[0].extra_options == {"velocity": velocity, "ahead": 0.0}
