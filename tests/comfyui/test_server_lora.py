"""LoRAs on a 4-bit model as an artist uses them, over HTTP: stacked, stronger and weaker, by
schedule, taken off; and nothing left behind.
"""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import FLUX, WEIGHTS, Graph
from server import Refused

LAYERS = tuple(
    f"double_blocks.{i}.{layer}"
    for i in range(2)
    for layer in ("img_attn.qkv", "txt_attn.qkv", "img_mlp.0", "img_mlp.2")
) + tuple(f"single_blocks.{i}.{layer}" for i in range(4) for layer in ("linear1", "linear2"))
SIZE = 4.0  # of what a LoRA adds, beside the weight's own norm: enough for another picture
WARM_UP, SWITCHES, GROWTH = 15, 50, 48 << 20


def make(server, name: str, seed: int, kind: str = "lora", size: float = SIZE) -> str:
    """A file in models/loras that changes the picture visibly."""
    draw, weights, tensors = torch.Generator().manual_seed(seed), load_file(WEIGHTS / FLUX), {}
    for layer in LAYERS:
        n, k = weights[f"{layer}.weight"].shape
        stem = f"lora_unet_{layer.replace('.', '_')}"
        scale = size * weights[f"{layer}.weight"].float().norm() / (n * k * 8) ** 0.5
        up, down = torch.randn(n, 8, generator=draw) * scale, torch.randn(8, k, generator=draw)
        tensors |= {
            f"{stem}.lora_up.weight": up,
            f"{stem}.lora_down.weight": down,
            f"{stem}.alpha": torch.tensor(8.0),
        }
        if kind == "dora":
            tensors[f"{stem}.dora_scale"] = (
                weights[f"{layer}.weight"].float().norm(dim=1, keepdim=True) * 1.1
            )
    save_file(tensors, server.folder("loras") / f"{name}.safetensors")
    return f"{name}.safetensors"


@pytest.fixture(scope="module")
def files(server) -> dict[str, str]:
    other = load_file(WEIGHTS / FLUX)["double_blocks.0.img_mlp.0.weight"]
    stem = "lora_unet_double_blocks_0_img_mlp_0"
    save_file(
        {
            "lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": torch.ones(640, 4),
            "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.ones(4, 640),
        },
        server.folder("loras") / "sdxl.safetensors",
    )
    save_file(
        {
            f"{stem}.lora_up.weight": torch.full((other.shape[0], 4), float("nan")),
            f"{stem}.lora_down.weight": torch.ones(4, other.shape[1]),
        },
        server.folder("loras") / "nan.safetensors",
    )
    return {
        name: make(server, name, seed, kind)
        for name, seed, kind in (("first", 1, "lora"), ("second", 2, "lora"), ("scaled", 3, "dora"))
    } | {"sdxl": "sdxl.safetensors", "nan": "nan.safetensors"}


def graph_of(
    model_name: str, *loras: tuple[str, float], report: bool = False, steps: int = 6
) -> tuple[Graph, str]:
    """Load → Load LoRA … → sampler → picture; the id whose output has the picture."""
    graph = Graph()
    model = graph.load(model_name)
    for name, strength in loras:
        model = graph.add(
            "LoraLoaderModelOnly", model=[model, 0], lora_name=name, strength_model=strength
        )
    if report:
        model = graph.report = graph.add("NibbleLoRAReport", model=[model, 0])
    return graph, graph.save(graph.sample(model, graph.prompt(), steps=steps))


def picture(server, model_name: str, *loras: tuple[str, float], **how) -> np.ndarray:
    graph, saved = graph_of(model_name, *loras, **how)
    return server.picture(server.run(graph.nodes)[saved])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(-10 * np.log10(np.mean((a - b) ** 2) + 1e-12))


def test_one_two_another_strength_and_back_to_the_base_bit_for_bit(server, quantized, files):
    first, second = files["first"], files["second"]
    base = picture(server, quantized)
    one, two = (
        picture(server, quantized, (first, 1.0)),
        picture(server, quantized, (first, 1.0), (second, 0.7)),
    )
    dense = [
        picture(server, FLUX, *loras)
        for loras in (((first, 1.0),), ((first, 1.0), (second, 0.7)), ((first, -0.5),))
    ]
    weaker = picture(server, quantized, (first, -0.5))
    for ours, theirs in zip((one, two, weaker), dense, strict=True):
        assert psnr(ours, theirs) > psnr(base, theirs) + 3, "as on the 16-bit model"
    assert np.array_equal(picture(server, quantized, (first, 1.0)), one)
    assert np.array_equal(
        picture(server, quantized, (first, 0.5), (first, 0.5)),
        picture(server, quantized, (first, 0.5), (first, 0.5)),
    )
    assert psnr(picture(server, quantized, (first, 0.5), (first, 0.5)), one) > 30, (
        "the same LoRA twice at half strength"
    )
    assert np.array_equal(picture(server, quantized), base)


