"""Constant acceleration's training in a real ComfyUI: couplings of the demo model are made,
stopped, gone on with and refused in words.
"""

import json

import pytest

from comfyui_server import Refused
from demo_graphs import FLUX, Graph

PROMPTS = ("a red circle top left on black", "an orange square left on navy")
STEPS = 4


def coupling(
    graph: Graph,
    name: str,
    sampler: str = "euler",
    steps: int = STEPS,
    denoise: float = 1.0,
    prompts=PROMPTS,
    **changes,
) -> str:
    """Make CAF Couplings behind the demo model; returns its id."""
    model, positive = graph.load(FLUX), graph.prompt(prompts[0])
    for text in prompts[1:]:
        positive = graph.add(
            "ConditioningCombine",
            conditioning_1=[positive, 0],
            conditioning_2=[graph.prompt(text), 0],
        )
    sigmas = graph.add(
        "BasicScheduler", model=[model, 0], scheduler="simple", steps=steps, denoise=denoise
    )
    defaults = dict(count=4, seed=5, filename=name, overwrite=False, cfg=1.0, batch_size=2)
    return graph.add(
        "NibbleMakeCAFCouplings",
        model=[model, 0],
        positive=[positive, 0],
        latent_image=[graph.latent(), 0],
        sigmas=[sigmas, 0],
        sampler=[graph.add("KSamplerSelect", sampler_name=sampler), 0],
        **(defaults | changes),
    )


def facts(output: dict) -> dict:
    return dict(output["nibble_chart"][0]["summary"])


def pairs(server, name: str) -> dict:
    """Pair → (noise, data, caption) from the files themselves."""
    from safetensors import safe_open

    found = {}
    for path in (server.home / "output" / "caf_couplings" / name).glob("pairs-*.safetensors"):
        with safe_open(path, "pt") as file:
            for row, (pair, caption, _) in enumerate(json.loads(file.metadata()["pairs"])):
                found[pair] = (file.get_tensor("noise")[row], file.get_tensor("data")[row], caption)
    return found


def test_couplings_are_made_and_shown_while_it_works(server):
    graph = Graph()
    node = coupling(graph, "made")
    seen = server.events(graph.nodes)
    charts = [event["data"]["chart"] for event in seen if event["type"] == "nibble_chart"]
    assert [dict(chart["summary"])["pairs"] for chart in charts] == ["2 of 4", "4 of 4"], (
        "drawn after every batch"
    )
    previews = [
        event["data"]
        for event in seen
        if event["type"] == "binary" and b"JFIF" in event["data"][:200]
    ]
    assert len(previews) >= 2
    done = next(
        event["data"]["output"]
        for event in seen
        if event["type"] == "executed" and event["data"]["node"] == node
    )
    assert facts(done)["prompts"] == "2"
    assert facts(done)["teacher"] == "euler, 4 steps"
    assert facts(done)["folder"] == "output/caf_couplings/made"
    stored = pairs(server, "made")
    assert sorted(stored) == [0, 1, 2, 3]
    assert [stored[i][2] for i in range(4)] == [0, 1, 0, 1]


def test_a_pair_is_the_picture_that_the_sampler_draws_of_its_noise(server):
    """KSampler with seed + 1 draws pair 1: ComfyUI's own noise for one picture is the pair's."""
    import torch

    graph = Graph()
    coupling(graph, "same")
    latent = graph.sample(graph.load(FLUX), graph.prompt(PROMPTS[1]), seed=6, steps=STEPS)
    saved = graph.add("SaveLatent", samples=[latent, 0], filename_prefix="same")
    output = server.run(graph.nodes)[saved]["latents"][0]
    from safetensors.torch import load_file

    drawn = load_file(server.home / "output" / output["subfolder"] / output["filename"])[
        "latent_tensor"
    ]
    noise, data, _ = pairs(server, "same")[1]
    assert torch.equal(noise, torch.randn(1, *noise.shape, generator=torch.manual_seed(6))[0])
    scale, shift = 0.3611, 0.1159  # FLUX's latents in the model's units, from those of its VAE
    torch.testing.assert_close(data, (drawn[0] - shift) * scale, rtol=1e-3, atol=1e-3)


