"""Get Started and LoRA Stack in a real browser: the advice, the button, the rows."""

import pytest

MAKE = """() => {
  app.graph.clear();
  const node = LiteGraph.createNode("NibbleGetStarted");
  app.graph.add(node); node.pos = [80, 80];
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [60, 40];
}"""
BUTTON = """() => app.graph._nodes[0].widgets?.find((widget) => widget.name === "open_template")"""
LABEL = f"() => ({BUTTON})()?.label"
PRESS = f"() => ({BUTTON})().callback()"
TYPES = "() => app.graph._nodes.map((node) => node.type)"
STACK = """() => {
  app.graph.clear();
  const node = LiteGraph.createNode("NibbleLoRAStack");
  app.graph.add(node); node.pos = [80, 80];
  return node.widgets.map((widget) => widget.name);
}"""


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-dark"], indirect=True)
def test_the_advice_and_the_button_that_opens_the_template(screen):
    screen.page.evaluate(MAKE)
    screen.page.evaluate("() => app.queuePrompt(0, 1)")
    label = screen.page.wait_for_function(LABEL, timeout=120_000).json_value()
    assert label.startswith("Open 0")
    screen.page.wait_for_timeout(700)
    screen.picture(f"get-started-{screen.look}")
    values = screen.page.evaluate("() => app.graph.serialize().nodes[0].widgets_values")
    assert values == ["pictures", "this computer"], "neither the button nor the chart is saved"
    screen.page.evaluate(PRESS)
    screen.page.wait_for_timeout(2500)
    screen.page.keyboard.press("Escape")
    assert "NibbleQuantizeSVDQuant" in screen.page.evaluate(TYPES)
    assert screen.problems == []


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-dark"], indirect=True)
def test_the_stack_has_eight_rows_of_three(screen):
    names = screen.page.evaluate(STACK)
    rows = [f"{kind}_{i}" for i in range(1, 9) for kind in ("lora", "strength", "on")]
    assert names == rows
    screen.page.wait_for_timeout(700)
    screen.picture(f"lora-stack-{screen.look}")
