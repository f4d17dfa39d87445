"""Quantize on a Farm in a real browser: the worker and its layers while it works, Stop, and a
cluster that is not there.
"""

import socket
from pathlib import Path

import pytest
from safetensors.torch import save_file

from demo_graphs import FLUX
from random_flux import flux_state

BOTH = pytest.mark.parametrize("screen", ["classic-dark", "nodes2-light"], indirect=True)
MAKE = """(values) => {
  app.graph.clear();
  const node = LiteGraph.createNode("NibbleQuantizeOnFarm");
  app.graph.add(node); node.pos = [80, 120];
  for (const [name, value] of Object.entries(values))
    node.widgets.find((widget) => widget.name === name).value = value;
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [60, 40]; app.canvas.setDirty(true, true);
  app.queuePrompt(0, 1);
}"""
TOLD = """([tone, text]) => {
  const host = app.graph._nodes[0]?.widgets.find((one) => one.name === "nibble_chart")?.element;
  const roots = [...(host?.querySelectorAll(".nibble-notice-host") ?? [])];
  const root = roots.map((one) => one.shadowRoot)
    .find((one) => one.querySelector(".nibble-notice-" + tone));
  const told = root ? [...root.querySelectorAll("p, .nibble-notice-title")]
    .map((line) => line.textContent).join("\\n") : "";
  return told.includes(text) && told;
}"""


def told(screen, tone: str, text: str) -> str:
    """Waits until the node's notice of that tone has the text; returns all of it."""
    found = screen.page.wait_for_function(TOLD, arg=[tone, text], timeout=300_000)
    return found.json_value()


@pytest.fixture
def idle(server):
    """A server that nothing is left running on, however the test ends."""
    yield
    server.post("/queue", {"clear": True})
    server.post("/interrupt", {})


@pytest.fixture(scope="module")
def wide(server) -> str:
    """A FLUX whose layers take seconds."""
    path = server.folder("diffusion_models") / "wide-farm.safetensors"
    save_file(flux_state(hidden=1024, double=1, single=2), path)
    return path.name


@BOTH
@pytest.mark.usefixtures("idle")
def test_the_worker_and_its_layers_are_told_and_stop_says_what_is_done(screen, server, wide):
    name = f"farm-{screen.look}"
    screen.page.evaluate(MAKE, {"model_name": wide, "filename": name, "options": "--memory-cap 0"})
    title, worker = told(screen, "working", " left").splitlines()
    assert title.startswith("Quantizing · Layer ")
    assert " of 26 · about " in title
    assert worker == socket.gethostname()
    screen.picture(f"farm-working-{screen.look}")
    server.post("/interrupt", {})
    assert "Run goes on from there." in told(screen, "stopped", "layers done")
    screen.picture(f"farm-stopped-{screen.look}")


@BOTH
def test_a_cluster_that_cannot_be_used_is_told_in_the_node(screen, server):
    """Without Ray, that it is missing; with it, that there is no cluster."""
    settings = Path(server.home, "user", "nibble-farm.json")
    settings.write_text('{"address": "127.0.0.1:6399"}')
    screen.page.evaluate(MAKE, {"model_name": FLUX, "filename": "never", "where": "cluster"})
    sentence = told(screen, "error", "Ray")
    assert "choose 'this machine'" in sentence
    assert not sentence.startswith("ValueError")
    screen.page.wait_for_timeout(700)
    screen.picture(f"farm-no-cluster-{screen.look}")
    settings.unlink()
