"""CAF Sampler and CAF Invert inside ComfyUI: paths known by hand, calls counted, masks, guidance,
any sigmas; there and back again.
"""

from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

import tiny_models
from caching_runs import conditioning
from caf_files import heads, worn
from nibble.accel.caf import flow
from nibble.accel.caf import heads as nets
from nibble.nodes import caf as nodes
from nibble.nodes.bridge.caching.apply import apply_teacache
from nibble.nodes.bridge.caching.settings import TeaCacheSettings
from nibble.nodes.bridge.caf import invert as caf_invert
from nibble.nodes.bridge.caf import load as caf_model
from nibble.nodes.bridge.caf import sample as caf_sampling

DATA, FILE = -3.0, "test.caf.safetensors"


class Known:
    """What KSAMPLER hands to a sampler function: a model that knows the one picture there is, DATA
    everywhere; counts its calls.
    """

    def __init__(self, h: float):
        worn = caf_model.Heads(FILE, SimpleNamespace(h=h))
        self.inner_model = SimpleNamespace(
            model_patcher=SimpleNamespace(get_attachment={caf_model.KEY: worn}.get)
        )
        self.calls = []

    def __call__(self, x, sigma, model_options):
        self.calls.append(
            (sigma.tolist(), model_options["transformer_options"][caf_model.KEY].head)
        )
        return torch.full_like(x, DATA)


def walk(
    h: float, sigmas: list[float], x: float = 5.0, velocity=None, callback=None, ahead: float = 0.0
):
    model, x = Known(h), torch.full((2, 1, 1, 1), x)
    end = caf_sampling.constant_acceleration_flow(
        model,
        x,
        torch.tensor(sigmas),
        {"model_options": {}},
        callback,
        disable=True,
        velocity=velocity,
        ahead=ahead,
    )
    return end, model.calls


@pytest.mark.parametrize("ahead", [0.0, 0.5])
@pytest.mark.parametrize("h", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [1.0, 0.9, 0.1, 0.0], [1.0, 0.7, 0.4, 0.0]])
def test_where_there_is_one_picture_every_path_ends_at_it(h, sigmas, ahead):
    seen = []
    end, calls = walk(
        h,
        sigmas,
        ahead=ahead,
        callback=lambda told: seen.append(
            (told["i"], told["sigma"].item(), told["denoised"].mean().item())
        ),
    )
    torch.testing.assert_close(end, torch.full_like(end, DATA), rtol=1e-4, atol=1e-3)
    assert [head for _, head in calls] == ["velocity"] + ["acceleration"] * (len(sigmas) - 1), (
        "N + 1 calls"
    )
    times = flow.time_of(1 - torch.tensor(sigmas, dtype=torch.float64), h)
    asked = 1 - flow.retimed(torch.lerp(times[:-1], times[1:], ahead if h else 0.0), h)
    assert [level for (level, _), _ in calls] == pytest.approx([1.0, *asked.tolist()], abs=1e-3)
    assert [(i, sigma) for i, sigma, _ in seen] == [
        (i, pytest.approx(sigma)) for i, sigma in enumerate(sigmas[:-1])
    ]
    assert [denoised for *_, denoised in seen] == [pytest.approx(DATA, abs=1e-3)] * (
        len(sigmas) - 1
    ), "previews show where the path leads"


def test_half_a_path_ends_on_the_line_and_the_rest_may_follow():
    """Halves as Split Sigmas makes them: at sigma 0.3 it is at 0.3 noise + 0.7 data, and the second
    half asks for the velocity anew.
    """
    middle, calls = walk(1.5, [1.0, 0.6, 0.3])
    torch.testing.assert_close(
        middle, torch.full_like(middle, 0.3 * 5 + 0.7 * DATA), rtol=1e-4, atol=1e-4
    )
    end, more = walk(1.5, [0.3, 0.1, 0.0], x=middle.mean().item())
    torch.testing.assert_close(end, torch.full_like(end, DATA), rtol=1e-4, atol=1e-3)
    assert len(calls) == len(more) == 3
    assert more[0][1] == "velocity"
    assert more[0][0] == pytest.approx([0.3] * 2)


