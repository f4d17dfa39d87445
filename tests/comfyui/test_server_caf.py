"""The second-order sampler and its sigmas in a real ComfyUI, over HTTP."""

import numpy as np
import pytest

from conftest import FLUX, Graph
from server import Refused


def drawn(server, sampler: tuple[str, dict], h: float | None = None, scheduler: tuple[str, dict] | None = None) -> tuple[np.ndarray, dict]:
    """(picture of the 16-bit demo model in 3 steps, outputs of all nodes)."""
    graph = Graph()
    model, positive = graph.load(FLUX), graph.prompt()
    kind, values = scheduler or ("BasicScheduler", dict(model=[model, 0], scheduler="simple", steps=3, denoise=1.0))
    sigmas = graph.add(kind, **values)
    if h is not None:
        sigmas = graph.add("NibbleCAFSigmas", sigmas=[sigmas, 0], h=h)
    latent = graph.add("SamplerCustomAdvanced", noise=[graph.add("RandomNoise", noise_seed=1), 0], sigmas=[sigmas, 0],
                       guider=[graph.add("BasicGuider", model=[model, 0], conditioning=[positive, 0]), 0],
                       sampler=[graph.add(sampler[0], **sampler[1]), 0], latent_image=[graph.latent(), 0])
    saved = graph.save(latent)
    outputs = server.run(graph.nodes)
    return server.picture(outputs[saved]), outputs.get(sigmas, {})


def test_it_draws_and_a_limit_of_0_is_euler(server):
    euler, _ = drawn(server, ("KSamplerSelect", {"sampler_name": "euler"}))
    first, _ = drawn(server, ("NibbleConstantAcceleration", {"limit": 0.0}))
    second, _ = drawn(server, ("NibbleConstantAcceleration", {"limit": 0.3}))
    assert np.abs(first - euler).max() < 0.02 < np.abs(second - euler).max()


def test_sigmas_at_another_pace_are_shown_and_change_the_picture(server):
    sampler = ("NibbleConstantAcceleration", {"limit": 0.1})
    plain, output = drawn(server, sampler, h=1.0)
    other, changed = drawn(server, sampler, h=1.5)
    rows = dict(changed["nibble_chart"][0]["summary"])
    assert rows["before"] != rows["after"] and rows["before"].startswith("1.000") and rows["after"].endswith("0.000")
    assert np.abs(plain - other).max() > 0.02 and dict(output["nibble_chart"][0]["summary"])["after"] == rows["before"]


def test_sigmas_of_another_kind_of_model_are_refused_in_words(server):
    karras = ("KarrasScheduler", dict(steps=3, sigma_max=14.6, sigma_min=0.03, rho=7.0))
    with pytest.raises(Refused, match="from 1 to 0.*14.6"):
        drawn(server, ("NibbleConstantAcceleration", {"limit": 0.1}), h=1.5, scheduler=karras)
