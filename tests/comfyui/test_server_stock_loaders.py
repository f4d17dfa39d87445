"""Low-bit files in a real ComfyUI's own loading nodes, over HTTP: the pictures that Nibble's loader
gives.
"""

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from comfyui_server import Refused
from demo_graphs import FLUX, WEIGHTS, Graph, all_in_one
from nibble import __main__ as cli


def picture(server, loader: str, lora: str | None = None, **inputs) -> np.ndarray:
    graph = Graph()
    model = graph.add(loader, **inputs)
    if lora:
        model = graph.add(
            "LoraLoaderModelOnly", model=[model, 0], lora_name=lora, strength_model=0.8
        )
    saved = graph.save(graph.sample(model, graph.prompt()))
    return server.picture(server.run(graph.nodes)[saved])


def ours(server, name: str, lora: str | None = None) -> np.ndarray:
    options = {"verify": True, "compute_dtype": "default"}
    return picture(server, "NibbleLoadSVDQuant", lora, model_name=name, **options)


def theirs(server, name: str, lora: str | None = None) -> np.ndarray:
    return picture(server, "UNETLoader", lora, unet_name=name, weight_dtype="default")


@pytest.fixture(scope="module")
def codewords(server) -> str:
    """The demo model at 3 bits, on the command line."""
    target = server.folder("diffusion_models") / "codewords.safetensors"
    options = ["--method", "vq", "--preset", "fast", "--bits", "3"]
    assert (
        cli.main(["quantize", str(WEIGHTS / "diffusion_models" / FLUX), str(target), *options]) == 0
    )
    return target.name


def test_load_diffusion_model_draws_the_same_picture(server, quantized):
    assert (
        quantized
        in server.get("/object_info/UNETLoader")["UNETLoader"]["input"]["required"]["unet_name"][0]
    )
    assert np.array_equal(theirs(server, quantized), ours(server, quantized))


def test_so_it_does_with_a_lora(server, quantized, lora_files):
    lora = lora_files["first"]
    assert np.array_equal(theirs(server, quantized, lora), ours(server, quantized, lora))
    assert not np.array_equal(theirs(server, quantized), ours(server, quantized, lora))


def test_one_loader_of_nibble_s_opens_codewords_and_comfyui_s_own_too(server, codewords):
    drawn = picture(
        server, "NibbleLoadVQ", model_name=codewords, verify=True, compute_dtype="default"
    )
    assert np.array_equal(ours(server, codewords), drawn)
    assert np.array_equal(theirs(server, codewords), drawn)


def test_load_checkpoint_opens_an_all_in_one_file(server, quantized):
    drawn = picture(server, "CheckpointLoaderSimple", ckpt_name=all_in_one(server, quantized))
    assert np.array_equal(drawn, ours(server, quantized))


def test_a_damaged_file_is_told_in_words(server, quantized):
    state = load_file(server.folder("diffusion_models") / quantized)
    name = next(name for name in state if name.endswith(".weight_smooth_factor"))
    state[name][3] = float("nan")
    save_file(state, server.folder("diffusion_models") / "black.safetensors")
    graph = Graph()
    model = graph.add("UNETLoader", unet_name="black.safetensors", weight_dtype="default")
    graph.save(graph.sample(model, graph.prompt()))
    with pytest.raises(Refused, match=f"The model holds NaN or infinity in {name}"):
        server.run(graph.nodes)
