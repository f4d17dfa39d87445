"""LoRAs on a 4-bit model as an artist uses them, over HTTP: stacked, stronger and weaker, by
schedule, taken off; and nothing left behind.
"""

import numpy as np
import pytest

from comfyui_server import Refused
from demo_graphs import FLUX, Graph, psnr
from demo_loras import LAYERS

WARM_UP, SWITCHES, GROWTH = 15, 50, 48 << 20


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


def test_one_two_another_strength_and_back_to_the_base_bit_for_bit(server, quantized, lora_files):
    first, second = lora_files["first"], lora_files["second"]
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


def test_the_loader_with_clip_and_a_dora(server, quantized, lora_files):
    dense = picture(server, FLUX, (lora_files["scaled"], 0.8))
    assert (
        psnr(picture(server, quantized, (lora_files["scaled"], 0.8)), dense)
        > psnr(picture(server, quantized), dense) + 3
    )


def test_a_hook_with_keyframes(server, quantized, lora_files):
    """Create Hook LoRA, scheduled: off in the first half of the steps."""
    graph = Graph()
    model, positive = graph.load(quantized), graph.prompt()
    hook = graph.add("CreateHookLoraModelOnly", lora_name=lora_files["first"], strength_model=1.0)
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
    base, full = picture(server, quantized), picture(server, quantized, (lora_files["first"], 1.0))
    assert not np.array_equal(scheduled, base)
    assert psnr(scheduled, base) > psnr(full, base)
    assert np.array_equal(picture(server, quantized), base)


def test_the_report_names_what_each_layer_does_and_changes_no_bit(server, quantized, lora_files):
    graph, saved = graph_of(
        quantized, (lora_files["first"], 1.0), (lora_files["scaled"], 0.5), report=True
    )
    outputs = server.run(graph.nodes)
    chart = outputs[graph.report]["nibble_chart"][0]
    assert {row["name"] for row in chart["rows"]} == set(LAYERS)
    assert {row["how"] for row in chart["rows"]} == {"rows"}
    assert all(row["rank"] == 16 and row["bytes"] for row in chart["rows"])
    assert np.array_equal(
        server.picture(outputs[saved]),
        picture(server, quantized, (lora_files["first"], 1.0), (lora_files["scaled"], 0.5)),
    )


def test_wrong_files_are_named_and_the_model_stays_as_it_was(server, quantized, lora_files):
    base = picture(server, quantized)
    graph, saved = graph_of(quantized, (lora_files["sdxl"], 1.0), report=True)
    outputs = server.run(graph.nodes)
    assert (
        "none of its keys fit"
        in dict(map(tuple, outputs[graph.report]["nibble_chart"][0]["summary"]))["result"]
    )
    assert np.array_equal(server.picture(outputs[saved]), base)
    with pytest.raises(
        Refused, match="double_blocks.0.img_mlp.0 holds numbers that are not finite"
    ):
        picture(server, quantized, (lora_files["nan"], 1.0))
    assert np.array_equal(picture(server, quantized), base)


def test_fifty_switches_of_lora_and_model_leave_nothing_behind(server, quantized, lora_files):
    """Memory of the server's process: after a warm-up it does not grow with what was switched."""
    psutil = pytest.importorskip(
        "psutil", reason="psutil is not installed: the leak test did NOT run"
    )
    process, sizes = psutil.Process(server.process.pid), []
    choices = [
        ((lora_files["first"], 1.0),),
        (),
        ((lora_files["second"], 0.5), (lora_files["first"], 0.2)),
        ((lora_files["scaled"], 1.0),),
    ]
    for turn in range(WARM_UP + SWITCHES):
        model_name = FLUX if turn % 10 == 9 else quantized
        loras = [(name, strength + turn / 1000) for name, strength in choices[turn % len(choices)]]
        graph, _ = graph_of(model_name, *loras, steps=1)
        server.run(graph.nodes)
        sizes.append(process.memory_info().rss)
    settled, last = max(sizes[WARM_UP - 10 : WARM_UP]), min(sizes[-10:])
    assert last - settled < GROWTH, [size >> 20 for size in sizes]
