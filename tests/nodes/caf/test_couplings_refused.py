"""What Make CAF Couplings refuses, in words: samplers that add noise, models that are no flow, and
pictures that are not finite.
"""

import comfy.latent_formats
import comfy.model_sampling
import comfy.samplers
import pytest
import torch

import tiny_models
from coupling_runs import calls_of, euler, everything, job, made
from nibble.accel.caf import couplings
from nibble.nodes.bridge.caf import couplings as caf_couplings
from nibble.nodes.bridge.caf import teacher

pytestmark = pytest.mark.usefixtures("output")


@pytest.fixture(scope="module")
def model():
    return tiny_models.build("flux")


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
def test_samplers_that_add_noise_are_refused_and_all_others_are_not(model, name):
    noisy = (
        "ancestral" in name
        or "sde" in name
        or name in ("ddpm", "lcm", "seeds_2", "seeds_3", "sa_solver", "sa_solver_pece")
    )
    asked, before = (
        job(
            model,
            sampler=comfy.samplers.sampler_object(name),
            sigmas=tiny_models.schedule(model, 6),
        ),
        torch.random.get_rng_state(),
    )
    if not noisy:
        teacher.check_sampler(asked)
    else:
        with pytest.raises(ValueError, match="adds noise on its way.*euler"):
            teacher.check_sampler(asked)
    assert torch.equal(before, torch.random.get_rng_state())


def test_samplers_are_judged_by_what_they_do(model):
    """Options count: Euler with churn adds noise, an ancestral one with eta 0 does not; a step size
    for the whole batch couples neighbours.
    """
    teacher.check_sampler(
        job(model, sampler=comfy.samplers.ksampler("euler_ancestral", {"eta": 0.0}))
    )
    with pytest.raises(ValueError, match="The sampler euler adds noise"):
        made(model, sampler=euler(s_churn=1.0))
    adaptive = comfy.samplers.sampler_object("dpm_adaptive")
    teacher.check_sampler(job(model, sampler=adaptive))
    with pytest.raises(ValueError, match="depends on its neighbors; set batch_size to 1"):
        made(model, sampler=adaptive, batch=2)

    class Strange(comfy.samplers.Sampler):
        def sample(self, *_):
            raise KeyError("its own things")

    with pytest.raises(
        ValueError,
        match="Strange could not be tried out .KeyError: 'its own things'.; connect KSamplerSelect",
    ):
        made(model, sampler=Strange())


class Video:
    """A latent of pictures and sound."""

    is_nested = True


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sigmas": torch.tensor([])}, "no steps; connect a scheduler"),
        ({"sigmas": torch.tensor([0.8, 0.4, 0.0])}, "begin at 0.8.*denoise 1, not split"),
        ({"sigmas": torch.tensor([14.6, 1.0, 0.0])}, "begin at 14.6"),
        ({"sigmas": torch.tensor([1.0, 0.4])}, "end at 0.4.*end at 0"),
        ({"sigmas": torch.tensor([1.0, 0.4, 0.6, 0.0])}, "rise on their way"),
        ({"positive": [[]]}, "no prompts"),
        ({"cfg": 2.0}, "no negative prompt to guide away from; connect one, or set cfg to 1"),
        (
            {"positive": [[[torch.zeros(1, 7, 24), {"start_percent": 0.2}]]]},
            "Prompt 1 is for a part .*start_percent",
        ),
        (
            {"positive": [[[torch.zeros(1, 7, 24), {"control": object()}]]]},
            "prompt 1: control is a object, which cannot be kept in a file",
        ),
        ({"latents": [{"samples": Video()}]}, "several streams"),
        (
            {"latents": [{"samples": torch.ones(1, 4, 4, 4)}]},
            "1 x 4 x 4 x 4, and this model's have 16",
        ),
        (
            {
                "latents": [
                    {"samples": torch.zeros(1, 16, 4, 4)},
                    {"samples": torch.zeros(1, 16, 6, 4)},
                ]
            },
            "several sizes .1 x 16 x 4 x 4, 1 x 16 x 6 x 4",
        ),
        (
            {"latents": [{"samples": torch.zeros(1, 16, 4, 4), "noise_mask": torch.ones(1, 4, 4)}]},
            "has a mask",
        ),
        ({"filename": "../mine"}, "'../mine' cannot be a file's name in"),
        ({"filename": ".."}, "cannot be a file's name"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_model_is_asked(
    model, monkeypatch, output, changes, said
):
    calls = calls_of(model, monkeypatch)
    with pytest.raises(ValueError, match=said):
        made(model, **changes)
    assert not calls
    assert not output.exists()


@pytest.mark.parametrize(
    "sampling, said",
    [
        ("IMG_TO_IMG", "Make CAF Couplings needs a model that leads from noise to pictures"),
        ("IMG_TO_IMG_FLOW", "turns one picture into another"),
    ],
)
def test_models_that_are_no_flow_from_noise_are_refused(model, sampling, said):
    own = model.clone()
    own.add_object_patch("model_sampling", getattr(comfy.model_sampling, sampling)())
    with pytest.raises(ValueError, match=said):
        made(own)


def test_a_picture_that_is_no_number_ends_the_run_and_the_others_are_kept(model, monkeypatch):
    plain, calls = model.model.diffusion_model.forward, []

    def broken(x, *args, **options):
        calls.append(1)
        return plain(x, *args, **options) / (0.0 if len(calls) == 9 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(model.model.diffusion_model, "forward", broken)
        with pytest.raises(
            ValueError,
            match=(
                "pair 2 holds values that are not finite; load the model in bf16 or fp32.*The 2"
                " pairs before are kept"
            ),
        ):
            made(model)
    assert len(couplings.read(caf_couplings.folder_of("mine"))) == 2
    assert everything(made(model)) == everything(made(model, filename="whole"))
