"""Every chart can be read (contrast of its texts by WCAG 2.2, 1.4.3) and reached by keys, in both
renderers and both palettes.
"""

import pytest

from browser import LOOKS

ROWS = [
    {"name": f"blocks.{i}.a", "action": action, "how": how, "why": "its place", "db": 20.0 + i}
    | {"bytes_before": 800, "bytes_after": 200, "seconds": 1, "on": "pictures", "bytes": 900}
    | {"kept": 0.9, "nearest": 0.3}
    for i, (action, how) in enumerate(
        [("w4a4", "branch"), ("w4a16", "dense"), ("vq", "rows"), ("keep", "comfyui")] * 2
        + [("rows8", "refused")]
    )
]
SUMMARY = [["error", "median 20 dB"], ["pictures", "poor: shapes differ"], ["note", "x" * 50]]
PART = {"label": "weights", "bytes": 5_000_000_000, "kind": "weights"}
STAGE = {"name": "sample", "card": [PART], "ram": [PART], "streamed": 1, "before": 9_000_000_000}
SWITCH = {"name": "4-bit model", "stage": "sample", "saves": 1, "costs": "time", "how": "so"}
KINDS = {
    "layers": {"rows": ROWS},
    "kept": {"rows": ROWS},
    "lora": {"rows": ROWS},
    "facts": {"details": [["file", "6 GB"]]},
    "blocks": {
        "blocks": 2,
        "rows": [{"name": f"b.{i}", "number": i, "points": [[0, 20], [1, 24]]} for i in range(2)],
    },
    "curve": {"points": [[1, 2.0], [2, 1.0]], "smooth": [[1, 2.0], [2, 1.5]], "steps": 2},
    "strip": {
        "threshold": 0.1,
        "measure": "error",
        "forwards": 3.0,
        "cells": [
            {"step": i, "sigma": 0.5, "computed": state, "why": "reused", "change": 0.05}
            for i, state in enumerate([True, False, None])
        ],
    },
    "memory": {
        "verdict": "fits",
        "card": 8_000_000_000,
        "ram": 16_000_000_000,
        "stages": [STAGE],
        "switches": [SWITCH | {"on": True}, SWITCH | {"on": False}],
    },
    "calibration": {
        "points": [[0.1, 0.2], [0.2, 0.3]],
        "fit": [[0.1, 0.2], [0.2, 0.3]],
        "series": [{"name": f"part {i}", "y": [0.1, 0.2]} for i in range(6)],
    },
}
# kind → the tips that the arrow keys walk through
WALKED = {"layers": len(ROWS), "blocks": 2, "curve": 2, "strip": 3}
SHOW = """async (chart) => {
  const { drawChart } = await import("/extensions/ComfyUI-Nibble/charts.mjs");
  const { show } = await import("/extensions/ComfyUI-Nibble/widget.mjs");
  const node = LiteGraph.createNode("NibbleInspectFile");
  app.graph.add(node); node.pos = [20, 60];
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [60, 40]; app.canvas.setDirty(true, true);
  const host = drawChart(chart);
  host.shadowRoot.querySelectorAll("details").forEach((one) => { one.open = true; });
  show(node, "chart", host);
}"""
ROOT = 'document.querySelector(".nibble-chart-host").shadowRoot'
# each text's contrast (L1 + 0.05) / (L2 + 0.05) on all that is painted behind it, the least first
CONTRASTS = f"""() => {{
  const root = {ROOT}, node = app.graph._nodes[0];
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {{ willReadFrequently: true }});
  const luminance = (layers) => {{
    for (const layer of layers) {{ pen.fillStyle = layer; pen.fillRect(0, 0, 1, 1); }}
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {{
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    }});
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }};
  const behind = (element) => {{
    const layers = [];
    for (let one = element; one; one = one.parentNode ?? one.host)
      if (one instanceof Element) layers.unshift(getComputedStyle(one).backgroundColor);
    const vue = document.querySelector(`[data-node-id="${{node.id}}"]`);
    return vue ? layers : ["#fff", node.bgcolor ?? LiteGraph.NODE_DEFAULT_BGCOLOR, ...layers];
  }};
  const texts = [...root.querySelectorAll("section *")].filter((one) => one.checkVisibility()
    && [...one.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));
  return texts.map((one) => {{
    const ground = behind(one), ink = getComputedStyle(one).color;
    const [a, b] = [luminance(ground), luminance([...ground, ink])];
    return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), one.textContent, ink,
      ground.join(" ")];
  }}).sort((one, other) => one[0] - other[0]);
}}"""
PLOT = f'() => {ROOT}.querySelector("[tabindex]")?.focus()'
TIP = f"""() => {{
  const tip = {ROOT}.querySelector(".nibble-tip");
  return tip.hidden ? "" : tip.textContent;
}}"""
FOCUS = f"() => getComputedStyle({ROOT}.activeElement).outlineStyle"
TITLE = f'() => {ROOT}.querySelector(".nibble-title").textContent'
OPEN = f'() => {ROOT}.querySelector("details").open'


def show(screen, kind):
    screen.page.evaluate("() => app.graph.clear()")
    screen.page.wait_for_timeout(100)  # Nodes 2.0 draws once in between, as with a new workflow
    screen.page.evaluate(SHOW, {"kind": kind, "title": kind, "summary": SUMMARY, **KINDS[kind]})
    screen.page.wait_for_timeout(400)


@pytest.mark.parametrize("screen", LOOKS, indirect=True)
def test_every_text_of_every_chart_stands_out(screen):
    faint = {}
    for kind in KINDS:
        show(screen, kind)
        assert screen.page.evaluate(TITLE) == kind
        found = screen.page.evaluate(CONTRASTS)
        screen.picture(f"reading-{kind}-{screen.look}")
        assert len(found) > 3, kind
        if found[0][0] < 4.5:
            faint[kind] = found[0]
    assert faint == {}


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-light"], indirect=True)
@pytest.mark.parametrize("kind", WALKED)
def test_arrow_keys_walk_through_a_plot(screen, kind):
    show(screen, kind)
    screen.page.evaluate(PLOT)
    told = []
    for _ in range(WALKED[kind]):
        screen.page.keyboard.press("ArrowRight")
        told.append(screen.page.evaluate(TIP))
    assert "" not in told
    assert len(set(told)) == WALKED[kind]
    assert screen.page.evaluate(FOCUS) == "solid"
    screen.page.keyboard.press("ArrowLeft")
    assert screen.page.evaluate(TIP) == told[-2]


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-light"], indirect=True)
def test_a_list_opens_and_closes_by_keys(screen):
    show(screen, "facts")
    screen.page.evaluate(f'() => {ROOT}.querySelector("summary").focus()')
    screen.page.keyboard.press("Enter")
    assert screen.page.evaluate(OPEN) is False
    screen.page.keyboard.press("Space")
    assert screen.page.evaluate(OPEN) is True
    assert len(screen.page.evaluate("() => app.graph._nodes")) == 1
