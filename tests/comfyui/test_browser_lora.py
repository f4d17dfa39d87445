"""The LoRA report in a real browser: drawn in both renderers and both palettes."""

import pytest

from browser import LOOKS
from demo_loras import LAYERS

MAKE = """([model, loras]) => {
  app.graph.clear();
  const types = ["NibbleLoadSVDQuant", ...loras.map(() => "LoraLoaderModelOnly"),
    "NibbleLoRAReport"];
  const nodes = types.map((type) => LiteGraph.createNode(type));
  nodes.forEach((node, i) => {
    app.graph.add(node);
    node.pos = [20 + 400 * i, 60];
    if (i) nodes[i - 1].connect(0, node, 0);
  });
  const set = (node, name, value) => {
    node.widgets.find((widget) => widget.name === name).value = value;
  };
  set(nodes[0], "model_name", model);
  loras.forEach((name, i) => set(nodes[i + 1], "lora_name", name));
  app.canvas.ds.scale = 0.9; app.canvas.ds.offset = [40, 40]; app.canvas.setDirty(true, true);
  app.queuePrompt(0, 1);
}"""
TEXT = (
    "() => [...document.querySelectorAll('.nibble-chart-host')].map((host) =>"
    " host.shadowRoot.textContent).join(' ')"
)


@pytest.mark.parametrize("screen", LOOKS, indirect=True)
def test_the_report_is_drawn(screen, quantized, lora_files):
    # as pressing R: the page may be older than the lora_files
    screen.page.evaluate("() => app.refreshComboInNodes()")
    screen.page.evaluate(MAKE, [quantized, [lora_files["first"], lora_files["scaled"]]])
    screen.page.wait_for_function(
        f"() => ({TEXT})().includes('LoRAs on this model')", timeout=120_000
    )
    screen.page.wait_for_timeout(600)
    told = screen.page.evaluate(TEXT)
    assert "rows scaled" in told
    assert "Memory added" in told.replace("memory", "Memory")
    assert all(layer in told for layer in LAYERS)
    screen.picture(f"lora-report-{screen.look}")
