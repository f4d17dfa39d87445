"""Train IntLoRA in a real ComfyUI: pictures in, a file out that Apply IntLoRA puts on the model;
stopped, it goes on.
"""

import numpy as np
import pytest

from comfyui_server import Refused
from demo_graphs import FLUX, VAE, Graph, psnr

STEPS = 6
PLACES = {"left": 8, "right": 40}


def photos(graph: Graph) -> str:
    """A LATENT of two pictures: a square that no prompt of the demo's can ask for, on the left and
    on the right.
    """
    vae = graph.add("VAELoader", vae_name=VAE)
    pictures = []
    for x in PLACES.values():
        ground = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0x202040)
        patch = graph.add("EmptyImage", width=16, height=28, batch_size=1, color=0x6B4423)
        pictures.append(
            graph.add(
                "ImageCompositeMasked",
                destination=[ground, 0],
                source=[patch, 0],
                x=x,
                y=18,
                resize_source=False,
            )
        )
    return graph.add(
        "VAEEncode",
        pixels=[graph.add("ImageBatch", image1=[pictures[0], 0], image2=[pictures[1], 0]), 0],
        vae=[vae, 0],
    )


def training(name: str, model: str, **changes) -> tuple[Graph, str]:
    """(a graph that trains, the id of the trainer)."""
    graph = Graph()
    prompts = graph.add(
        "ConditioningCombine",
        conditioning_1=[graph.prompt("an orange square left on navy"), 0],
        conditioning_2=[graph.prompt("an orange square right on navy"), 0],
    )
    defaults = dict(
        filename=name,
        overwrite=False,
        steps=STEPS,
        learning_rate=0.005,
        rank=4,
        variant="shift_add",
        batch_size=2,
        grad_accumulation_steps=1,
        optimizer="AdamW",
        loss_function="MSE",
        seed=0,
        training_dtype="fp32",
        gradient_checkpointing=True,
        offloading=False,
        existing_lora="[None]",
        layers="",
        preview_every=3,
    )
    trainer = graph.add(
        "NibbleTrainIntLoRA",
        model=[graph.load(model), 0],
        latents=[photos(graph), 0],
        positive=[prompts, 0],
        **(defaults | changes),
    )
    return graph, trainer


def picture(server, model: str, intlora: str = "") -> np.ndarray:
    graph = Graph()
    loaded = graph.load(model)
    if intlora:
        loaded = graph.add(
            "NibbleApplyIntLoRA",
            model=[loaded, 0],
            intlora_name=intlora,
            strength=1.0,
            mode="branch",
        )
    saved = graph.save(graph.sample(loaded, graph.prompt("an orange square left on navy")))
    return server.picture(server.run(graph.nodes)[saved])


@pytest.fixture(scope="module")
def plain(server, quantized) -> np.ndarray:
    return picture(server, quantized)


def test_the_trained_file_changes_the_picture_and_the_base_stays(server, quantized, plain):
    graph, trainer = training("taught", quantized)
    seen = server.events(graph.nodes)
    charts = [event["data"]["chart"] for event in seen if event["type"] == "nibble_chart"]
    assert (
        charts
        and all(chart["kind"] == "curve" for chart in charts)
        and len(charts[-1]["points"]) == STEPS
    ), "drawn while it works"
    previews = [
        event["data"]
        for event in seen
        if event["type"] == "binary" and b"JFIF" in event["data"][:200]
    ]
    assert len(previews) >= 2, "a picture every three steps"
    done = next(
        event["data"]["output"]
        for event in seen
        if event["type"] == "executed" and event["data"]["node"] == trainer
    )
    assert ["step", f"{STEPS} of {STEPS}"] in done["nibble_chart"][0]["summary"]
    assert [path.name for path in server.folder("intlora").glob("taught*")] == [
        "taught.intlora.safetensors"
    ]
    taught = picture(server, quantized, intlora="taught.intlora.safetensors")
    assert np.abs(taught - plain).mean() > 0.003
    assert np.array_equal(picture(server, quantized), plain), "nothing is left on the model"


def test_name_lora_and_losses_are_wired_on(server, quantized, plain):
    graph, trainer = training("wired", quantized)
    applied = graph.add(
        "NibbleApplyIntLoRA",
        model=[graph.load(quantized), 0],
        intlora_name=[trainer, 0],
        strength=1.0,
        mode="branch",
    )
    stock = graph.add(
        "LoraModelLoader",
        model=[graph.load(quantized), 0],
        lora=[trainer, 1],
        strength_model=1.0,
        bypass=False,
    )
    positive = graph.prompt("an orange square left on navy")
    saved = [graph.save(graph.sample(model, positive)) for model in (applied, stock)]
    graph.add("LossGraphNode", loss=[trainer, 2], filename_prefix="losses")
    outputs = server.run(graph.nodes)
    first, second = (server.picture(outputs[name]) for name in saved)
    assert np.abs(first - plain).mean() > 0.003
    assert np.abs(first - second).mean() < 0.2 * np.abs(first - plain).mean()


def test_stopped_it_goes_on_and_ends_as_if_it_had_not_been(server, quantized):
    folder, many = server.folder("intlora"), 24
    whole, _ = training("whole", quantized, steps=many, preview_every=0)
    server.run(whole.nodes)
    graph, trainer = training("stopped", quantized, steps=many, preview_every=0)
    seen = server.events(
        graph.nodes, lambda event: event["type"] == "nibble_chart" and server.post("/interrupt", {})
    )
    assert seen[-1]["type"] == "execution_interrupted"
    assert [path.name for path in folder.glob("stopped*")] == ["stopped.intlora.state"], (
        "nothing half-written"
    )
    chart = server.run(graph.nodes)[trainer]["nibble_chart"][0]
    assert ["step", f"{many} of {many}"] in chart["summary"]
    assert not list(folder.glob("*.state*"))
    from safetensors.torch import load_file

    wanted, found = (
        load_file(folder / f"{name}.intlora.safetensors") for name in ("whole", "stopped")
    )
    assert wanted.keys() == found.keys()
    assert all((wanted[name] == found[name]).all() for name in wanted)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model": FLUX}, "in 16 bits and has no integers"),
        ({"layers": "nothing.*"}, "No 4-bit layer"),
        ({"filename": "../mine"}, "leads out of the folder"),
    ],
)
def test_wrong_inputs_are_refused_in_words(server, quantized, changes, said):
    model = changes.pop("model", quantized)
    graph, _ = training(changes.pop("filename", "never"), model, **changes)
    with pytest.raises(Refused, match=said):
        server.run(graph.nodes)
    assert not list(server.folder("intlora").glob("never*"))


def test_a_16_bit_model_is_rounded_taught_and_drawn_with(server):
    """Before anything is learned, MUL in 8 bits is near the 16-bit picture."""
    rounded = {"base": "round to nearest, 8 bits", "variant": "mul", "preview_every": 0}
    dense = picture(server, FLUX)
    for name, rate in (("idle", 1e-7), ("learned", 0.005)):
        graph, _ = training(name, FLUX, learning_rate=rate, **rounded)
        server.run(graph.nodes)
    idle = picture(server, FLUX, intlora="idle.intlora.safetensors")
    learned = picture(server, FLUX, intlora="learned.intlora.safetensors")
    print(psnr(idle, dense), psnr(learned, dense))
    assert psnr(idle, dense) > 25
    assert np.abs(learned - idle).mean() > 0.003
    again = picture(server, FLUX, intlora="learned.intlora.safetensors")
    assert np.array_equal(again, learned)
    assert np.array_equal(picture(server, FLUX), dense), "nothing is left on the model"
