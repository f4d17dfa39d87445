"""The second-order sampler inside ComfyUI: the formula, through CFG and masks; what it refuses;
sigmas at another pace.
"""

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.samplers
import pytest
import torch

from nibble.nodes import caf as nodes
from nibble.nodes.bridge.caf import training_free as caf

SIGMAS = torch.tensor([1.0, 0.75, 0.625, 0.0])


class Inner:
    """What KSAMPLER hands to a sampler function: callable, with the model's sampling two levels
    down.
    """

    def __init__(self, denoise, sampling=comfy.model_sampling.CONST):
        self.inner_model = self
        self.model_sampling = sampling()
        self.denoise = denoise

    def __call__(self, x, sigma, **_):
        assert sigma.shape == x.shape[:1]
        return self.denoise(x, sigma)


@pytest.fixture
def demo(flux_file):
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(flux_file), model_options={"dtype": torch.float32})


def prompt():
    draw = torch.Generator().manual_seed(4)
    return [
        [
            torch.randn(1, 6, 64, generator=draw),
            {"pooled_output": torch.randn(1, 64, generator=draw), "guidance": 3.5},
        ]
    ]


def draw(model, sampler, sigmas=SIGMAS, callback=None, mask=None, latent=None):
    noise = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    return comfy.sample.sample_custom(
        model,
        noise,
        1.0,
        sampler,
        sigmas,
        prompt(),
        prompt(),
        torch.zeros_like(noise) if latent is None else latent,
        noise_mask=mask,
        callback=callback,
        disable_pbar=True,
        seed=0,
    )


def test_it_is_the_formula_worked_out_by_hand():
    """v = 3 sigma^2: 3, 27/16, 75/64 at the three sigmas. Steps -1/4, -1/8, -5/8, so ratios 1/2 and
    5.
    """
    v = [3.0, 27 / 16, 75 / 64]
    expected = (
        2 - v[0] / 4 - (v[1] + (v[1] - v[0]) / 4) / 8 - (v[2] + (v[2] - v[1]) * 5 / 2) * 5 / 8
    )
    model = Inner(
        lambda x, sigma: x - sigma.reshape(-1, 1, 1, 1) * 3 * sigma.reshape(-1, 1, 1, 1) ** 2
    )
    found = caf.constant_acceleration(model, torch.full((2, 1, 1, 1), 2.0), SIGMAS, disable=True)
    assert found.tolist() == [[[[expected]]]] * 2


def test_a_limit_of_0_is_eulers_method_and_1_is_not(demo):
    euler = draw(demo, comfy.samplers.ksampler("euler"))
    torch.testing.assert_close(draw(demo, caf.sampler(0.0)), euler, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(draw(demo, caf.sampler(1.0)), euler, rtol=1e-3, atol=1e-3)


def test_before_the_last_step_it_is_lms_of_order_2(demo):
    sigmas = torch.tensor([1.0, 0.8, 0.7, 0.4])
    lms = draw(demo, comfy.samplers.ksampler("lms", {"order": 2}), sigmas)
    torch.testing.assert_close(draw(demo, caf.sampler(1.0), sigmas), lms, rtol=1e-4, atol=1e-4)


def test_the_same_seed_gives_the_same_bits(demo):
    assert torch.equal(draw(demo, caf.sampler(0.1)), draw(demo, caf.sampler(0.1)))


def test_previews_are_called_once_a_step(demo):
    seen = []
    draw(
        demo,
        caf.sampler(0.1),
        callback=lambda step, denoised, x, total: seen.append(
            (step, total, denoised.shape, x.shape)
        ),
    )
    shape = torch.Size([1, 16, 8, 8])
    assert seen == [(step, 3, shape, shape) for step in range(3)]


def test_stop_stops_it(demo):
    def stop(step, *_):
        assert step == 0, "stopped too late"
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        draw(demo, caf.sampler(0.1), callback=stop)


def test_what_a_mask_protects_comes_back(demo):
    latent = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(7))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 4:] = 1
    found = draw(demo, caf.sampler(1.0), mask=mask, latent=latent)
    torch.testing.assert_close(found[..., :4], latent[..., :4], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[..., 4:], latent[..., 4:], atol=0.1)


