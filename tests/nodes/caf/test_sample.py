"""CAF Sampler inside ComfyUI: paths known by hand, calls counted, masks, guidance, any sigmas."""

from types import SimpleNamespace

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from caching_runs import conditioning
from caf_files import heads, worn
from caf_sampling_runs import DATA, FILE, draw, noise
from nibble.accel.caf import flow
from nibble.nodes.bridge.caching.apply import apply_teacache
from nibble.nodes.bridge.caching.settings import TeaCacheSettings
from nibble.nodes.bridge.caf import invert as caf_invert
from nibble.nodes.bridge.caf import load as caf_model
from nibble.nodes.bridge.caf import sample as caf_sampling


class Known:
    """What KSAMPLER hands to a sampler function: a model that knows the one picture there is, DATA
    everywhere; counts its calls.
    """

    def __init__(self, h: float):
        worn = caf_model.Heads(FILE, SimpleNamespace(h=h))
        self.inner_model = SimpleNamespace(
            model_patcher=SimpleNamespace(get_attachment={caf_model.KEY: worn}.get),
            inner_model=SimpleNamespace(model_sampling=comfy.model_sampling.CONST()),
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
    assert torch.equal(noise_.noise, expected.noise)
    assert torch.equal(velocity.start, start.start)
