"""What an artist does, done to a real ComfyUI: quantize, load, sample, add a LoRA, stop, and feed
it the wrong files.
"""

import json
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_server import Refused, Server
from demo_graphs import FLUX, VAE, WEIGHTS, Graph, furnish, psnr

# dB, of a 64 x 64 picture in 8 steps: data-free, without rotation and with one fit of the branch
PSNR_FLOOR = 24.0


def picture(server, name: str, lora: str | None = None, **how) -> np.ndarray:
    """One picture of a model, as the browser gets it."""
    graph = Graph()
    model = graph.load(name)
    if lora:
        model = graph.add(
            "LoraLoaderModelOnly", model=[model, 0], lora_name=lora, strength_model=1.0
        )
    saved = graph.save(graph.sample(model, graph.prompt(), **how))
    return server.picture(server.run(graph.nodes)[saved])


@pytest.fixture(scope="module")
def dense(server) -> np.ndarray:
    return picture(server, FLUX)


@pytest.fixture(scope="module")
def ours(server, quantized) -> np.ndarray:
    return picture(server, quantized)


@pytest.fixture(scope="module")
def lora(server) -> str:
    """A LoRA with kohya's names on the double blocks and diffusers' (parts of fused layers) on the
    single ones.
    """
    draw = torch.Generator().manual_seed(5)
    weights = load_file(WEIGHTS / "diffusion_models" / FLUX)

    def pair(n, k, rank=8):
        return (
            torch.randn(n, rank, generator=draw) * 5.0 / rank**0.5,
            torch.randn(rank, k, generator=draw) / k**0.5,
        )

    tensors = {}
    for layer in ("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"):
        up, down = pair(*weights[f"double_blocks.0.{layer}.weight"].shape)
        name = f"lora_unet_double_blocks_0_{layer.replace('.', '_')}"
        tensors |= {
            f"{name}.lora_up.weight": up,
            f"{name}.lora_down.weight": down,
            f"{name}.alpha": torch.tensor(8.0),
        }
    hidden = weights["img_in.weight"].shape[0]
    for part in ("to_q", "to_v"):
        up, down = pair(hidden, hidden)
        tensors |= {
            f"transformer.single_transformer_blocks.1.attn.{part}.lora_B.weight": up,
            f"transformer.single_transformer_blocks.1.attn.{part}.lora_A.weight": down,
        }
    save_file(tensors, server.folder("loras") / "style.safetensors")
    return "style.safetensors"


def test_the_nodes_are_there_with_tooltips_and_at_most_six_visible_widgets(server):
    for name in ("NibbleQuantizeSVDQuant", "NibbleLoadSVDQuant", "NibbleDemoPrompt"):
        info = server.get(f"/object_info/{name}")[name]
        inputs = [
            spec
            for group in ("required", "optional")
            for spec in info["input"].get(group, {}).values()
        ]
        assert all(spec[1].get("tooltip") for spec in inputs), name
        assert (
            sum(not spec[1].get("advanced") for spec in inputs)
            - 3 * (name == "NibbleQuantizeSVDQuant")
            <= 6
        ), name
        assert info["category"].startswith("Nibble")


def test_quantizing_reports_every_layer_and_the_loader_lists_the_file(server, graph):
    output = server.run(graph.quantize(filename="reported").nodes)[graph.quantizer]
    chart = output["nibble_chart"][0]
    assert chart["kind"] == "layers"
    assert {"w4a4", "w4a16", "keep"} == {row["action"] for row in chart["rows"]}
    assert all(row["why"] for row in chart["rows"])
    assert all(row["db"] > 10 for row in chart["rows"] if row["action"] == "w4a4")
    options = server.get("/object_info/NibbleLoadSVDQuant")["NibbleLoadSVDQuant"]["input"][
        "required"
    ]["model_name"]
    names = options[1]["options"] if options[0] == "COMBO" else options[0]
    assert "reported.safetensors" in names
    assert FLUX not in names


def test_a_second_run_with_the_same_options_finishes_at_once_and_other_options_need_overwrite(
    server, quantized, graph
):
    began = time.monotonic()
    # steps play no part in a run without prompts
    server.run(graph.quantize(filename=quantized, steps=3).nodes)
    assert time.monotonic() - began < 5
    with pytest.raises(Refused, match="overwrite"):
        server.run(Graph().quantize(filename=quantized, rank=16).nodes)


def test_the_4_bit_picture_is_close_to_the_16_bit_one(dense, ours):
    assert psnr(dense, ours) > PSNR_FLOOR


def test_the_loader_shows_the_vram_needed(server, quantized, graph):
    load = graph.load(quantized)
    graph.save(graph.sample(load, graph.prompt(), seed=77))
    chart = server.run(graph.nodes)[load]["nibble_chart"][0]
    assert chart["kind"] == "facts"
    assert "weights" in dict(chart["summary"])["VRAM"]


