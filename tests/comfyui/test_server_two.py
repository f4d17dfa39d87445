"""Two ComfyUIs with Nibble, as a master and a worker of ComfyUI-Distributed are: the same file, the
same prompt and seed give the same picture on both, bit for bit; and with that pack itself
(COMFYUI_DISTRIBUTED_PATH), its pictures are those that each of them draws alone.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import distributed
from caching_graphs import CacheGraph
from comfyui_server import ROOT, Server
from demo_graphs import QUANTIZED, Graph, furnish
from demo_loras import lora_file
from object_info import check_value, inputs_of

NODES = ROOT / "tests" / "comfyui" / "encoder_nodes"
FLAGS = ("--whitelist-custom-nodes", "ComfyUI-Nibble", "encoder_nodes", distributed.PACK)
CODEWORDS, ENCODER = "flux-demo-3bit.safetensors", "demo-w4a8.safetensors"
FILES = {  # what the first makes and the second gets a copy of
    "diffusion_models": (QUANTIZED, CODEWORDS),
    "loras": ("first.safetensors", "second.safetensors"),
    "text_encoders": ("clip_l.safetensors", ENCODER),
}
needs_distributed = pytest.mark.skipif(
    distributed.missing() is not None, reason=str(distributed.missing())
)


def started(home) -> Server:
    (home / "custom_nodes").mkdir()
    (home / "custom_nodes" / "encoder_nodes").symlink_to(NODES, target_is_directory=True)
    distributed.install(home)
    server = furnish(Server(home, *FLAGS))
    server.folder("text_encoders")
    return server


def make_files(server: Server) -> None:
    encoders = Graph()
    encoders.add("TestTinyEncoders")
    server.run(encoders.nodes)
    graph = Graph().quantize(filename=QUANTIZED)
    graph.vector_quantize(filename=CODEWORDS)
    graph.quantize_encoder("demo.safetensors")
    server.run(graph.nodes)
    for seed, name in enumerate(("first", "second"), 1):
        lora_file(server, name, seed)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two servers with the same files: the first made them."""
    homes = [tmp_path_factory.mktemp(name) for name in ("master", "worker")]
    with started(homes[0]) as master, started(homes[1]) as worker:
        make_files(master)
        for kind, names in FILES.items():
            for name in names:
                shutil.copy(master.folder(kind) / name, worker.folder(kind) / name)
        yield master, worker


# ---- kinds of workflow: a graph that draws with `seed`, and the id of its picture


def plain(seed: int) -> tuple[Graph, str]:
    graph = Graph()
    return graph, graph.save(graph.sample(graph.load(QUANTIZED), graph.prompt(), seed=seed))


def lora_stack(seed: int) -> tuple[Graph, str]:
    graph = Graph()
    stack = graph.add(
        "NibbleLoRAStack",
        model=[graph.load(QUANTIZED), 0],
        lora_1="first.safetensors",
        strength_1=0.8,
        on_1=True,
        lora_2="second.safetensors",
        strength_2=0.5,
        on_2=True,
    )
    return graph, graph.save(graph.sample(stack, graph.prompt(), seed=seed))


def teacache(seed: int) -> tuple[Graph, str]:
    graph = CacheGraph()
    model = graph.load(QUANTIZED)
    return graph, graph.save(graph.teacache_sampler(model, parts=graph.parts(model, seed=seed)))


def codewords(seed: int) -> tuple[Graph, str]:
    graph = Graph()
    model = graph.add("NibbleLoadVQ", model_name=CODEWORDS, verify=True, compute_dtype="default")
    return graph, graph.save(graph.sample(model, graph.prompt(), seed=seed))


def text_encoder(seed: int) -> tuple[Graph, str]:
    graph = Graph()
    clip = graph.add(
        "NibbleLoadCLIP", clip_name1=ENCODER, clip_name2="clip_l.safetensors", type="flux"
    )
    prompt = graph.add("CLIPTextEncode", clip=[clip, 0], text="a red fox asleep in fresh snow")
    return graph, graph.save(graph.sample(graph.load(QUANTIZED), prompt, seed=seed))


def stock_loader(seed: int) -> tuple[Graph, str]:
    graph = Graph()
    model = graph.add("UNETLoader", unet_name=QUANTIZED, weight_dtype="default")
    return graph, graph.save(graph.sample(model, graph.prompt(), seed=seed))


