"""FEATHER's nodes in a running ComfyUI: over HTTP, and drawn in the browser."""

import numpy as np
import pytest

import browser
from comfyui_server import Refused

LOOKS = ("classic-dark", "nodes2-light")
MAKE_GRAPH = """([height, keep]) => {
  app.graph.clear();
  const types = ["TestSeeker", "NibbleFeatherPrune", "TestSeekerAsk", "NibbleFeatherReport",
    "PreviewImage"];
  const [seek, prune, ask, report, preview] = types.map((type) => LiteGraph.createNode(type));
  [seek, prune, ask, report, preview].forEach((node, i) => {
    app.graph.add(node);
    node.pos = [[20, 60], [300, 60], [20, 230], [740, 60], [20, 400]][i];
  });
  seek.widgets[0].value = height;
  prune.widgets.find((widget) => widget.name === "keep").value = keep;
  seek.connect(0, prune, "clip"); prune.connect(0, ask, "clip"); seek.connect(1, ask, "image");
  ask.connect(0, report, "conditioning"); report.connect(0, preview, 0);
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [60, 40]; app.canvas.setDirty(true, true);
}"""
DRAWN = """() => {
  const charts = [...document.querySelectorAll(".nibble-chart-host")];
  return app.lastExecutionError?.exception_message
    ?? (charts.length === 2 && charts.every((chart) => chart.shadowRoot.querySelector("img")));
}"""


def graph(height: float = 0.0, keep: float = 0.3, image: bool = True, **changes) -> dict:
    """Prune, ask, report, save; and the same question without pruning."""
    options = (
        dict(
            clip=["1", 0],
            keep=keep,
            mode="scatter",
            criterion="feather",
            stride=3,
            first_layer=0,
            second_layer=0,
        )
        | changes
    )
    asked = {"clip": ["2", 0]} | ({"image": ["1", 1]} if image else {})
    return {
        "1": {"class_type": "TestSeeker", "inputs": {"height": height}},
        "2": {"class_type": "NibbleFeatherPrune", "inputs": options},
        "3": {"class_type": "TestSeekerAsk", "inputs": asked},
        "4": {"class_type": "NibbleFeatherReport", "inputs": {"conditioning": ["3", 0]}},
        "5": {
            "class_type": "SaveImage",
            "inputs": {"images": ["4", 0], "filename_prefix": "feather"},
        },
    }


def red(picture: np.ndarray) -> float:
    """Height, 0 to 1, of what is redder than the rest."""
    score = picture[..., 0] - picture[..., 1:].max(-1)
    return float(np.argwhere(score > 0.2)[:, 0].mean() / len(picture))


@pytest.mark.parametrize("height", [0.0, 1.0])
def test_the_square_is_still_light_wherever_it_stands(seeker, height):
    outputs = seeker.run(graph(height))
    (chart,) = outputs["4"]["nibble_chart"]
    assert chart["kind"] == "patches"
    assert chart["tokens"][0] == 27 * 27 + 6
    assert chart["tokens"][-1] < 40
    assert abs(red(seeker.picture(outputs["5"])) - (1.5 + height * 24) / 27) < 0.06


def test_a_chart_is_sent_to_the_prune_node_while_the_prompt_is_encoded(seeker):
    events = seeker.events(graph(0.5))
    charts = [event["data"] for event in events if event["type"] == "nibble_chart"]
    assert [chart["node"] for chart in charts] == ["2"]
    assert charts[0]["chart"]["pictures"][0]["url"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(image=False), "give the prompt an image"),
        (dict(keep=1.0), "keep below 1"),
        (dict(first_layer=5, second_layer=3), "rising order"),
        (dict(keep=0.0), "keep"),
        (dict(second_layer=8), "choose from 1 to 7"),
    ],
)
def test_bad_settings_are_refused_in_words_and_the_server_lives(seeker, changes, said):
    with pytest.raises(Refused, match=said):
        seeker.run(graph(**changes))
    assert seeker.get("/system_stats")


@pytest.fixture(scope="module")
def page(seeker):
    with browser.opened(seeker.url) as screen:
        yield screen


@pytest.mark.parametrize("look", LOOKS)
def test_both_nodes_draw_the_picture_and_its_patches(page, look):
    page.wear(look)
    page.problems.clear()
    page.page.evaluate(MAKE_GRAPH, [0.2 + 0.1 * LOOKS.index(look), 0.3])
    page.page.evaluate("() => app.queuePrompt(0, 1)")
    page.page.wait_for_function(DRAWN, timeout=120_000)
    page.page.wait_for_timeout(800)
    page.picture(f"feather-{look}")
    told = page.page.evaluate(
        "() => Object.values(app.nodeOutputs).map((o) => o.nibble_chart?.[0]).find((c) => c?.kind"
        " === 'patches')"
    )
    kept = page.page.locator(".nibble-picture svg").first.get_attribute("aria-label")
    assert kept == f"{told['pictures'][0]['stage'].count(2)} of 729 patches kept"
    assert page.page.locator(".nibble-layers-left rect").count() == 2 * len(told["tokens"])
    for chart in page.page.locator(".nibble-widget").all():  # nothing is cut off
        seen, needed = chart.evaluate(
            "(element) => [element.offsetHeight, element.firstElementChild.offsetHeight]"
        )
        assert needed <= seen + 1
        assert needed > 300
    assert page.problems == []