def test_sampler_custom_advanced_gives_the_same_picture(server, quantized, graph, ours):
    model, positive = graph.load(quantized), graph.prompt()
    noise = graph.add("RandomNoise", noise_seed=1)
    guider = graph.add("BasicGuider", model=[model, 0], conditioning=[positive, 0])
    sampler = graph.add("KSamplerSelect", sampler_name="euler")
    sigmas = graph.add("BasicScheduler", model=[model, 0], scheduler="simple", steps=8, denoise=1.0)
    latent = graph.add(
        "SamplerCustomAdvanced",
        noise=[noise, 0],
        guider=[guider, 0],
        sampler=[sampler, 0],
        sigmas=[sigmas, 0],
        latent_image=[graph.latent(), 0],
    )
    saved = graph.save(latent)
    assert np.array_equal(server.picture(server.run(graph.nodes)[saved]), ours)


def test_two_samplers_in_one_graph_do_not_disturb_one_another(server, quantized, graph, ours):
    model, first = graph.load(quantized), graph.prompt()
    saved = [
        graph.save(graph.sample(model, graph.prompt("a blue star bottom on white"), seed=9)),
        graph.save(graph.sample(model, first)),
    ]
    outputs = server.run(graph.nodes)
    assert np.array_equal(server.picture(outputs[saved[1]]), ours)
    assert psnr(server.picture(outputs[saved[0]]), ours) < 20


def test_a_stock_lora_acts_as_on_the_16_bit_model_and_leaves_no_trace(
    server, quantized, lora, dense, ours
):
    with_lora, dense_with_lora = picture(server, quantized, lora), picture(server, FLUX, lora)
    effect, distance = psnr(dense_with_lora, dense), psnr(with_lora, dense_with_lora)
    assert effect < 28, "the LoRA does what it does on the 16-bit model"
    assert distance > effect + 4, "the LoRA does what it does on the 16-bit model"
    assert np.array_equal(picture(server, quantized, seed=1), ours), (
        "taken away, the picture is the old one bit for bit"
    )


def test_a_connected_model_is_quantized_with_its_lora(server, lora, graph):
    model = graph.add(
        "LoraLoaderModelOnly", model=[graph.load(FLUX), 0], lora_name=lora, strength_model=1.0
    )
    graph.quantize(filename="styled", model=[model, 0])
    loaded = graph.add(
        "NibbleLoadSVDQuant", model_name=[graph.quantizer, 0], verify=True, compute_dtype="default"
    )
    saved = graph.save(graph.sample(loaded, graph.prompt()))
    styled = server.picture(server.run(graph.nodes)[saved])
    assert psnr(styled, picture(server, FLUX, lora)) > psnr(styled, picture(server, FLUX)) + 4, (
        "the LoRA is part of the file"
    )


def test_best_is_calibrated_on_the_connected_prompts(server, graph, dense):
    prompts = graph.add(
        "ConditioningCombine",
        conditioning_1=[graph.prompt("a red circle left on black"), 0],
        conditioning_2=[graph.prompt("a green star top on navy"), 0],
    )
    graph.quantize(
        preset="best",
        filename="best",
        rotation="on",
        positive=[prompts, 0],
        latent=[graph.latent(), 0],
        memory_gb=0.25,
    )
    chart = server.run(graph.nodes)[graph.quantizer]["nibble_chart"][0]
    assert all("GPTQ" in row["why"] for row in chart["rows"] if row["action"] == "w4a4")
    assert psnr(dense, picture(server, "best.safetensors")) > PSNR_FLOOR


def test_best_without_prompts_says_what_to_connect(server, graph):
    with pytest.raises(Refused, match="Connect .* to 'positive'"):
        server.run(graph.quantize(preset="best", filename="unprompted").nodes)
    assert not (server.folder("diffusion_models") / "unprompted.safetensors").exists()


def test_progress_names_the_layer(server, graph):
    seen = server.events(graph.quantize(filename="watched", seed=3).nodes)
    told = [event["data"] for event in seen if event["type"] == "nibble_progress"]
    named = {one["name"].split(".")[0] for one in told if one["unit"] == "layer"} - {""}
    assert named >= {"double_blocks", "single_blocks"}
    numbers = [one["done"] for one in told if one["unit"] == "layer"]
    assert numbers == sorted(numbers) and numbers[-1] <= told[-1]["count"]
    steps = [event for event in seen if event["type"] == "progress"]
    assert steps and max(step["data"]["value"] for step in steps) == steps[-1]["data"]["max"]


