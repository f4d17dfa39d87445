"""CAF on a 4-bit model of every family: its sampler without training, couplings, training, sampling
and inversion; or a refusal in a sentence.
"""

import comfy.samplers
import pytest
import torch

import class_walk
import tiny_models
from class_walk import draw, relative
from nibble.nodes.bridge.caf import couplings, invert, load, sample, train, training_free
from nibble.nodes.bridge.caf.teacher import CouplingsJob
from nibble.nodes.bridge.quantized import loading
from nibble.nodes.bridge.training.session import Settings
from what_families_can import NO_CAF, NO_FLOW

STEPS = 6


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    class_walk.widen(monkeypatch)
    class_walk.put_folders([load.FOLDER, loading.FOLDER], tmp_path, monkeypatch)
    return tmp_path


@pytest.fixture(params=class_walk.EVERY)
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name, folders, monkeypatch):
    path = class_walk.quantized(name, folders / loading.FOLDER)
    return class_walk.load(name, path, monkeypatch)


def sampled(model, name: str, sampler, sigmas) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": tiny_models.prompt(name)})
    noise = tiny_models.latent(name)
    return guider.sample(noise, noise * 0, sampler, sigmas, disable_pbar=True, seed=1)


def test_its_sampler_needs_a_flow_and_nothing_else(name, model):
    sampler, sigmas = training_free.sampler(training_free.LIMIT), tiny_models.schedule(model, STEPS)
    if name in NO_FLOW:
        sentence = class_walk.refusal(lambda: sampled(model, name, sampler, sigmas))
        assert "rectified-flow" in sentence
        return
    assert relative(sampled(model, name, sampler, sigmas), draw(model, name, STEPS)) < 0.5


def made(model, name: str) -> couplings.Couplings:
    job = CouplingsJob(
        model,
        [tiny_models.prompt(name)],
        [{"samples": tiny_models.latent(name) * 0}],
        comfy.samplers.sampler_object("euler"),
        tiny_models.schedule(model, STEPS),
        2,
        7,
    )
    return couplings.make_couplings(job)[0]


def heads_job(model, name: str) -> train.TrainingJob:
    options = train.Options(**train.RECIPE | {"steps": 2, "warmup": 0, "lr": 1e-2})
    return train.TrainingJob(
        model,
        made(model, name),
        filename="mine",
        options=options,
        settings=Settings(dtype="fp32"),
        rank=2,
        h=1.0,
        preview_every=0,
    )


def test_heads_are_trained_and_drawn_with_or_refused_in_words(name, model):
    if name in NO_CAF:
        words = class_walk.refusal(lambda: train.train(heads_job(model, name)))
        assert NO_CAF[name] in words
        return
    plain = draw(model, name)
    done = train.train(heads_job(model, name))
    assert len(done.losses) == 4
    worn = load.load(model, done.name)
    found = sampled(worn, name, sample.sampler(), sample.sigmas(worn, 2))
    assert torch.isfinite(found).all()
    picture = {"samples": tiny_models.latent(name, seed=8)}
    noise, start = invert.invert(worn, tiny_models.prompt(name), picture, 2)
    assert torch.isfinite(noise.noise).all()
    assert torch.isfinite(start.start).all()
    assert relative(draw(model, name), plain) == 0
