"""CAF on models that predict noise (SDXL) or v (Hunyuan-DiT): everything happens on the straight
line that their probability flow is a flow of.
"""

import contextlib

import comfy.model_sampling
import comfy.samplers
import pytest
import torch

import class_walk
import tiny_models
from caf_training_runs import FP32, job, pairs
from nibble.accel.caf import couplings as stored
from nibble.accel.caf import flow
from nibble.accel.caf.adapter import CAFAdapter
from nibble.nodes.bridge.caf import couplings, invert, load, sample, straight, teacher, train
from nibble.nodes.bridge.caf.student import Student
from nibble.nodes.bridge.training import session as training

STEPS = 2


@pytest.fixture(params=["sdxl", "hunyuan dit"])
def name(request, monkeypatch) -> str:
    class_walk.widen(monkeypatch)
    return request.param


@pytest.fixture
def model(name):
    return class_walk.dense(name)


def changed(model, data, h: float = 1.5) -> CAFAdapter:
    """Heads that change a lot."""
    found = CAFAdapter.create(
        model.model.diffusion_model, train._layers(job(model, data)), 4, h, middle=0.0
    )
    for seed, head in enumerate((found.velocity, found.acceleration)):
        drawn = torch.Generator().manual_seed(seed)
        for key, tensor in head.tensors().items():
            if not key.endswith("down"):
                tensor.data = 0.05 * torch.randn(tensor.shape, generator=drawn)
    return found


def drawn(model, name: str, noise, sampler, sigmas) -> torch.Tensor:
    """In the model's own units."""
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": tiny_models.prompt(name)})
    found = guider.sample(noise, noise * 0, sampler, sigmas, disable_pbar=True, seed=1)
    return model.model.process_latent_in(found)


def begins_at(sampling, noise) -> torch.Tensor:
    """Where ComfyUI's samplers begin, by hand, on the straight line."""
    largest = float(sampling.sigma_max)
    return noise * (1 + largest**2) ** 0.5 / (1 + largest)


def test_pairs_are_the_ends_of_straight_lines(name, model, output):
    sampling, sigmas = model.get_model_object("model_sampling"), tiny_models.schedule(model, STEPS)
    euler = comfy.samplers.sampler_object("euler")
    asked = teacher.CouplingsJob(
        model, [tiny_models.prompt(name)], [{"samples": tiny_models.latent(name) * 0}],
        euler, sigmas, 1, 7,
    )  # fmt: skip
    start, data, _ = couplings.make_couplings(asked)[0].pair(0)
    noise = stored.noise(7, 0, tiny_models.latent(name).shape[1:])
    torch.testing.assert_close(start, begins_at(sampling, noise))
    torch.testing.assert_close(data, drawn(model, name, noise, euler, sigmas))
    torch.testing.assert_close(straight.noise_of(sampling, start), noise)


def test_one_step_of_untrained_heads_is_eulers(name, model, tmp_path):
    """The step ends at the denoised picture, in either coordinates."""
    noise = tiny_models.latent(name)
    data = pairs(tmp_path / "pairs", shape=tuple(noise.shape[1:]))
    heads = CAFAdapter.create(
        model.model.diffusion_model, train._layers(job(model, data)), 4, 1.5, middle=0.0
    )
    worn = load.with_heads(model, heads, "untrained")
    found = drawn(worn, name, noise, sample.sampler(ahead=0.0), sample.sigmas(worn, 1))
    euler = comfy.samplers.sampler_object("euler")
    largest = float(model.get_model_object("model_sampling").sigma_max)
    wanted = drawn(model, name, noise, euler, torch.tensor([largest, 0.0]))
    assert class_walk.relative(found, wanted) < 1e-4


def in_training(model, name: str, heads: CAFAdapter, work):
    """work(student) on the nets as they are trained."""

    def here(session):
        with contextlib.closing(Student(session, heads)) as student:
            return work(student)

    shape = tuple(tiny_models.latent(name).shape)
    with torch.no_grad():
        return training.run(model, tiny_models.prompt(name), shape, FP32, here)


def test_the_sampler_draws_what_the_training_does(name, model, tmp_path):
    """With heads that change a lot; a noise of one scale for both."""
    noise, sampling = tiny_models.latent(name), model.get_model_object("model_sampling")
    heads = changed(model, pairs(tmp_path / "pairs", shape=tuple(noise.shape[1:])))
    wanted = in_training(
        model, name, heads, lambda student: student.sample(begins_at(sampling, noise), [0])
    )
    worn = load.with_heads(model, heads, "changed")
    sigmas, euler = sample.sigmas(worn, STEPS), comfy.samplers.sampler_object("euler")
    assert class_walk.relative(drawn(worn, name, noise, sample.sampler(), sigmas), wanted) < 1e-3
    without = drawn(model, name, noise, euler, sigmas)
    assert class_walk.relative(without, wanted) > 0.01, "the heads change something"


def test_inversion_finds_what_the_training_does(name, model, tmp_path):
    latent, sampling = tiny_models.latent(name, seed=8), model.get_model_object("model_sampling")
    heads = changed(model, pairs(tmp_path / "pairs", shape=tuple(latent.shape[1:])))

    def both(student):
        return flow.invert(
            lambda x, t: student.velocity(x, t, [0]),
            lambda x, t, start: student.acceleration(x, t, start, [0]),
            model.model.process_latent_in(latent),
            flow.uniform(STEPS)[::-1],
            flow.AHEAD,
            heads.h,
        )

    start, speed = in_training(model, name, heads, both)
    worn = load.with_heads(model, heads, "changed")
    noise, velocity = invert.invert(worn, tiny_models.prompt(name), {"samples": latent}, STEPS)
    assert class_walk.relative(begins_at(sampling, noise.noise), start) < 1e-3
    assert class_walk.relative(velocity.start, speed) < 1e-3


def test_sigmas_of_another_kind_are_refused_in_words(name, model, tmp_path):
    data = pairs(tmp_path / "pairs", shape=tuple(tiny_models.latent(name).shape[1:]))
    worn = load.with_heads(model, changed(model, data), "changed")
    largest = float(model.get_model_object("model_sampling").sigma_max)
    with pytest.raises(ValueError, match=f"needs sigmas between {largest:.4g} and 0"):
        drawn(worn, name, tiny_models.latent(name), sample.sampler(), torch.tensor([200.0, 0.0]))


def test_what_turns_pictures_into_pictures_is_refused_in_words():
    for sampling in (comfy.model_sampling.IMG_TO_IMG(), torch.nn.Identity()):
        with pytest.raises(ValueError, match="Train CAF needs a model that leads from noise"):
            straight.coordinates_of(sampling, "Train CAF")
