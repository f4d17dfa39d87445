"""Published files in a real ComfyUI: converted on the command line, loaded, drawn with and without
a stock LoRA, over HTTP.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_server import Refused
from demo_graphs import FLUX, WEIGHTS, Graph
from nibble import __main__ as cli

KEPT = "final_layer.*\nguidance_in.*\nvector_in.*"  # as Nunchaku keeps them


def nibble(*arguments) -> None:
    """python -m nibble …, without the wait for a process of its own."""
    assert cli.main([str(argument) for argument in arguments]) == 0


def picture(server, name: str, lora: str | None = None, modulation: str = "vram") -> np.ndarray:
    graph = Graph()
    model = graph.add(
        "NibbleLoadSVDQuant",
        model_name=name,
        verify=True,
        compute_dtype="default",
        modulation_in=modulation,
    )
    if lora:
        model = graph.add(
            "LoraLoaderModelOnly", model=[model, 0], lora_name=lora, strength_model=0.8
        )
    saved = graph.save(graph.sample(model, graph.prompt()))
    return server.picture(server.run(graph.nodes)[saved])


@pytest.fixture(scope="module")
def forms(server) -> dict[str, str]:
    """The demo FLUX at 4 bits: the node's file, that for comfy-kitchen, for Nunchaku (one file, and
    a folder of the first version), and back.
    """
    folder = server.folder("diffusion_models")
    server.run(Graph().quantize(filename="mine", rank=16, keep_layers=KEPT).nodes)
    nibble(
        "convert",
        folder / "mine.safetensors",
        folder / "mine-kitchen.safetensors",
        "--to",
        "kitchen",
    )
    nibble(
        "convert",
        folder / "mine.safetensors",
        folder / "svdq-int4_r16-demo.safetensors",
        "--to",
        "nunchaku",
    )
    nibble("convert", folder / "svdq-int4_r16-demo.safetensors", folder / "back.safetensors")
    first = folder / "svdq-int4-demo"
    first.mkdir()
    tensors = load_file(folder / "svdq-int4_r16-demo.safetensors")
    blocks = {
        name
        for name in tensors
        if name.startswith(("transformer_blocks.", "single_transformer_blocks."))
    }
    save_file({name: tensors[name] for name in blocks}, first / "transformer_blocks.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name not in blocks},
        first / "unquantized_layers.safetensors",
    )
    return {
        "own": "mine.safetensors",
        "kitchen": "mine-kitchen.safetensors",
        "nunchaku": "svdq-int4_r16-demo.safetensors",
        "folder": "svdq-int4-demo/transformer_blocks.safetensors",
        "back": "back.safetensors",
    }


@pytest.fixture(scope="module")
def style(server) -> str:
    draw, tensors = torch.Generator().manual_seed(8), {}
    weights = load_file(WEIGHTS / "diffusion_models" / FLUX)
    for layer in (
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_mlp.2",
        "single_blocks.0.linear1",
        "single_blocks.0.linear2",
        "single_blocks.1.modulation.lin",
    ):
        n, k = weights[f"{layer}.weight"].shape
        stem = "lora_unet_" + layer.replace(".", "_")
        tensors |= {
            f"{stem}.lora_up.weight": torch.randn(n, 8, generator=draw),
            f"{stem}.lora_down.weight": torch.randn(8, k, generator=draw) / k**0.5,
        }
    save_file(tensors, server.folder("loras") / "style-published.safetensors")
    return "style-published.safetensors"


@pytest.mark.parametrize(
    "form, same_as", [("kitchen", "own"), ("nunchaku", "back"), ("folder", "back")]
)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "with a LoRA"])
def test_a_published_file_draws_the_picture_of_our_own_file_of_the_same_numbers(
    server, forms, style, form, same_as, lora
):
    drawn, own = (picture(server, forms[name], style if lora else None) for name in (form, same_as))
    assert np.array_equal(drawn, own)
    assert np.array_equal(picture(server, forms[form]), drawn) != lora, (
        "the LoRA does something, and nothing else does"
    )


def test_modulation_in_ram_draws_the_same_picture(server, forms, style):
    assert np.array_equal(
        picture(server, forms["nunchaku"], None, "ram"), picture(server, forms["nunchaku"])
    )
    ram, vram = (
        picture(server, forms["nunchaku"], style, modulation) for modulation in ("ram", "vram")
    )
    assert (
        np.mean((ram - vram) ** 2) < 1e-3 < np.mean((ram - picture(server, forms["nunchaku"])) ** 2)
    ), "a patch is summed in another order"


def test_inspect_names_every_form(server, forms, capsys):
    folder, kinds = server.folder("diffusion_models"), {}
    for form, name in forms.items():
        nibble("inspect", folder / name, "--json")
        kinds[form] = json.loads(capsys.readouterr().out)
    assert [kinds[form]["format"] for form in ("kitchen", "nunchaku", "folder")] == [
        "comfy-kitchen SVDQuant",
        "Nunchaku INT4",
        "Nunchaku INT4",
    ]
    assert kinds["own"]["method"] == kinds["back"]["method"] == "svdquant"
    nibble("inspect", folder / "svdq-int4-demo")
    assert "FLUX.1" in capsys.readouterr().out


def test_the_node_says_what_it_loaded(server, forms):
    graph = Graph()
    load = graph.load(forms["folder"])
    graph.save(graph.sample(load, graph.prompt(), seed=5))
    details = dict(server.run(graph.nodes)[load]["nibble_chart"][0]["details"])
    assert details["file"].endswith("Nunchaku INT4")
    assert "W4A4, rank 16" in details["layers"]


def refused(server, name: str, words: str) -> None:
    graph = Graph()
    graph.save(graph.sample(graph.load(name), graph.prompt()))
    with pytest.raises(Refused, match=words):
        server.run(graph.nodes)
    assert server.get("/system_stats")


def test_files_that_cannot_be_read_are_refused_in_words_and_the_server_lives(server, forms):
    folder = server.folder("diffusion_models")
    lonely = folder / "lonely"
    lonely.mkdir()
    shutil.copy(folder / forms["folder"], lonely)
    tensors = load_file(folder / forms["nunchaku"])
    name = "transformer_blocks.0.qkv_proj.wscales"
    save_file(
        tensors | {name: tensors[name].to(torch.float8_e4m3fn)},
        folder / "svdq-fp4_r16-demo.safetensors",
    )
    own = load_file(folder / forms["own"])
    mixed = own | {
        key: tensor
        for key, tensor in tensors.items()
        if key.startswith("transformer_blocks.0.mlp_fc1")
    }
    save_file(mixed, folder / "mixed.safetensors")
    (folder / "cut-published.safetensors").write_bytes(
        (folder / forms["nunchaku"]).read_bytes()[:-999]
    )
    refused(
        server,
        "lonely/transformer_blocks.safetensors",
        "The folder lonely lacks unquantized_layers.safetensors; download the whole folder again",
    )
    refused(server, "svdq-fp4_r16-demo.safetensors", "wscales has the shape")
    refused(server, "mixed.safetensors", "mixed.safetensors")
    refused(server, "cut-published.safetensors", "cut off")
