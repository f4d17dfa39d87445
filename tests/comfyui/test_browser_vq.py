"""The VQ nodes' charts in a real browser: the report and a codebook's use after a run, the blocks
of a calibration at work, help pages, translations.
"""

import json
import urllib.request

import pytest

from comfyui_server import ROOT
from demo_graphs import FLUX

NODES = ("NibbleQuantizeVQ", "NibbleLoadVQ", "NibbleInspectVQ")
MAKE_GRAPH = """(source) => {
  app.graph.clear();
  const types = ["NibbleQuantizeVQ", "NibbleLoadVQ", "NibbleInspectVQ", "PreviewAny"];
  const nodes = types.map((type) => LiteGraph.createNode(type));
  nodes.forEach((node, i) => {
    app.graph.add(node);
    node.pos = [[20, 60], [480, 60], [900, 60], [480, 560]][i];
  });
  const [quantize, load, look, text] = nodes;
  const set = (name, value) => {
    quantize.widgets.find((widget) => widget.name === name).value = value;
  };
  set("model_name", source); set("filename", "flux-demo-3bit");
  quantize.connect(0, load, "model_name"); quantize.connect(0, look, "model_name");
  load.connect(0, text, 0);
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [60, 40]; app.canvas.setDirty(true, true);
  app.queuePrompt(0, 1);
}"""
DRAWN = """() => app.lastExecutionError?.exception_message
  ?? (document.querySelectorAll(".nibble-chart-host").length === 3 && "drawn")"""


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-light"], indirect=True)
def test_charts_of_codewords_are_drawn_in_the_nodes(screen):
    screen.page.evaluate(MAKE_GRAPH, FLUX)
    assert screen.page.wait_for_function(DRAWN, timeout=240_000).json_value() == "drawn"
    screen.page.wait_for_timeout(500)
    screen.page.get_by_text("Least used codebooks").click()
    screen.page.wait_for_timeout(300)
    assert screen.page.locator("circle.nibble-dot.nibble-vq").count() > 20
    assert screen.page.get_by_text("codewords", exact=False).count() >= 3
    screen.picture(f"vq-{screen.look}")


def test_a_calibration_at_work_has_a_curve_for_each_block(screen):
    drawn = screen.page.evaluate("""async () => {
      const { drawChart } = await import("/extensions/ComfyUI-Nibble/charts.mjs");
      const row = (number, points) => ({ name: `double_blocks.${number}`, number, points });
      const chart = drawChart({ kind: "blocks", title: "flux at work", subtitle: "best, 3 bits",
        blocks: 4, summary: [
          ["block", "2 of 4: double_blocks.1"], ["step", "60 of 120"], ["error", "19.0 dB"]],
        rows: [row(0, [[0, 10], [0.5, 14], [1, 20]]), row(1, [[0, 12], [0.5, 19]])] });
      chart.style.cssText = "position:fixed; left:80px; top:80px; width:420px; z-index:9999";
      document.body.append(chart);
      const root = chart.shadowRoot;
      return [root.querySelectorAll("path").length,
        [...root.querySelectorAll("circle")].map((c) => parseFloat(c.getAttribute("cx"))),
        root.querySelector("path").getAttribute("d").split("L").length];
    }""")
    screen.page.mouse.move(80 + 26 + 12 + 60, 80 + 150)
    screen.picture("vq-live")
    screen.page.evaluate("() => document.body.lastElementChild.remove()")
    assert drawn == [2, [pytest.approx(23), pytest.approx(37.5)], 3]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_translations_and_help_pages_follow_the_schema(server, language):
    with urllib.request.urlopen(server.url + "/i18n") as answer:
        served = json.load(answer)[language]["nodeDefs"]
    for node in NODES:
        schema = server.get(f"/object_info/{node}")[node]
        inputs = {
            key: spec
            for part in ("required", "optional")
            for key, spec in schema["input"].get(part, {}).items()
        }
        assert set(served[node]["inputs"]) == set(inputs), f"{language} {node}"
        assert len(served[node].get("outputs", {})) == len(schema["output"])
        if language == "en":
            assert all(served[node][key] == schema[key] for key in ("display_name", "description"))
            assert all(
                served[node]["inputs"][key]["tooltip"] == spec[1]["tooltip"]
                for key, spec in inputs.items()
            )
        text = (
            ROOT / "web" / "docs" / (f"{node}.md" if language == "en" else f"{node}/zh.md")
        ).read_text()
        assert all(f"**{key}**" in text for key in inputs), f"{language} {node}"
