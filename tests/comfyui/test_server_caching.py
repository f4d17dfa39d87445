"""Caching done to a real ComfyUI on the demo model: sampled, applied, calibrated, in awkward
graphs, stopped midway and fed with wrong files.
"""

import time

import numpy as np
import pytest

from caching_graphs import STEPS, CacheGraph, chart_of, computed
from comfyui_server import Refused
from demo_graphs import FLUX, VAE, psnr

NODES = (
    "NibbleTeaCacheSampler",
    "NibbleApplyTeaCache",
    "NibbleApplySmoothCache",
    "NibbleCalibrateCache",
)
SOCKETS = {"NOISE", "GUIDER", "SAMPLER", "SIGMAS", "LATENT", "MODEL", "CONDITIONING", "VAE"}


@pytest.fixture
def graph() -> CacheGraph:
    return CacheGraph()


@pytest.fixture(scope="module")
def plain(server) -> np.ndarray:
    """The uncached picture, of ComfyUI's own node."""
    graph = CacheGraph()
    saved = graph.save(graph.add("SamplerCustomAdvanced", **graph.parts(graph.load(FLUX))))
    return server.picture(server.run(graph.nodes)[saved])


def test_the_nodes_are_there_with_tooltips_and_at_most_six_visible_widgets(server):
    for name in NODES:
        info = server.get(f"/object_info/{name}")[name]
        inputs = [
            spec
            for group in ("required", "optional")
            for spec in info["input"].get(group, {}).values()
        ]
        assert all(spec[1].get("tooltip") for spec in inputs), name
        assert all(info["output_tooltips"]), name
        assert (
            sum(spec[0] not in SOCKETS and not spec[1].get("advanced") for spec in inputs) <= 6
        ), name
        assert info["category"].startswith("Nibble")


def test_threshold_zero_is_samplercustomadvanced_bit_for_bit(server, graph, plain):
    node = graph.teacache_sampler(graph.load(FLUX), preset="custom", threshold=0.0)
    saved = graph.save(node)
    outputs = server.run(graph.nodes)
    assert np.array_equal(server.picture(outputs[saved]), plain)
    assert computed(chart_of(outputs[node])) == [True] * STEPS


@pytest.mark.parametrize("preset", ["quality", "balanced", "fast"])
def test_a_preset_reuses_steps_and_compares_itself_on_request(server, graph, plain, preset):
    node = graph.teacache_sampler(graph.load(FLUX), compare=True, preset=preset)
    saved = graph.save(node)
    outputs = server.run(graph.nodes)
    chart = chart_of(outputs[node])
    assert computed(chart)[0] is computed(chart)[-1] is True
    assert 0 < computed(chart).count(False) < STEPS
    told = dict(chart["summary"])
    assert "dB PSNR of the latent" in told["against uncached"]
    assert "uncached" in told["time"]
    assert psnr(server.picture(outputs[saved]), plain) > 20


def test_the_strip_is_sent_step_by_step_while_sampling(server, graph):
    node = graph.teacache_sampler(graph.load(FLUX), parts=graph.parts("1", seed=31))
    saved = graph.save(node)
    seen = server.events(graph.nodes)
    charts = [
        event["data"]["chart"]
        for event in seen
        if event["type"] == "nibble_chart" and event["data"]["node"] == node
    ]
    pending = [computed(chart).count(None) for chart in charts]
    assert len(charts) >= STEPS
    assert pending == sorted(pending, reverse=True)
    assert pending[0] == STEPS - 1
    assert pending[-1] == 0
    last = next(
        event["data"]["output"]
        for event in seen
        if event["type"] == "executed" and event["data"]["node"] == node
    )
    assert computed(chart_of(last)) == computed(charts[-1])
    assert [
        event["data"]
        for event in seen
        if event["type"] == "progress"
        and event["data"]["node"] == node
        and event["data"]["max"] == STEPS
    ]
    assert saved


def test_any_sampler_on_a_model_with_teacache_and_none_of_it_stays_on_the_model(
    server, graph, plain
):
    model = graph.load(FLUX)
    patched = graph.apply_teacache(model)
    cached = graph.save(graph.sample(patched, graph.prompt(), steps=STEPS))
    bare = graph.save(graph.sample(model, graph.prompt(), steps=STEPS))
    seen = server.events(graph.nodes)
    charts = [
        event["data"]["chart"]
        for event in seen
        if event["type"] == "nibble_chart" and event["data"]["node"] == patched
    ]
    assert computed(charts[-1]).count(False) > 0
    assert None not in computed(charts[-1])
    pictures = {
        event["data"]["node"]: server.picture(event["data"]["output"])
        for event in seen
        if event["type"] == "executed" and "images" in event["data"]["output"]
    }
    assert np.array_equal(pictures[bare], plain)
    assert 20 < psnr(pictures[cached], plain) < 100