def test_an_interrupted_run_leaves_no_file_and_goes_on_where_it_stopped(server, graph):
    folder = server.folder("diffusion_models")
    nodes = graph.quantize(filename="stopped", solver="alternating", rotation="auto", seed=4).nodes
    prompt = server.queue(nodes)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and len(finished_layers(folder)) < 12:
        time.sleep(0.05)
    server.post("/interrupt", {})
    with pytest.raises(Refused, match="interrupted"):
        server.result(prompt)
    before = finished_layers(folder)
    assert before
    assert not (folder / "stopped.safetensors").exists()
    chart = server.run(nodes)[graph.quantizer]["nibble_chart"][0]
    seconds = {row["name"]: row["seconds"] for row in chart["rows"]}
    assert {name: seconds[name] for name in before} == before, "finished layers were not done again"
    assert not list(folder.glob("stopped*.partial*"))


def finished_layers(folder) -> dict[str, float]:
    """Name → seconds of the layers in the journal of an unfinished run."""
    rows = {}
    for journal in folder.glob("stopped*.partial.journal"):
        for line in journal.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the line that is being written
            row = entry.get("row", entry) if isinstance(entry, dict) else {}
            if isinstance(row, dict) and row.get("seconds"):
                rows[row["name"]] = row["seconds"]
    return rows


@pytest.mark.parametrize(
    "kind, said", [("lora", "LoRA"), ("vae", "VAE"), ("truncated", "cut off"), ("text", "web page")]
)
def test_a_wrong_source_is_refused_in_words_and_the_server_lives(server, lora, graph, kind, said):
    folder = server.folder("diffusion_models")
    path = folder / f"wrong-{kind}.safetensors"
    path.write_bytes(
        {
            "lora": lambda: (server.folder("loras") / lora).read_bytes(),
            "vae": lambda: (WEIGHTS / "vae" / VAE).read_bytes(),
            "truncated": lambda: (WEIGHTS / "diffusion_models" / FLUX).read_bytes()[:-1000],
            "text": lambda: b"<html>not found</html>" * 9,
        }[kind]()
    )
    with pytest.raises(Refused, match=said):
        server.run(graph.quantize(model_name=path.name, filename="never").nodes)
    assert server.get("/system_stats")
    assert not list(folder.glob("never*"))


def test_the_target_may_not_be_the_source(server, graph):
    with pytest.raises(Refused, match=FLUX):
        server.run(graph.quantize(filename=FLUX, overwrite=True).nodes)
    assert (server.folder("diffusion_models") / FLUX).read_bytes() == (
        WEIGHTS / "diffusion_models" / FLUX
    ).read_bytes()


def test_a_name_outside_the_model_folder_is_refused(server, graph):
    with pytest.raises(Refused, match="leads out of the folder"):
        server.run(graph.quantize(filename="../../escaped").nodes)


def damaged(path, source, kind: str) -> None:
    """A quantized file, spoilt."""
    data = bytearray(source.read_bytes())
    if kind == "newer":
        data = data.replace(b'"nibble_version":"1"', b'"nibble_version":"9"').replace(
            b'"nibble_version": "1"', b'"nibble_version": "9"'
        )
    elif kind == "flipped":
        data[-100_000] ^= 0x10
    else:
        del data[-1000:]
    path.write_bytes(data)


@pytest.mark.parametrize(
    "kind, said", [("newer", "update Nibble"), ("flipped", "checksum"), ("truncated", "cut off")]
)
def test_a_damaged_quantized_file_is_refused_in_words_and_the_server_lives(
    server, quantized, graph, kind, said
):
    folder = server.folder("diffusion_models")
    damaged(folder / f"damaged-{kind}.safetensors", folder / quantized, kind)
    with pytest.raises(Refused, match=said):
        server.run(
            (
                graph.save(graph.sample(graph.load(f"damaged-{kind}.safetensors"), graph.prompt())),
                graph.nodes,
            )[1]
        )
    assert server.get("/system_stats")


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason=(
        "ComfyUI takes --lowvram and --novram with a GPU only (not beside --cpu); "
        "tests/nodes samples in both states without one"
    ),
)
@pytest.mark.parametrize("flag", ["--lowvram", "--novram", "--disable-dynamic-vram"])
def test_low_vram_flags_give_the_same_picture(server, quantized, ours, lora, tmp_path, flag):
    with furnish(Server(tmp_path, flag, device_flags=())) as other:
        for kind, name in (("diffusion_models", quantized), ("loras", lora)):
            (other.folder(kind) / name).symlink_to(server.folder(kind) / name)
        assert psnr(picture(other, quantized), ours) > PSNR_FLOOR
        assert psnr(picture(other, quantized, lora), picture(server, quantized, lora)) > PSNR_FLOOR
