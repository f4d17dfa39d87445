"""Models that the demo is not, in a real ComfyUI over HTTP: a file under its published names is
quantized by the node, loaded, and sampled with stock nodes beside its 16-bit original.

MiniMax H3 has a plan of its own, two streams (picture and sound), and a latent for both. Lens is a
transformer that Nibble knows nothing of: its plan is guessed.
"""

import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file

from comfyui_server import ROOT, Server
from demo_graphs import Graph

FLAGS = ("--whitelist-custom-nodes", "ComfyUI-Nibble", "tiny_nodes")
NODES = ROOT / "tests" / "comfyui" / "tiny_nodes"


@dataclass(frozen=True)
class Tiny:
    """A family of tests/support's tiny models. latent: the stock node that makes an empty one, and
    its inputs; streams: what the result is split into, by a stock node; bound: of the relative
    error of random weights, which hold nothing that a low-rank branch could carry.
    """

    family: str
    known_as: str
    latent: tuple[str, dict]
    streams: int = 1
    bound: float = 0.2

    @property
    def file(self) -> str:
        return f"{self.family.replace(' ', '-')}.safetensors"


H3 = Tiny(
    "minimax h3",
    "MiniMax H3",
    ("EmptyMiniMaxH3LatentAV", {"width": 64, "height": 64, "length": 5}),
    streams=2,
)
LENS = Tiny(
    "lens", "plan guessed", ("EmptyFlux2LatentImage", {"width": 64, "height": 64}), bound=0.6
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A server that also has the nodes of tiny_nodes/, and their models."""
    home = tmp_path_factory.mktemp("tiny")
    (home / "custom_nodes").mkdir()
    (home / "custom_nodes" / "tiny_nodes").symlink_to(NODES, target_is_directory=True)
    with Server(home, *FLAGS) as running:
        running.folder("diffusion_models")
        graph = Graph()
        for model in (H3, LENS):
            graph.add("TestTinyFile", family=model.family, filename=model.file)
        running.run(graph.nodes)
        yield running


def sampled(server: Server, model: Tiny, graph: Graph, loader: str) -> list[torch.Tensor]:
    """Runs a graph with a KSampler and SaveLatent behind a loader: the latent of each stream."""
    prompt = graph.add("TestTinyPrompt", family=model.family)
    node, inputs = model.latent
    latent = graph.add(node, **({"batch_size": 1} if model.streams == 1 else {}), **inputs)
    result = graph.add(
        "KSampler",
        model=[loader, 0],
        positive=[prompt, 0],
        negative=[prompt, 0],
        latent_image=[latent, 0],
        seed=1,
        steps=3,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    if model.streams > 1:
        result = graph.add("LTXVSeparateAVLatent", av_latent=[result, 0])
    saved = [
        graph.add(
            "SaveLatent", samples=[result, stream], filename_prefix=f"{model.family}/{stream}"
        )
        for stream in range(model.streams)
    ]
    outputs = server.run(graph.nodes)
    files = [outputs[node]["latents"][0] for node in saved]
    folder = server.home / "output"
    return [
        load_file(folder / file["subfolder"] / file["filename"])["latent_tensor"].float()
        for file in files
    ]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("model", [H3, LENS], ids=lambda model: model.family)
def test_quantized_by_the_node_loaded_and_sampled(tiny, model):
    graph = Graph().quantize(model_name=model.file, filename=f"{model.family}-4bit")
    loader = graph.add(
        "NibbleLoadSVDQuant", model_name=[graph.quantizer, 0], verify=True, compute_dtype="default"
    )
    ours = sampled(tiny, model, graph, loader)
    graph = Graph()
    dense = graph.add("UNETLoader", unet_name=model.file, weight_dtype="default")
    for found, wanted in zip(ours, sampled(tiny, model, graph, dense), strict=True):
        assert found.isfinite().all()
        assert 0 < relative(found, wanted) < model.bound
    graph = Graph()
    name = f"{model.family}-4bit.safetensors"
    stock = graph.add("UNETLoader", unet_name=name, weight_dtype="default")
    for found, wanted in zip(sampled(tiny, model, graph, stock), ours, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("model", [H3, LENS], ids=lambda model: model.family)
def test_the_report_says_which_model_it_is_and_whether_the_plan_is_a_guess(tiny, model):
    name = f"{model.family}-report"
    graph = Graph().quantize(model_name=model.file, filename=name)
    (chart,) = tiny.run(graph.nodes)[graph.quantizer]["nibble_chart"]
    told = json.dumps(chart)
    assert model.known_as in told
    assert ("its plan was guessed" in told) == (model is LENS)
    assert {row["action"] for row in chart["rows"]} >= {"w4a4", "w4a16", "keep"}