def test_two_samplers_in_one_graph_do_not_disturb_one_another(server, graph):
    def one(graph, threshold, text):
        node = graph.teacache_sampler(
            graph.load(FLUX),
            preset="custom",
            threshold=threshold,
            parts=graph.parts(graph.load(FLUX), text=text),
        )
        return node, graph.save(node)

    wanted = [(0.1, "a blue star bottom on white"), (0.4, "a red circle top left on black")]
    together = [one(graph, *want) for want in wanted]
    outputs = server.run(graph.nodes)
    for (node, saved), want in zip(together, wanted, strict=True):
        alone = CacheGraph()
        one_node, one_saved = one(alone, *want)
        apart = server.run(alone.nodes)
        assert computed(chart_of(outputs[node])) == computed(chart_of(apart[one_node]))
        assert np.array_equal(server.picture(outputs[saved]), server.picture(apart[one_saved]))


def hires(graph: CacheGraph, first: str, second: str) -> str:
    """A picture, enlarged by half and sampled again."""
    positive = graph.prompt()
    small = graph.sample(first, positive, steps=STEPS)
    large = graph.add(
        "LatentUpscale",
        samples=[small, 0],
        upscale_method="bicubic",
        width=96,
        height=96,
        crop="disabled",
    )
    return graph.save(
        graph.add(
            "KSampler",
            model=[second, 0],
            positive=[positive, 0],
            negative=[positive, 0],
            latent_image=[large, 0],
            seed=2,
            steps=STEPS,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            denoise=0.6,
        )
    )


def test_a_second_pass_of_another_resolution_begins_anew(server, graph):
    model = graph.load(FLUX)
    shared = graph.apply_teacache(model)
    one = hires(graph, shared, shared)
    # presets: the threshold plays no part
    other = hires(
        graph,
        graph.apply_teacache(model, threshold=0.3),
        graph.apply_teacache(model, threshold=0.35),
    )
    outputs = server.run(graph.nodes)
    picture = server.picture(outputs[one])
    assert picture.shape[:2] == (96, 96)
    assert np.array_equal(picture, server.picture(outputs[other]))


def test_a_batch_with_a_negative_prompt(server, graph):
    """Positive and negative prompt of two pictures in one call of the model; a threshold of 0 is
    still the bare model bit for bit.
    """
    model = graph.load(FLUX)
    positive, negative = graph.prompt(), graph.prompt("a pink ring left on white")

    def two(model):
        latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=2)
        return graph.save(
            graph.add(
                "KSampler",
                model=[model, 0],
                positive=[positive, 0],
                negative=[negative, 0],
                latent_image=[latent, 0],
                seed=3,
                steps=STEPS,
                cfg=2.0,
                sampler_name="euler",
                scheduler="simple",
                denoise=1.0,
            )
        )

    bare, zero, cached = (
        two(model),
        two(graph.apply_teacache(model, preset="custom", threshold=0.0)),
        two(graph.apply_teacache(model)),
    )
    outputs = server.run(graph.nodes)
    for index in range(2):
        pictures = [
            server.picture({"images": outputs[node]["images"][index:]})
            for node in (bare, zero, cached)
        ]
        assert np.array_equal(pictures[0], pictures[1])
        assert 15 < psnr(pictures[0], pictures[2]) < 100


def test_stopping_a_run_leaves_nothing_on_the_model(server, graph, plain):
    model = graph.load(FLUX)
    graph.save(
        graph.teacache_sampler(
            model, parts=graph.parts(model, steps=2000), preset="custom", threshold=3.0
        )
    )
    prompt = server.queue(graph.nodes)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
        job[1] == prompt for job in server.get("/queue")["queue_running"]
    ):
        time.sleep(0.05)
    time.sleep(1)  # into the sampling loop
    server.post("/interrupt", {})
    with pytest.raises(Refused, match="interrupted"):
        server.result(prompt)
    again = CacheGraph()
    saved = again.save(again.sample(again.load(FLUX), again.prompt(), steps=STEPS))
    assert np.array_equal(server.picture(server.run(again.nodes)[saved]), plain)


def test_the_difference_is_told_of_pictures_where_there_is_a_vae(server, graph):
    vae = graph.add("VAELoader", vae_name=VAE)
    node = graph.teacache_sampler(graph.load(FLUX), compare=True, vae=[vae, 0])
    graph.save(node)
    assert (
        "dB PSNR of the picture"
        in dict(chart_of(server.run(graph.nodes)[node])["summary"])["against uncached"]
    )