KINDS = (plain, lora_stack, teacache, codewords, text_encoder, stock_loader)


def drawn(server: Server, kind, seed: int) -> np.ndarray:
    graph, saved = kind(seed)
    return server.picture(server.run(graph.nodes)[saved])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_same_seed_is_the_same_picture_on_both(pair, kind):
    master, worker = pair
    picture = drawn(master, kind, 7)
    assert picture.std() > 0.01
    assert np.array_equal(drawn(worker, kind, 7), picture)
    assert not np.array_equal(drawn(worker, kind, 8), picture)


def test_both_write_the_same_file(pair):
    """Each for itself, as where a quantizing node is left in the graph that is spread."""
    master, worker = pair
    worker.run(Graph().quantize(filename="own").nodes)
    own = worker.folder("diffusion_models") / "own.safetensors"
    assert own.read_bytes() == (master.folder("diffusion_models") / QUANTIZED).read_bytes()


# ---- the pack itself


def as_prompt(path: Path, server: Server) -> dict:
    """A template in API format; its values are of the inputs that the server says there are."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    links = {number: [str(source), slot] for number, source, slot, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        known = inputs_of(server.get(f"/object_info/{node['type']}")[node["type"]])
        named = node.get("widgets_values_named", {})
        values = {key: value for key, value in named.items() if key in known}
        for key, value in values.items():
            check_value(value, known[key])
        linked = {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"]}
        assert set(linked) | set(values) >= set(required_of(server, node["type"]))
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": values | linked}
    return prompt


def required_of(server: Server, kind: str) -> list[str]:
    return list(server.get(f"/object_info/{kind}")[kind]["input"].get("required", {}))


def collected(master: Server, seed: int, workers: list[str]) -> list[np.ndarray]:
    graph = Graph()
    saved = distributed.spread(graph, graph.sample(graph.load(QUANTIZED), graph.prompt()), seed)
    told = distributed.queue(master, graph, workers)
    assert told["worker_count"] == len(workers)
    images = master.result(told["prompt_id"])[saved]["images"]
    return [master.picture({"images": [image]}) for image in images]


@needs_distributed
def test_a_worker_s_picture_is_that_of_the_next_seed(pair):
    master, worker = pair
    own, other = collected(master, 7, distributed.set_workers(master, worker))
    assert np.array_equal(own, drawn(master, plain, 7))
    assert np.array_equal(other, drawn(master, plain, 8))


@needs_distributed
def test_the_template_draws_one_picture_a_machine(pair):
    master, worker = pair
    prompt = as_prompt(ROOT / "example_workflows" / "24 Several machines.json", master)
    for server in pair:
        folder = server.folder("diffusion_models")
        shutil.copy(folder / QUANTIZED, folder / prompt["1"]["inputs"]["model_name"])
    graph = Graph()
    graph.nodes = prompt
    told = distributed.queue(master, graph, distributed.set_workers(master, worker))
    images = master.result(told["prompt_id"])["10"]
    own, other = (master.picture({"images": [image]}) for image in images["images"])
    assert own.shape == (512, 512, 3)
    assert not np.array_equal(own, other)


@needs_distributed
def test_a_worker_without_the_file_stops_the_run_with_our_sentence(pair):
    master, worker = pair
    graph = Graph()
    model = graph.load("only-here.safetensors")
    here = master.folder("diffusion_models")
    shutil.copy(here / QUANTIZED, here / "only-here.safetensors")
    distributed.spread(graph, graph.sample(model, graph.prompt()), 7)
    told = distributed.queue(master, graph, distributed.set_workers(master, worker))
    assert "only-here.safetensors is not in ComfyUI's diffusion_models folder" in told["error"]
    assert "prompt_id" not in told


@needs_distributed
def test_a_worker_that_fails_is_left_out_without_a_word(pair):
    """A damaged copy: the master waits, and gives the pictures that it has."""
    master, worker = pair
    path = worker.folder("diffusion_models") / QUANTIZED
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[-100_000] ^= 0x10
    path.write_bytes(damaged)
    pictures = collected(master, 21, distributed.set_workers(master, worker))
    path.write_bytes(whole)
    assert len(pictures) == 1
    assert "does not match its checksum" in worker.log.read_text()
