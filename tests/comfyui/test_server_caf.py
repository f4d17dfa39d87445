"""Constant acceleration in a real ComfyUI, over HTTP: the second-order sampler and its sigmas;
CAF's heads loaded, sampled with, inverted with.
"""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from comfyui_server import Refused
from demo_graphs import FLUX, WEIGHTS, Graph
from nibble.accel.caf.adapter import CAFAdapter, Head
from nibble.accel.caf.heads_file import save_file


def drawn(
    server,
    sampler: tuple[str, dict],
    h: float | None = None,
    scheduler: tuple[str, dict] | None = None,
) -> tuple[np.ndarray, dict]:
    """(picture of the 16-bit demo model in 3 steps, outputs of all nodes)."""
    graph = Graph()
    model, positive = graph.load(FLUX), graph.prompt()
    kind, values = scheduler or (
        "BasicScheduler",
        dict(model=[model, 0], scheduler="simple", steps=3, denoise=1.0),
    )
    sigmas = graph.add(kind, **values)
    if h is not None:
        sigmas = graph.add("NibbleCAFSigmas", sigmas=[sigmas, 0], h=h)
    latent = graph.add(
        "SamplerCustomAdvanced",
        noise=[graph.add("RandomNoise", noise_seed=1), 0],
        sigmas=[sigmas, 0],
        guider=[graph.add("BasicGuider", model=[model, 0], conditioning=[positive, 0]), 0],
        sampler=[graph.add(sampler[0], **sampler[1]), 0],
        latent_image=[graph.latent(), 0],
    )
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
    assert rows["before"] != rows["after"]
    assert rows["before"].startswith("1.000")
    assert rows["after"].endswith("0.000")
    assert np.abs(plain - other).max() > 0.02
    assert dict(output["nibble_chart"][0]["summary"])["after"] == rows["before"]


def test_sigmas_of_another_kind_of_model_are_refused_in_words(server):
    karras = ("KarrasScheduler", dict(steps=3, sigma_max=14.6, sigma_min=0.03, rho=7.0))
    with pytest.raises(Refused, match="from 1 to 0.*14.6"):
        drawn(server, ("NibbleConstantAcceleration", {"limit": 0.1}), h=1.5, scheduler=karras)


# ---- a model with heads


def heads(server, name: str, seed: int | None) -> str:
    """A CAF file for the demo model, of rank 4: heads as before training, or (with a seed) random
    ones.
    """
    draw = torch.Generator().manual_seed(seed or 0)

    def head(conditioned: bool) -> Head:
        with safe_open(WEIGHTS / "diffusion_models" / FLUX, "pt") as file:
            shapes = {
                key.removesuffix(".weight"): file.get_slice(key).get_shape()
                for key in file.keys()
                if key.endswith(".weight")
            }
        layers = {
            name: {
                "down": torch.randn(4, shape[1], generator=draw) / shape[1] ** 0.5,
                "up": (
                    torch.zeros(shape[0], 4)
                    if seed is None
                    else 0.1 * torch.randn(shape[0], 4, generator=draw)
                ),
            }
            for name, shape in shapes.items()
            if "_blocks." in name and len(shape) == 2
        }
        extra = 0.05 * torch.randn(shapes["img_in"], generator=draw) * (seed is not None)
        return Head(layers, extra if conditioned else None)

    save_file(CAFAdapter(head(False), head(True), 1.5, 4, "img_in"), server.folder("caf") / name)
    return name


@pytest.fixture(scope="module")
def idle(server) -> str:
    return heads(server, "idle.caf.safetensors", None)


@pytest.fixture(scope="module")
def wild(server) -> str:
    return heads(server, "wild.caf.safetensors", 3)


def with_heads(graph: Graph, name: str, base: str = FLUX) -> str:
    return graph.add("NibbleLoadCAF", model=[graph.load(base), 0], caf_name=name)


def sampled(
    graph: Graph,
    model: str,
    sampler: list,
    sigmas: list,
    noise: list | None = None,
    latent: list | None = None,
    positive: str | None = None,
) -> str:
    """SamplerCustomAdvanced's node."""
    positive = positive or graph.prompt()
    return graph.add(
        "SamplerCustomAdvanced",
        noise=noise or [graph.add("RandomNoise", noise_seed=1), 0],
        sampler=sampler,
        sigmas=sigmas,
        guider=[graph.add("BasicGuider", model=[model, 0], conditioning=[positive, 0]), 0],
        latent_image=latent or [graph.latent(), 0],
    )


def few_steps(
    server, name: str, steps: int, base: str = FLUX, ahead: float = 0.5, **more
) -> tuple[np.ndarray, dict]:
    """(picture by CAF Sampler, that node's output)."""
    graph = Graph()
    model = with_heads(graph, name, base)
    caf = graph.add(
        "NibbleCAFSampler", model=[model, 0], steps=steps, denoise=1.0, ahead=ahead, **more
    )
    saved = graph.save(sampled(graph, model, [caf, 0], [caf, 1]))
    outputs = server.run(graph.nodes)
    return server.picture(outputs[saved]), outputs[caf]


