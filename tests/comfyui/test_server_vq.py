"""Codewords in a real ComfyUI: make a 3-bit file, load it, draw, add a LoRA, look into it,
calibrate, and feed it the wrong files.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_server import Refused
from demo_graphs import FLUX, WEIGHTS, Graph, psnr

NODES = ("NibbleQuantizeVQ", "NibbleLoadVQ", "NibbleInspectVQ")
FILE = "flux-demo-3bit.safetensors"
PSNR_FLOOR = 18.0  # dB, of a 64 x 64 picture in 8 steps: 3 bits in closed form


def quantizer(graph: Graph, **changes) -> str:
    """VQ Quantize Checkpoint, which writes FILE unless told otherwise."""
    return graph.vector_quantize(**({"filename": FILE} | changes))


def picture(server, name: str | None, lora: str | None = None) -> np.ndarray:
    """One picture of the 16-bit model (None) or of a file of codewords, as the browser gets it."""
    graph = Graph()
    model = (
        graph.load(FLUX)
        if name is None
        else graph.add("NibbleLoadVQ", model_name=name, verify=True, compute_dtype="default")
    )
    if lora:
        model = graph.add(
            "LoraLoaderModelOnly", model=[model, 0], lora_name=lora, strength_model=1.0
        )
    saved = graph.save(graph.sample(model, graph.prompt()))
    return server.picture(server.run(graph.nodes)[saved])


@pytest.fixture(scope="module")
def report(server) -> dict:
    """The chart of the run that made FILE."""
    graph = Graph()
    return server.run((made := quantizer(graph), graph.nodes)[1])[made]["nibble_chart"][0]


@pytest.fixture(scope="module")
def lora(server) -> str:
    draw, weights = torch.Generator().manual_seed(5), load_file(WEIGHTS / "diffusion_models" / FLUX)
    tensors = {}
    for layer in ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"):
        n, k = weights[f"double_blocks.0.{layer}.weight"].shape
        name = f"lora_unet_double_blocks_0_{layer.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_up.weight": torch.randn(n, 8, generator=draw) * 1.8,
            f"{name}.alpha": torch.tensor(8.0),
            f"{name}.lora_down.weight": torch.randn(8, k, generator=draw) / k**0.5,
        }
    save_file(tensors, server.folder("loras") / "style-vq.safetensors")
    return "style-vq.safetensors"


def test_the_nodes_are_there_with_tooltips_and_at_most_six_visible_widgets(server):
    for name in NODES:
        info = server.get(f"/object_info/{name}")[name]
        inputs = [
            spec
            for group in ("required", "optional")
            for spec in info["input"].get(group, {}).values()
        ]
        assert all(spec[1].get("tooltip") for spec in inputs), name
        assert (
            sum(not spec[1].get("advanced") for spec in inputs) - 3 * (name == "NibbleQuantizeVQ")
            <= 6
        ), name


def test_the_report_tells_every_layer_and_loaders_list_what_they_load(server, report):
    assert report["kind"] == "layers"
    assert {"vq", "keep"} == {row["action"] for row in report["rows"]}
    assert all(row["why"] for row in report["rows"])
    assert all(row["db"] > 5 for row in report["rows"] if row["action"] == "vq")
    listed = {}
    for node in ("NibbleLoadVQ", "NibbleInspectVQ", "NibbleLoadSVDQuant", "NibbleQuantizeVQ"):
        spec = server.get(f"/object_info/{node}")[node]["input"]["required"]["model_name"]
        listed[node] = spec[1]["options"] if spec[0] == "COMBO" else spec[0]
    assert FILE in listed["NibbleLoadVQ"]
    assert FILE in listed["NibbleInspectVQ"]
    assert FLUX not in listed["NibbleLoadVQ"]
    assert FILE in listed["NibbleLoadSVDQuant"]
    assert FILE not in listed["NibbleQuantizeVQ"]
    assert FLUX in listed["NibbleQuantizeVQ"]


def test_the_3_bit_picture_is_close_and_a_stock_lora_acts_on_it_and_leaves_no_trace(
    server, report, lora
):
    dense, ours = picture(server, None), picture(server, FILE)
    assert psnr(dense, ours) > PSNR_FLOOR
    with_lora, dense_with_lora = picture(server, FILE, lora), picture(server, None, lora)
    effect, distance = psnr(dense_with_lora, dense), psnr(with_lora, dense_with_lora)
    assert distance > effect + 2, (
        f"the LoRA does what it does on the 16-bit model: effect {effect:.1f} dB, distance"
        f" {distance:.1f} dB"
    )
    assert np.array_equal(picture(server, FILE), ours), (
        "taken away, the picture is the old one bit for bit"
    )


def test_quantize_load_and_inspect_in_one_graph_with_the_name_linked(server, report):
    graph = Graph()
    made = quantizer(graph)
    load = graph.add("NibbleLoadVQ", model_name=[made, 0], verify=True, compute_dtype="default")
    look = graph.add("NibbleInspectVQ", model_name=[made, 0])
    graph.save(graph.sample(load, graph.prompt()))
    outputs = server.run(graph.nodes)
    facts, chart = outputs[load]["nibble_chart"][0], outputs[look]["nibble_chart"][0]
    assert facts["kind"] == "facts"
    assert 3.0 < float(dict(facts["details"])["bits per weight"]) < 3.5
    assert chart["kind"] == "codebooks"
    assert (
        0.5
        < min(row["use"]["entropy"] / row["use"]["bits"] for row in chart["rows"] if "use" in row)
        <= 1
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(filename=FILE, seed=1), "overwrite"),
        (dict(codewords=100, vector=2), "power of two"),
        (dict(filename="../../out"), "leads out of the folder"),
        (dict(model_name=FILE), FILE),
    ],
    ids=["overwrite", "codewords", "outside", "quantized already"],
)
def test_what_cannot_be_is_refused_in_a_sentence(server, report, graph, changes, said):
    quantizer(graph, **({"filename": "never"} | changes))
    with pytest.raises(Refused, match=said):
        server.run(graph.nodes)
    assert not list(server.folder("diffusion_models").glob("never*"))


def test_a_file_of_the_other_kind_is_refused_with_the_right_node(server, quantized, graph):
    options = {"verify": True, "compute_dtype": "default"}
    model = graph.add("NibbleLoadVQ", model_name=quantized, **options)
    graph.save(graph.sample(model, graph.prompt()))
    with pytest.raises(Refused, match="Load SVDQuant Model"):
        server.run(graph.nodes)


def test_best_without_prompts_draws_the_error_of_its_blocks_while_it_works(server, graph):
    quantizer(
        graph,
        preset="best",
        filename="zero-data",
        codewords=16,
        vector=2,
        calibration_steps=11,
        steps=1,
        keep_layers="double_blocks.1.*\nsingle_blocks.[1-9].*\n*.txt_*",
        latent=[graph.latent(), 0],
    )
    told = server.events(graph.nodes)
    assert told[-1]["type"] == "execution_success"
    live = [event["data"]["chart"] for event in told if event["type"] == "nibble_chart"]
    assert len(live) >= 2
    assert all(chart["kind"] == "blocks" for chart in live)
    assert len(live[-1]["rows"]) == live[-1]["blocks"]
    assert live[-1]["rows"][-1]["points"][-1][0] == 1
    steps = [event["data"]["name"] for event in told if event["type"] == "nibble_progress"]
    assert any("step" in name for name in steps), "the step is told in the node"