def test_stopped_it_goes_on_and_ends_as_if_it_had_not_been_and_more_are_added(server):
    import torch

    graph = Graph()
    coupling(graph, "whole", count=8)
    server.run(graph.nodes)
    graph = Graph()
    coupling(graph, "stopped", count=8)
    seen = server.events(
        graph.nodes, lambda event: event["type"] == "nibble_chart" and server.post("/interrupt", {})
    )
    assert seen[-1]["type"] == "execution_interrupted", "what is made is kept"
    assert 2 <= len(pairs(server, "stopped")) < 8, "what is made is kept"
    graph = Graph()
    node = coupling(graph, "stopped", count=8)
    assert facts(server.run(graph.nodes)[node])["pairs"] == "8 of 8"
    wanted, found = pairs(server, "whole"), pairs(server, "stopped")
    assert wanted.keys() == found.keys()
    assert all(
        torch.equal(a, b)
        for pair in wanted
        for a, b in zip(wanted[pair][:2], found[pair][:2], strict=True)
    )
    graph = Graph()
    node = coupling(graph, "stopped", count=9)
    assert facts(server.run(graph.nodes)[node])["pairs"] == "9 of 9"
    graph = Graph()
    node = coupling(graph, "stopped", count=8)
    assert (
        facts(server.run(graph.nodes)[node])["time per pair"]
        == "made already, with the same inputs"
    )


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sampler": "euler_ancestral"}, "euler_ancestral adds noise on its way"),
        ({"sampler": "dpmpp_2m_sde"}, "adds noise on its way"),
        ({"denoise": 0.5}, "The sigmas begin at 0.*denoise 1"),
        ({"cfg": 4.0}, "no negative prompt to guide away from"),
        ({"filename": "a/b"}, "cannot be a file's name in"),
    ],
)
def test_wrong_inputs_are_refused_in_words(server, changes, said):
    graph = Graph()
    coupling(graph, changes.pop("filename", "never"), **changes)
    with pytest.raises(Refused, match=said):
        server.run(graph.nodes)
    assert not (server.home / "output" / "caf_couplings" / "never").exists()


def test_other_inputs_under_the_same_name_need_overwrite(server):
    for changes, refusal in (
        ({}, None),
        ({"seed": 6}, "its seed is 5, and 6 is asked for"),
        ({"prompts": PROMPTS[:1]}, "its prompts are others"),
        ({"seed": 6, "overwrite": True}, None),
    ):
        graph = Graph()
        node = coupling(graph, "other", **({"count": 1} | changes))
        if refusal:
            with pytest.raises(
                Refused, match=f"other holds couplings of another run: {refusal}; turn on overwrite"
            ):
                server.run(graph.nodes)
        else:
            assert facts(server.run(graph.nodes)[node])["pairs"] == "1 of 1"


# ---- Train CAF


TRAINED = 6  # steps of each net


def training(graph: Graph, name: str, model: str = FLUX, **changes) -> str:
    """Train CAF on nine pairs of the demo model; returns its id."""
    pairs = coupling(graph, "for training", count=9, seed=0, batch_size=8)
    defaults = dict(
        filename=name,
        overwrite=False,
        steps=TRAINED,
        learning_rate=0.003,
        rank=4,
        h=1.5,
        batch_size=2,
        grad_accumulation_steps=1,
        optimizer="AdamW",
        seed=0,
        training_dtype="fp32",
        gradient_checkpointing=True,
        offloading=False,
        layers="",
        preview_every=4,
    )
    return graph.add(
        "NibbleTrainCAF", model=[graph.load(model), 0], couplings=[pairs, 0], **(defaults | changes)
    )


def heads(server, name: str) -> dict:
    from safetensors.torch import load_file

    return load_file(server.folder("caf") / f"{name}.caf.safetensors")


