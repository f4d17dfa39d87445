"""Inspect Model File in a real ComfyUI: it names files in all folders, also one in a wrong one."""

import shutil

import pytest

from comfyui_server import Refused
from demo_graphs import FLUX, VAE, WEIGHTS, Graph


def chart(server, choice: str) -> dict:
    graph = Graph()
    node = graph.add("NibbleInspectFile", file=choice)
    (drawn,) = server.run(graph.nodes)[node]["nibble_chart"]
    return drawn["kind"], dict(drawn["summary"])


def test_files_of_every_folder_are_listed_and_named(server, quantized, lora_files):
    inputs = server.get("/object_info/NibbleInspectFile")["NibbleInspectFile"]["input"]
    spec = inputs["required"]["file"]
    listed = spec[1]["options"] if spec[0] == "COMBO" else spec[0]
    wanted = {
        f"diffusion_models/{quantized}": "a diffusion model, FLUX.1, Nibble's SVDQuant, 4 bits",
        f"diffusion_models/{FLUX}": "a diffusion model, FLUX.1, BF16",
        f"vae/{VAE}": "a VAE",
        f"loras/{lora_files['first']}": "a LoRA",
    }
    assert set(wanted) <= set(listed)
    for choice, what in wanted.items():
        kind, said = chart(server, choice)
        assert kind == "facts"
        assert said["is"] == what
        assert said["folder"].endswith("where it belongs")


def test_a_file_in_the_wrong_folder_is_told_where_to_go(server):
    shutil.copy(WEIGHTS / "vae" / VAE, server.folder("loras") / "wrong.safetensors")
    _, said = chart(server, "loras/wrong.safetensors")
    assert said["folder"] == "models/loras; move it to models/vae"


def test_a_file_that_is_gone_is_refused_in_words(server):
    with pytest.raises(Refused, match="not in"):
        chart(server, "loras/nothing.safetensors")