@pytest.mark.parametrize(
    "sampling",
    [
        comfy.model_sampling.EPS,
        comfy.model_sampling.V_PREDICTION,
        comfy.model_sampling.COSMOS_RFLOW,
    ],
)
def test_other_models_are_refused_before_any_call(sampling):
    def denoise(x, sigma):
        raise AssertionError("called")

    with pytest.raises(ValueError, match="rectified-flow model.*dpmpp_2m"):
        caf.constant_acceleration(
            Inner(denoise, sampling), torch.zeros(1, 1, 1, 1), SIGMAS, disable=True
        )


def test_sigmas_of_0_before_the_end_are_refused():
    with pytest.raises(ValueError, match="reach 0 before their end"):
        caf.constant_acceleration(
            Inner(None), torch.zeros(1, 1, 1, 1), torch.tensor([1.0, 0.0, 0.5]), disable=True
        )


def test_a_step_of_no_length_and_no_steps_at_all():
    model = Inner(lambda x, sigma: x - sigma.reshape(-1, 1, 1, 1))
    for sigmas, expected in (([1.0, 1.0, 0.5, 0.5, 0.0], 4.0), ([0.5], 5.0), ([], 5.0)):
        assert (
            caf.constant_acceleration(
                model, torch.full((1, 1, 1, 1), 5.0), torch.tensor(sigmas), disable=True
            ).item()
            == expected
        )


@pytest.mark.parametrize("h", [0.0, 0.3, 1.0, 1.1, 1.5, 2.0])
@pytest.mark.parametrize(
    "sigmas",
    [torch.linspace(1, 0, 9), torch.tensor([0.6, 0.31, 0.2]), torch.linspace(1, 0, 9).flip(0)],
)
def test_both_ends_stay_to_the_bit_and_the_direction_too(h, sigmas):
    moved = caf.retimed(sigmas, h)
    assert moved[0] == sigmas[0]
    assert moved[-1] == sigmas[-1]
    assert moved.dtype == sigmas.dtype
    assert (moved.diff() * sigmas.diff() >= 0).all()
    assert h != 1 or torch.allclose(moved, sigmas, atol=1e-7)


def test_retimed_by_hand():
    """1 - (1.5 t - 0.5 t^2) at t = 1/2 is 0.375; between 0.8 and 0, 0.8 times that."""
    assert caf.retimed(torch.tensor([1.0, 0.5, 0.0]), 1.5).tolist() == [1.0, 0.375, 0.0]
    torch.testing.assert_close(
        caf.retimed(torch.tensor([0.8, 0.4, 0.0]), 1.5), torch.tensor([0.8, 0.3, 0.0])
    )
    assert caf.retimed(torch.tensor([]), 1.5).tolist() == []


def test_sigmas_of_other_models_are_refused_with_their_range():
    with pytest.raises(ValueError, match="from 1 to 0.*14.61 to 0.03"):
        caf.retimed(torch.tensor([14.61, 2.0, 0.03]), 1.5)
    with pytest.raises(ValueError, match="one direction"):
        caf.retimed(torch.tensor([1.0, 0.4, 0.6, 0.0]), 1.5)
    with pytest.raises(ValueError, match="outside 0 to 2"):
        caf.retimed(torch.tensor([1.0, 0.4, 0.0]), 3.0)


def test_the_nodes_return_a_sampler_and_sigmas_with_a_chart():
    assert nodes.NibbleConstantAcceleration.execute(limit=0.3)[0].extra_options == {"limit": 0.3}
    output = nodes.NibbleCAFSigmas.execute(sigmas=torch.tensor([1.0, 0.5, 0.0]), h=1.5)
    assert output[0].tolist() == [1.0, 0.375, 0.0]
    assert output.ui["nibble_chart"][0]["summary"] == [
        ["before", "1.000  0.500  0.000"],
        ["after", "1.000  0.375  0.000"],
    ]
