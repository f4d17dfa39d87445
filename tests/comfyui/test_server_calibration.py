"""Calibrations of caching in a real ComfyUI: measured, found by their model, told of other
schedules, and wrong files.
"""

import json

import numpy as np
import pytest

from caching_graphs import STEPS, CacheGraph, chart_of, computed, notes
from comfyui_server import Refused
from demo_graphs import FLUX, psnr


@pytest.fixture
def graph() -> CacheGraph:
    return CacheGraph()


@pytest.fixture(scope="module")
def plain(server) -> np.ndarray:
    """The uncached picture, of ComfyUI's own node."""
    graph = CacheGraph()
    saved = graph.save(graph.add("SamplerCustomAdvanced", **graph.parts(graph.load(FLUX))))
    return server.picture(server.run(graph.nodes)[saved])


@pytest.fixture(scope="module")
def calibrated(server) -> str:
    """A calibration of the demo model, made through the node."""
    graph = CacheGraph()
    node = graph.calibrate(graph.load(FLUX), filename="demo")
    assert chart_of(server.run(graph.nodes)[node])["kind"] == "calibration"
    return "demo.json"


def test_calibrate_then_sample_in_one_graph(server, graph, plain):
    model = graph.load(FLUX)
    calibration = graph.calibrate(model, filename="in-graph")
    tea = graph.teacache_sampler(
        model, calibration=[calibration, 0], preset="custom", threshold=0.2, rule="teacache"
    )
    smooth = graph.save(
        graph.sample(
            graph.apply_smoothcache(model, calibration=[calibration, 0]),
            graph.prompt(),
            steps=STEPS,
        )
    )
    saved = graph.save(tea)
    outputs = server.run(graph.nodes)
    measured = chart_of(outputs[calibration])
    assert measured["kind"] == "calibration"
    assert len(measured["points"]) == 2 * (STEPS - 1)
    assert measured["series"]
    assert (server.home / "models" / "nibble_cache" / "in-graph.json").exists()
    assert "calibrated" in chart_of(outputs[tea])["subtitle"]
    assert all(psnr(server.picture(outputs[node]), plain) > 20 for node in (saved, smooth))


def test_a_calibration_is_found_by_its_model_and_is_not_measured_twice(server, calibrated, graph):
    node = graph.calibrate(graph.load(FLUX), filename="demo", steps=STEPS)
    first = (server.home / "models" / "nibble_cache" / calibrated).stat().st_mtime_ns
    server.run(graph.nodes)
    assert (server.home / "models" / "nibble_cache" / calibrated).stat().st_mtime_ns == first
    assert node
    other = CacheGraph()
    applied = other.apply_smoothcache(other.load(FLUX))
    saved = other.save(other.sample(applied, other.prompt(), steps=STEPS))
    assert server.run(other.nodes)[saved]


@pytest.mark.parametrize("depth", ["step", "block", "sublayer"])
def test_smoothcache_at_every_depth(server, calibrated, plain, depth):
    graph = CacheGraph()
    applied = graph.apply_smoothcache(
        graph.load(FLUX), calibration=calibrated, depth=depth, alpha=0.3
    )
    saved = graph.save(graph.sample(applied, graph.prompt(), steps=STEPS))
    seen = server.events(graph.nodes)
    chart = [
        event["data"]["chart"]
        for event in seen
        if event["type"] == "nibble_chart" and event["data"]["node"] == applied
    ][-1]
    states = (
        computed(chart)
        if depth == "step"
        else [state for row in chart["rows"] for state in row["computed"]]
    )
    assert False in states
    assert None not in states
    assert bool(chart["rows"]) == (depth != "step")
    output = next(
        event["data"]["output"]
        for event in seen
        if event["type"] == "executed" and event["data"]["node"] == saved
    )
    assert 18 < psnr(server.picture(output), plain) < 100


def test_a_4_bit_model_is_calibrated_as_itself(server, quantized, calibrated, graph):
    model = graph.load(quantized)
    calibration = graph.calibrate(model, filename="four-bit")
    node = graph.teacache_sampler(model, calibration=[calibration, 0])
    graph.save(node)
    assert computed(chart_of(server.run(graph.nodes)[node])).count(False) > 0
    with pytest.raises(Refused, match="not for this model"):
        wrong = CacheGraph()
        wrong.save(wrong.teacache_sampler(wrong.load(quantized), calibration=calibrated))
        server.run(wrong.nodes)


def test_few_steps_and_another_schedule_are_told(server, calibrated, graph):
    model = graph.load(FLUX)
    few = graph.teacache_sampler(model, parts=graph.parts(model, steps=4))
    other = graph.teacache_sampler(
        model, parts=graph.parts(model, steps=20), calibration=calibrated
    )
    graph.save(few)
    graph.save(other)
    outputs = server.run(graph.nodes)
    assert "4 steps" in notes(chart_of(outputs[few]))
    assert "12" in notes(chart_of(outputs[other]))
    assert "20" in notes(chart_of(outputs[other]))


def test_smoothcache_without_a_calibration_says_what_to_do(server, quantized, graph):
    graph.quantize(filename="uncalibrated", rank=16)
    loaded = graph.add(
        "NibbleLoadSVDQuant", model_name=[graph.quantizer, 0], verify=True, compute_dtype="default"
    )
    graph.save(graph.sample(graph.apply_smoothcache(loaded), graph.prompt()))
    with pytest.raises(Refused, match="run Calibrate Cache"):
        server.run(graph.nodes)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"start": 0.8, "end": 0.2}, "start .* end"),
        ({"threshold": -1.0}, "min"),
        ({"threshold": 9.0}, "max"),
        ({"calibration": "gone.json"}, "gone.json"),
    ],
)
def test_values_that_make_no_sense_are_refused_before_work_starts(server, graph, change, said):
    graph.save(graph.teacache_sampler(graph.load(FLUX), **change))
    with pytest.raises(Refused, match=said):
        server.run(graph.nodes)


@pytest.mark.parametrize(
    "kind, said",
    [("newer", "update ComfyUI-Nibble"), ("text", "calibration"), ("cut", "calibration")],
)
def test_a_wrong_calibration_file_is_refused_in_words(server, calibrated, graph, kind, said):
    folder = server.home / "models" / "nibble_cache"
    good = (folder / calibrated).read_text()
    bad = {
        "newer": json.dumps(json.loads(good) | {"format": "nibble-cache/9"}),
        "text": "<html>not found</html>",
        "cut": good[:-40],
    }[kind]
    (folder / f"wrong-{kind}.json").write_text(bad)
    graph.save(graph.teacache_sampler(graph.load(FLUX), calibration=f"wrong-{kind}.json"))
    try:
        with pytest.raises(Refused, match=said) as refusal:
            server.run(graph.nodes)
        assert f"wrong-{kind}.json" in str(refusal.value)
        assert server.get("/system_stats")
    finally:
        (folder / f"wrong-{kind}.json").unlink()