def test_the_nodes_have_tooltips_and_list_the_files(server, idle):
    for name in ("NibbleLoadCAF", "NibbleCAFSampler", "NibbleCAFInvert"):
        info = server.get(f"/object_info/{name}")[name]
        inputs = [
            spec
            for group in ("required", "optional")
            for spec in info["input"].get(group, {}).values()
        ]
        assert all(spec[1].get("tooltip") for spec in inputs), name
        assert sum(not spec[1].get("advanced") for spec in inputs) <= 6, name
        assert all(info["output_tooltips"]), name
        assert info["category"].startswith("Nibble"), name
    options = server.get("/object_info/NibbleLoadCAF")["NibbleLoadCAF"]["input"]["required"][
        "caf_name"
    ]
    assert idle in (options[1]["options"] if options[0] == "COMBO" else options[0])


def test_one_step_of_untrained_heads_is_one_of_euler_if_asked_at_once_and_trained_ones_differ(
    server, idle, wild
):
    euler, _ = drawn(
        server,
        ("KSamplerSelect", {"sampler_name": "euler"}),
        scheduler=("ManualSigmas", {"sigmas": "1.0, 0.0"}),
    )
    ours, output = few_steps(server, idle, 1, ahead=0.0)
    assert np.abs(ours - euler).max() < 0.02
    chart = output["nibble_chart"][0]
    assert chart["title"] == "1 step, 2 calls of the model"
    assert dict(chart["summary"])["file"] == idle
    other, _ = few_steps(server, wild, 1)
    assert np.abs(other - euler).max() > 0.02


def test_it_draws_with_a_4_bit_model(server, quantized, idle, wild):
    pictures = [few_steps(server, name, 2, quantized)[0] for name in (idle, wild)]
    plain, _ = few_steps(server, idle, 2)
    assert 10 * np.log10(1 / np.mean((pictures[0] - plain) ** 2)) > 22
    assert np.abs(pictures[0] - pictures[1]).max() > 0.02


def inverted(server, name: str, steps: int) -> tuple[float, dict]:
    """(PSNR of a picture inverted and drawn again, CAF Invert's output)."""
    graph = Graph()
    model, positive = with_heads(graph, name), graph.prompt()
    first = graph.sample(model, positive)
    inversion = graph.add(
        "NibbleCAFInvert",
        model=[model, 0],
        positive=[positive, 0],
        latent_image=[first, 0],
        steps=steps,
        ahead=0.5,
    )
    caf = graph.add(
        "NibbleCAFSampler",
        model=[model, 0],
        steps=steps,
        denoise=1.0,
        ahead=0.5,
        velocity=[inversion, 1],
    )
    again = sampled(graph, model, [caf, 0], [caf, 1], [inversion, 0], [first, 0], positive)
    saved = [graph.save(latent) for latent in (first, again)]
    outputs = server.run(graph.nodes)
    before, after = (server.picture(outputs[node]) for node in saved)
    assert outputs[caf]["nibble_chart"][0]["title"].endswith(f"{steps} calls of the model")
    return 10 * np.log10(1 / np.mean((before - after) ** 2)), outputs[inversion]


def test_a_picture_comes_back_from_its_noise_the_closer_the_more_steps(server, idle):
    (few, _), (many, output) = inverted(server, idle, 2), inverted(server, idle, 16)
    print(f"PSNR of the picture drawn again: {few:.1f} dB in 2 steps, {many:.1f} dB in 16")
    assert many > 25
    assert many > few + 3
    assert output["nibble_chart"][0]["title"] == "inverted in 16 steps, 17 calls of the model"


def test_what_is_missing_or_does_not_fit_is_said_in_words(server, idle):
    graph = Graph()
    caf = graph.add(
        "NibbleCAFSampler", model=[graph.load(FLUX), 0], steps=2, denoise=1.0, ahead=0.5
    )
    graph.save(sampled(graph, graph.load(FLUX), [caf, 0], [caf, 1]))
    with pytest.raises(Refused, match="no CAF heads.*Load CAF Model"):
        server.run(graph.nodes)
    (server.folder("caf") / "torn.caf.safetensors").write_bytes(b"nothing")
    with pytest.raises(Refused, match="torn.caf.safetensors"):
        few_steps(server, "torn.caf.safetensors", 2)
    graph = Graph()
    twice = graph.add("NibbleLoadCAF", model=[with_heads(graph, idle), 0], caf_name=idle)
    graph.save(graph.sample(twice, graph.prompt()))
    with pytest.raises(Refused, match="has the heads of idle.caf.safetensors already"):
        server.run(graph.nodes)