def test_the_loader_with_clip_and_a_dora(server, quantized, files):
    dense = picture(server, FLUX, (files["scaled"], 0.8))
    assert (
        psnr(picture(server, quantized, (files["scaled"], 0.8)), dense)
        > psnr(picture(server, quantized), dense) + 3
    )


def test_a_hook_with_keyframes(server, quantized, files):
    """Create Hook LoRA, scheduled: off in the first half of the steps."""
    graph = Graph()
    model, positive = graph.load(quantized), graph.prompt()
    hook = graph.add("CreateHookLoraModelOnly", lora_name=files["first"], strength_model=1.0)
    frame = graph.add("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
    frame = graph.add(
        "CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=[frame, 0]
    )
    hooks = graph.add("SetHookKeyframes", hooks=[hook, 0], hook_kf=[frame, 0])
    hooked = graph.add(
        "ConditioningSetProperties",
        cond_NEW=[positive, 0],
        strength=1.0,
        set_cond_area="default",
        hooks=[hooks, 0],
    )
    saved = graph.save(graph.sample(model, hooked, steps=6))
    scheduled = server.picture(server.run(graph.nodes)[saved])
    base, full = picture(server, quantized), picture(server, quantized, (files["first"], 1.0))
    assert not np.array_equal(scheduled, base) and psnr(scheduled, base) > psnr(full, base)
    assert np.array_equal(picture(server, quantized), base)


def test_the_report_names_what_each_layer_does_and_changes_no_bit(server, quantized, files):
    graph, saved = graph_of(quantized, (files["first"], 1.0), (files["scaled"], 0.5), report=True)
    outputs = server.run(graph.nodes)
    chart = outputs[graph.report]["nibble_chart"][0]
    assert {row["name"] for row in chart["rows"]} == set(LAYERS) and {
        row["how"] for row in chart["rows"]
    } == {"rows"}
    assert all(row["rank"] == 16 and row["bytes"] for row in chart["rows"])
    assert np.array_equal(
        server.picture(outputs[saved]),
        picture(server, quantized, (files["first"], 1.0), (files["scaled"], 0.5)),
    )


def test_wrong_files_are_named_and_the_model_stays_as_it_was(server, quantized, files):
    base = picture(server, quantized)
    graph, saved = graph_of(quantized, (files["sdxl"], 1.0), report=True)
    outputs = server.run(graph.nodes)
    assert (
        "none of its keys fit"
        in dict(map(tuple, outputs[graph.report]["nibble_chart"][0]["summary"]))["result"]
    )
    assert np.array_equal(server.picture(outputs[saved]), base)
    with pytest.raises(
        Refused, match="double_blocks.0.img_mlp.0 holds numbers that are not finite"
    ):
        picture(server, quantized, (files["nan"], 1.0))
    assert np.array_equal(picture(server, quantized), base)


def test_fifty_switches_of_lora_and_model_leave_nothing_behind(server, quantized, files):
    """Memory of the server's process: after a warm-up it does not grow with what was switched."""
    psutil = pytest.importorskip(
        "psutil", reason="psutil is not installed: the leak test did NOT run"
    )
    process, sizes = psutil.Process(server.process.pid), []
    choices = [
        ((files["first"], 1.0),),
        (),
        ((files["second"], 0.5), (files["first"], 0.2)),
        ((files["scaled"], 1.0),),
    ]
    for turn in range(WARM_UP + SWITCHES):
        model_name = FLUX if turn % 10 == 9 else quantized
        loras = [(name, strength + turn / 1000) for name, strength in choices[turn % len(choices)]]
        graph, _ = graph_of(model_name, *loras, steps=1)
        server.run(graph.nodes)
        sizes.append(process.memory_info().rss)
    settled, last = max(sizes[WARM_UP - 10 : WARM_UP]), min(sizes[-10:])
    assert last - settled < GROWTH, [size >> 20 for size in sizes]
