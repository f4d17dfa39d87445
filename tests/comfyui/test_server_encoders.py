"""A text encoder and a model, both at 4 bits and both made by the nodes, in a real ComfyUI over
HTTP: the picture is that of ComfyUI's own loaders, and like that of both in 16 bit.
"""

import numpy as np
import pytest

from comfyui_server import ROOT, Server
from demo_graphs import FLUX, QUANTIZED, Graph, furnish, psnr

FLAGS = ("--whitelist-custom-nodes", "ComfyUI-Nibble", "encoder_nodes")
NODES = ROOT / "tests" / "comfyui" / "encoder_nodes"
CLIP_L, T5, T5_SMALL = "clip_l.safetensors", "demo.safetensors", "demo-w4a8.safetensors"
TEXT = "a red fox asleep in fresh snow"
OTHER = "a ship on green water at night"


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A server with the demo model and encoders for it, and each at 4 bits."""
    home = tmp_path_factory.mktemp("encoders")
    (home / "custom_nodes").mkdir()
    (home / "custom_nodes" / "encoder_nodes").symlink_to(NODES, target_is_directory=True)
    with furnish(Server(home, *FLAGS)) as server:
        server.folder("text_encoders")
        graph = Graph()
        graph.add("TestTinyEncoders")
        server.run(graph.nodes)
        yield server


@pytest.fixture(scope="module")
def report(running) -> dict[str, str]:
    """What Quantize Text Encoder says; the model is quantized in the same graph."""
    graph = Graph().quantize(filename=QUANTIZED)
    encoder = graph.quantize_encoder(T5)
    (chart,) = running.run(graph.nodes)[encoder]["nibble_chart"]
    return dict(chart["summary"])


def picture(server: Server, graph: Graph, clip: str, model: str, text: str = TEXT) -> np.ndarray:
    prompt = graph.add("CLIPTextEncode", clip=[clip, 0], text=text)
    saved = graph.save(graph.sample(model, prompt))
    return server.picture(server.run(graph.nodes)[saved])


def ours(server: Server, device: str = "default") -> np.ndarray:
    graph = Graph()
    clip = graph.add(
        "NibbleLoadCLIP",
        clip_name1=T5_SMALL,
        clip_name2=CLIP_L,
        clip_name3="none",
        type="flux",
        device=device,
        verify=True,
    )
    return picture(server, graph, clip, graph.load(QUANTIZED))


def theirs(server: Server, t5: str, model: str, text: str = TEXT) -> np.ndarray:
    graph = Graph()
    clip = graph.add(
        "DualCLIPLoader", clip_name1=CLIP_L, clip_name2=t5, type="flux", device="default"
    )
    unet = graph.add("UNETLoader", unet_name=model, weight_dtype="default")
    return picture(server, graph, clip, unet, text)


def test_the_node_tells_how_close_the_conditioning_is(report):
    assert "dB to 16 bit" in report["conditioning"]
    assert report["layers"].startswith("21 W4A4, 1 of 8-bit rows")


def test_what_both_ours_change_adds_up(running, report):
    """Neither makes the other worse. The encoder's random weights are the hardest to round: what it
    gives is 9.6 dB from 16 bit, and most of the error of the picture is of that.
    """
    drawn, plain = ours(running), theirs(running, T5, FLUX)
    assert drawn.std() > 0.01  # a picture
    alone = theirs(running, T5_SMALL, FLUX), theirs(running, T5, QUANTIZED)
    error, *parts = (np.square(picture - plain).mean() for picture in (drawn, *alone))
    assert error < 1.5 * sum(parts)
    assert psnr(plain, alone[1]) > 20


def test_stock_loaders_draw_the_same_with_both(running, report):
    assert np.array_equal(theirs(running, T5_SMALL, QUANTIZED), ours(running))


def test_the_encoder_on_the_cpu_gives_the_same_picture(running, report):
    assert np.array_equal(ours(running, device="cpu"), ours(running))


def test_another_prompt_is_another_picture(running, report):
    graph = Graph()
    clip = graph.add("NibbleLoadCLIP", clip_name1=T5_SMALL, clip_name2=CLIP_L, type="flux")
    model = graph.load(QUANTIZED)
    one, other = (
        graph.save(graph.sample(model, graph.add("CLIPTextEncode", clip=[clip, 0], text=text)))
        for text in (TEXT, OTHER)
    )
    outputs = running.run(graph.nodes)
    assert psnr(running.picture(outputs[one]), running.picture(outputs[other])) < 40
