"""Charts in several workflow tabs, in both renderers."""

import pytest

INSPECT = """(file) => {
  const node = LiteGraph.createNode("NibbleInspectFile");
  app.graph.add(node);
  node.pos = [80, 80];
  node.widgets.find((widget) => widget.name === "file").value = file;
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [60, 40];
  app.queuePrompt(0, 1);
}"""
SHOWN = """() => [...document.querySelectorAll(".nibble-chart-host")]
  .filter((host) => host.checkVisibility())
  .map((host) => host.shadowRoot.querySelector(".nibble-title").textContent)"""


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-dark"], indirect=True)
def test_a_chart_is_that_of_the_workflow_on_the_screen(screen):
    """Two tabs whose nodes have the same id."""
    ran = f"(title) => ({SHOWN})().join() === title"
    for file in ("diffusion_models/flux-demo.safetensors", "vae/vae-demo.safetensors"):
        screen.page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
        screen.page.wait_for_function("() => app.graph._nodes.length === 0")
        screen.page.evaluate(INSPECT, file)
        screen.page.wait_for_function(ran, arg=file.split("/")[1], timeout=60_000)
    command = "(name) => app.extensionManager.command.execute(`Workspace.${name}OpenedWorkflow`)"
    for to, file in (("Previous", "flux-demo"), ("Next", "vae-demo"), ("Previous", "flux-demo")):
        screen.page.evaluate(command, to)
        screen.page.wait_for_timeout(1500)
        assert screen.page.evaluate(SHOWN) == [f"{file}.safetensors"]