def test_a_velocity_that_is_given_is_not_asked_for():
    h = 1.5
    end, calls = walk(
        h,
        [1.0, 0.5, 0.0],
        velocity=caf_sampling.Velocity(torch.full((2, 1, 1, 1), h * (DATA - 5)), FILE),
    )
    torch.testing.assert_close(end, torch.full_like(end, DATA), rtol=1e-4, atol=1e-3)
    assert [head for _, head in calls] == ["acceleration"] * 2


def test_no_steps_ask_nothing():
    for sigmas in ([], [0.5]):
        end, calls = walk(1.0, sigmas)
        assert calls == []
        assert end.tolist() == [[[[5.0]]]] * 2


@pytest.mark.parametrize(
    "sigmas, words",
    [
        ([0.0001, 0.5, 1.0], "rise.*CAF Invert"),
        ([14.6, 2.0, 0.0], "between 1 and 0.*14.6 to 0"),
        ([1.0, 0.5, 0.7, 0.0], "rise"),
    ],
)
def test_sigmas_that_do_not_fall_from_1_to_0_are_refused(sigmas, words):
    with pytest.raises(ValueError, match=words):
        walk(1.0, sigmas)


def test_its_own_sigmas_are_even_in_time(dense_model):
    for h in (0.5, 1.0, 1.5):
        model = worn(dense_model, h=h)
        found = caf_sampling.sigmas(model, 4)
        torch.testing.assert_close(
            flow.time_of(1 - found, h), torch.linspace(0, 1, 5), rtol=0, atol=1e-5
        )
        assert found[0] == 1
        assert found[-1] == 0
        assert found.dtype == torch.float32
        part = caf_sampling.sigmas(model, 2, denoise=0.5)
        torch.testing.assert_close(part, found[2:])
    assert caf_sampling.sigmas(worn(dense_model, h=1.5), 2).tolist() == [1.0, 0.375, 0.0]


# ---- in ComfyUI


def noise(seed: int = 0, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def draw(
    model,
    sampler,
    sigmas,
    start=None,
    latent=None,
    mask=None,
    cfg: float = 1.0,
    callback=None,
    negative=None,
    positive=None,
):
    start = noise() if start is None else start
    return comfy.sample.sample_custom(
        model,
        start,
        cfg,
        sampler,
        sigmas,
        positive or conditioning(),
        negative or conditioning(9),
        torch.zeros_like(start) if latent is None else latent,
        noise_mask=mask,
        callback=callback,
        disable_pbar=True,
        seed=0,
    )


@pytest.fixture
def model(dense_model):
    return worn(dense_model, h=1.5)


def test_one_step_of_untrained_heads_is_one_of_euler(dense_model):
    for h in (1.0, 1.5):
        ours = draw(
            worn(dense_model, seed=None, h=h),
            caf_sampling.sampler(ahead=0.0),
            torch.tensor([1.0, 0.0]),
        )
        torch.testing.assert_close(
            ours,
            draw(dense_model, comfy.samplers.ksampler("euler"), torch.tensor([1.0, 0.0])),
            rtol=1e-5,
            atol=1e-5,
        )


def test_n_steps_are_n_plus_one_calls_and_n_previews_the_last_of_which_is_the_picture(model):
    calls, seen = [], []
    model.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL,
        "count",
        lambda executor, *args, **kwargs: (calls.append(1), executor(*args, **kwargs))[1],
    )
    found = draw(
        model,
        caf_sampling.sampler(),
        caf_sampling.sigmas(model, 3),
        callback=lambda *told: seen.append(told),
    )
    assert len(calls) == 4
    assert [(step, total) for step, _, _, total in seen] == [(0, 3), (1, 3), (2, 3)]
    torch.testing.assert_close(
        model.model.process_latent_out(seen[-1][1]), found, rtol=1e-4, atol=1e-4
    )
    assert torch.equal(draw(model, caf_sampling.sampler(), caf_sampling.sigmas(model, 3)), found), (
        "the same seed gives the same bits"
    )


@pytest.mark.parametrize("scheduler", ["simple", "beta", "karras", "sgm_uniform"])
def test_any_schedulers_sigmas_will_do(model, scheduler):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), scheduler, 4)
    assert torch.isfinite(draw(model, caf_sampling.sampler(), sigmas)).all()