@pytest.mark.parametrize("kind", ["16-bit", "4-bit"])
def test_heads_are_trained_shown_and_wired_on_to_a_picture(server, kind, request):
    model = FLUX if kind == "16-bit" else request.getfixturevalue("quantized")
    graph = Graph()
    node = training(graph, f"taught-{kind}", model)
    loaded = graph.add("NibbleLoadCAF", model=[graph.load(model), 0], caf_name=[node, 0])
    sampler = graph.add("NibbleCAFSampler", model=[loaded, 0], steps=2, denoise=1.0, ahead=0.5)
    noise, guider = (
        graph.add("RandomNoise", noise_seed=3),
        graph.add("BasicGuider", model=[loaded, 0], conditioning=[graph.prompt(PROMPTS[0]), 0]),
    )
    drawn = graph.add(
        "SamplerCustomAdvanced",
        noise=[noise, 0],
        guider=[guider, 0],
        sampler=[sampler, 0],
        sigmas=[sampler, 1],
        latent_image=[graph.latent(), 0],
    )
    saved = graph.save(drawn)
    graph.add("LossGraphNode", loss=[node, 1], filename_prefix="losses")
    seen = server.events(graph.nodes)
    charts = [
        event["data"]["chart"]
        for event in seen
        if event["type"] == "nibble_chart" and event["data"]["node"] == node
    ]
    assert charts and all(
        chart["kind"] == "curve" and chart["phases"] == [["velocity", 0], ["acceleration", TRAINED]]
        for chart in charts
    )
    previews = [
        event["data"]
        for event in seen
        if event["type"] == "binary" and b"JFIF" in event["data"][:200]
    ]
    assert len(previews) >= 3, "a picture every four steps"
    outputs = {
        event["data"]["node"]: event["data"]["output"]
        for event in seen
        if event["type"] == "executed"
    }
    told = facts(outputs[node])
    assert told["step"] == f"{2 * TRAINED} of {2 * TRAINED}"
    assert told["pairs"] == "8 and 1 held out"
    assert "at 3 calls; the model itself" in told["held-out error"]
    assert [path.name for path in server.folder("caf").glob(f"taught-{kind}*")] == [
        f"taught-{kind}.caf.safetensors"
    ]
    assert server.picture(outputs[saved]).std() > 0.02


def test_stopped_training_goes_on_and_ends_as_if_it_had_not_been(server):
    folder = server.folder("caf")
    whole = Graph()
    training(whole, "whole", preview_every=0)
    server.run(whole.nodes)
    for phase, text in (
        ("velocity", "velocity net, step 3 "),
        ("acceleration", "acceleration net, step 2 "),
    ):
        graph, stopped = Graph(), []
        node = training(graph, "stopped", preview_every=0)

        def stop(event, text=text, stopped=stopped):
            if event["type"] == "binary" and text.encode() in event["data"] and not stopped:
                stopped.append(server.post("/interrupt", {}))

        assert server.events(graph.nodes, stop)[-1]["type"] == "execution_interrupted"
        assert f"stopped.caf.{phase}.state" in {path.name for path in folder.glob("stopped*")}
        assert not list(folder.glob("*.partial"))
    told = facts(server.run(graph.nodes)[node])
    assert told["step"] == f"{2 * TRAINED} of {2 * TRAINED}"
    assert not list(folder.glob("*.state"))
    wanted, found = heads(server, "whole"), heads(server, "stopped")
    assert wanted.keys() == found.keys()
    assert all((wanted[name] == found[name]).all() for name in wanted)
    again = Graph()
    node = training(again, "stopped", preview_every=2)
    assert "trained already" in server.run(again.nodes)[node]["nibble_chart"][0]["subtitle"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"layers": "nothing.*"}, "No linear layer of the model is called"),
        ({"rank": 1000}, "rank 1000 is not between 0"),
        ({"filename": "../mine"}, "leads out of the folder"),
    ],
)
def test_wrong_inputs_of_the_training_are_refused_in_words(server, changes, said):
    graph = Graph()
    training(graph, changes.pop("filename", "never"), **changes)
    with pytest.raises(Refused, match=said):
        server.run(graph.nodes)
    assert not list(server.folder("caf").glob("never*"))
