"""IntLoRA's nodes in a real browser: their charts in both renderers and both palettes, help pages,
translations.
"""

import json

import pytest
from safetensors.torch import save_file

from browser import LOOKS, fetch
from comfyui_server import ROOT
from demo_loras import STYLE, style

NODES = ("NibbleConvertIntLoRA", "NibbleApplyIntLoRA", "NibbleMergeIntLoRA")
GRAPH = """([model, lora]) => {
  app.graph.clear();
  const types = ["NibbleLoadSVDQuant", "NibbleConvertIntLoRA", "NibbleApplyIntLoRA",
    "NibbleMergeIntLoRA"];
  const nodes = types.map((type) => LiteGraph.createNode(type));
  nodes.forEach((node, i) => { app.graph.add(node); node.pos = [20 + 400 * i, 60]; });
  const [load, convert, apply, merge] = nodes;
  const set = (node, name, value) => {
    node.widgets.find((widget) => widget.name === name).value = value;
  };
  set(load, "model_name", model); set(convert, "lora_name", lora); set(convert, "filename", "seen");
  set(apply, "mode", "merge");
  set(merge, "filename", "seen"); set(merge, "branch", "same size");
  load.connect(0, convert, "model"); load.connect(0, apply, "model");
  convert.connect(0, apply, "intlora_name"); apply.connect(0, merge, "model");
  app.canvas.ds.scale = 0.9; app.canvas.ds.offset = [20, 40]; app.canvas.setDirty(true, true);
}"""


@pytest.mark.parametrize("screen", LOOKS, indirect=True)
def test_charts_are_drawn_in_the_nodes_after_a_run(server, quantized, screen, request):
    save_file(style(5), server.folder("loras") / STYLE)
    screen.page.evaluate(GRAPH, [quantized, STYLE])
    screen.page.evaluate("() => app.queuePrompt(0, 1)")
    ended = (
        "() => app.lastExecutionError?.exception_message ??"
        " (document.querySelectorAll('.nibble-chart-host').length === 4 && 'drawn')"
    )
    assert screen.page.wait_for_function(ended, timeout=240_000).json_value() == "drawn"
    screen.page.wait_for_timeout(500)
    screen.picture(f"intlora-{request.node.callspec.id}")
    hosts = """() => [...document.querySelectorAll(".nibble-chart-host")]
      .map((host) => [host.shadowRoot.querySelectorAll("rect").length,
      host.getBoundingClientRect().width > 150, host.shadowRoot.textContent])"""
    drawn = sorted(screen.page.evaluate(hosts))
    assert [count for count, _, _ in drawn] == [0, 5, 5, 5]
    assert all(wide for _, wide, _ in drawn)
    assert all("Share of the LoRA kept" in text and "Layers" in text for _, _, text in drawn[1:])


def test_the_chart_holds_hundreds_of_layers_and_hostile_names(screen):
    drawn = screen.page.evaluate("""async () => {
      const { drawChart } = await import("/extensions/ComfyUI-Nibble/charts.mjs");
      const row = (i) => ({ name: `blocks.${i}.<img src=x onerror=alert(1)>`,
        action: i % 9 ? "w4a4" : "keep", kept: i % 3 / 2, nearest: null,
        why: "<b>why</b>", bytes: 1e6 });
      const draw = (chart) => drawChart({ kind: "kept", title: "t", ...chart }).shadowRoot;
      const rows = Array.from({ length: 500 }, (_, i) => row(i));
      const root = draw({ summary: [["kept", "50 %"]], rows }), empty = draw({ rows: [] });
      const heights = [...root.querySelectorAll("rect")].slice(0, 3)
        .map((rect) => parseFloat(rect.getAttribute("height")));
      const count = (selector) => root.querySelectorAll(selector).length;
      return [count("rect"), count("img, li b b"), count("li"), heights, empty.textContent];
    }""")
    assert drawn == [500, 0, 60, [1, 48, 96], "t"]


@pytest.mark.parametrize("node", NODES)
def test_help_pages_and_translations_are_served(server, node):
    schema = server.get(f"/object_info/{node}")[node]
    inputs = {
        key: spec
        for part in ("required", "optional")
        for key, spec in schema["input"].get(part, {}).items()
    }
    assert sum(not spec[1].get("advanced") for spec in inputs.values()) <= 6
    assert all(spec[1].get("tooltip") for spec in inputs.values())
    for path in (f"{node}.md", f"{node}/zh.md"):
        text = fetch(server, f"/extensions/ComfyUI-Nibble/docs/{path}").decode()
        assert text.startswith("# "), path
        assert all(f"**{name}**" in text for name in inputs), path
    served = json.loads(fetch(server, "/i18n"))
    for language in ("en", "zh"):
        told = served[language]["nodeDefs"][node]
        assert set(told["inputs"]) == set(inputs)
        assert len(told["outputs"]) == len(schema["output"])
    told = served["en"]["nodeDefs"][node]
    assert told["display_name"] == schema["display_name"]
    assert told["description"] == schema["description"]
    assert all(told["inputs"][key]["tooltip"] == spec[1]["tooltip"] for key, spec in inputs.items())
    assert (
        (ROOT / "web" / "docs" / f"{node}.md")
        .read_text()
        .startswith(f"# {schema['display_name']}\n")
    )
