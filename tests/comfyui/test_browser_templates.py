"""The templates in a real browser, in both renderers: nothing lies on anything else, and their
links are those of ComfyUI's own templates.
"""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest

from browser import fetch
from comfyui_server import ROOT

TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
# [title, x, y, width, height] of each node, in the canvas's own pixels
CLASSIC = """() => app.graph._nodes.map((node) => {
  node.updateArea?.();
  return [node.title, ...node.getBounding(new Float32Array(4))];
})"""
NODES_2 = """() => [...document.querySelectorAll("[data-node-id]")].map((element) => {
  const box = element.getBoundingClientRect(), { scale } = app.canvas.ds;
  const node = app.graph.getNodeById(element.dataset.nodeId);
  return [node?.title, box.x / scale, box.y / scale, box.width / scale, box.height / scale];
})"""
WHOLE = "() => app.extensionManager.command.execute('Comfy.Canvas.FitView')"
DEPRECATED = """() => app.graph._nodes.filter((node) => node.constructor.nodeData?.deprecated)
  .map((node) => node.type)"""
SLACK = 2  # pixels: borders


def opened(screen, server, name: str) -> list:
    """Opens a template; the places of its nodes."""
    workflow = json.loads(fetch(server, f"/api/workflow_templates/ComfyUI-Nibble/{name}.json"))
    screen.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    screen.page.wait_for_timeout(700)
    screen.page.keyboard.press("Escape")  # the list of models to download
    screen.page.evaluate(WHOLE)
    screen.page.wait_for_timeout(700)
    boxes = screen.page.evaluate(CLASSIC if screen.look.startswith("classic") else NODES_2)
    assert len(boxes) == len(workflow["nodes"])
    return boxes


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-dark"], indirect=True)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_opens_without_overlap(screen, server, name):
    boxes = opened(screen, server, name)
    screen.picture(f"template-{name}-{screen.look}")
    assert screen.page.evaluate(DEPRECATED) == []
    for (one, x, y, w, h), (two, x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        apart = (
            x + w <= x2 + SLACK
            or x2 + w2 <= x + SLACK
            or y + h <= y2 + SLACK
            or y2 + h2 <= y + SLACK
        )
        assert apart, f"{one} and {two}"


def test_links_are_those_of_comfyui_s_own_templates():
    found = importlib.util.find_spec("comfyui_workflow_templates_json")
    if found is None:
        pytest.skip("comfyui_workflow_templates_json is not installed: links were NOT compared")
    folder = Path(found.submodule_search_locations[0]) / "templates"
    known = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.json")))
    ours = {
        model["url"]
        for name in TEMPLATES
        for node in json.loads((ROOT / "example_workflows" / f"{name}.json").read_text())["nodes"]
        for model in node["properties"].get("models", [])
        if "nunchaku" not in model["url"]
    }
    assert {url for url in ours if url not in known} == set()
