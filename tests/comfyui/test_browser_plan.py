"""The memory plan in a real browser: drawn in both renderers and both palettes."""

import pytest

from browser import LOOKS

MAKE = """() => {
  app.graph.clear();
  const node = LiteGraph.createNode("NibbleVRAMPlan");
  app.graph.add(node);
  node.pos = [40, 40];
  const set = (name, value) => {
    node.widgets.find((widget) => widget.name === name).value = value;
  };
  set("model_name", "flux1-dev (published size)");
  set("text_encoder", "as published");
  set("vae", "as published");
  app.canvas.ds.scale = 0.9; app.canvas.ds.offset = [40, 40]; app.canvas.setDirty(true, true);
  app.queuePrompt(0, 1);
}"""
CHART = "document.querySelector('.nibble-chart-host')?.shadowRoot"


@pytest.mark.parametrize("screen", LOOKS, indirect=True)
def test_the_plan_is_drawn(screen):
    screen.page.evaluate(MAKE)
    screen.page.wait_for_function(
        f"() => {CHART}?.textContent.includes('fits, with 3')", timeout=120_000
    )
    screen.page.wait_for_timeout(600)
    told = screen.page.evaluate(f"() => {CHART}.textContent")
    for words in ("Encode the prompt", "Sample", "Decode", "modulation in RAM", "14.3 GB of 16.0"):
        assert words in told
    bars = screen.page.evaluate(f"() => {CHART}.querySelectorAll('.nibble-bar').length")
    assert bars == 4  # three stages on the card, one of RAM
    screen.picture(f"vram-plan-{screen.look}")