def test_guidance_by_a_prompt_against_itself_is_none(model):
    sigmas = caf_sampling.sigmas(model, 2)
    plain = draw(model, caf_sampling.sampler(), sigmas)
    torch.testing.assert_close(
        draw(model, caf_sampling.sampler(), sigmas, cfg=4.0, negative=conditioning()),
        plain,
        rtol=1e-3,
        atol=1e-3,
    )
    assert not torch.allclose(
        draw(model, caf_sampling.sampler(), sigmas, cfg=4.0), plain, rtol=1e-2, atol=1e-2
    )


def test_what_a_mask_protects_comes_back_from_noise_and_from_half_way(model):
    latent, mask = noise(7), torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    for denoise in (1.0, 0.5):
        found = draw(
            model,
            caf_sampling.sampler(),
            caf_sampling.sigmas(model, 3, denoise),
            latent=latent,
            mask=mask,
        )
        torch.testing.assert_close(found[..., :4], latent[..., :4], rtol=1e-3, atol=1e-3)
        assert not torch.allclose(found[..., 4:], latent[..., 4:], atol=0.1)


def test_image_to_image_begins_near_the_picture(model):
    """A very short path can change only little."""
    latent = noise(7)
    far = [
        (
            draw(
                model, caf_sampling.sampler(), caf_sampling.sigmas(model, 2, denoise), latent=latent
            )
            - latent
        ).norm()
        for denoise in (0.02, 0.3, 1.0)
    ]
    assert far[0] < 0.2 * far[2]
    assert far[0] < far[1] < far[2]


def test_stop_stops_it_between_calls(model):
    calls = []

    def stop(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing(True)
        return executor(*args, **kwargs)

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "stop", stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(model, caf_sampling.sampler(), caf_sampling.sigmas(model, 5))
    comfy.model_management.interrupt_current_processing(False)
    assert len(calls) == 2


def test_a_guider_whose_model_has_no_heads_is_refused(dense_model, model):
    with pytest.raises(ValueError, match="no CAF heads.*Load CAF Model"):
        draw(dense_model, caf_sampling.sampler(), caf_sampling.sigmas(model, 2))


@pytest.mark.parametrize("level", ["step", "blocks"])
def test_a_cache_on_either_side_sees_one_call_a_step(dense_model, level):
    """At a threshold of 0 no bit changes; above, steps are reused, and the call for the velocity is
    none of them.
    """
    records, model = [], worn(dense_model)
    sigmas = caf_sampling.sigmas(model, 8)
    plain = draw(model, caf_sampling.sampler(), sigmas)

    def cached(model, threshold: float):
        return apply_teacache(model, TeaCacheSettings(threshold, level=level), watch=records.append)

    for threshold in (0.0, 1.0):
        for both in (
            cached(model, threshold),
            caf_model.with_heads(cached(dense_model, threshold), heads(dense_model), FILE),
        ):
            found = draw(both, caf_sampling.sampler(), sigmas)
            assert len(records[-1].cells) == 8
            assert records[-1].calls == 8
            assert torch.equal(found, plain) == (threshold == 0)
            assert (records[-1].reused > 0) == (threshold > 0)
    noise_, velocity = caf_invert.invert(
        cached(model, 0.0), conditioning(), {"samples": noise(7)}, 4
    )
    expected, start = caf_invert.invert(model, conditioning(), {"samples": noise(7)}, 4)
    assert torch.equal(noise_.noise, expected.noise) and torch.equal(velocity.start, start.start)


# ---- there and back again


def directly(model, latent, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(noise, velocity, latent again) by the equations on the model's two nets, without our
    samplers.
    """
    found = []

    def both_ways(model, x, sigmas, extra_args=None, **_):
        ask, h = (
            caf_model.asking(model, extra_args),
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
    assert ui["nibble_chart"][0][
        "title"
    ] == "inverted in 1 step, 2 calls of the model" and isinstance(noise_, caf_invert.InvertedNoise)
    given = nodes.NibbleCAFSampler.execute(
        model=model, steps=1, denoise=1.0, ahead=0.0, velocity=velocity
    )
    assert given.ui["nibble_chart"][0]["title"] == "1 step, 1 call of the model"
    assert given[0].extra_options == {"velocity": velocity, "ahead": 0.0}
