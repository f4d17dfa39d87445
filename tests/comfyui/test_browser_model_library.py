"""A click in ComfyUI's Model Library opens Nibble's files, and the picture is drawn.

The library puts down ComfyUI's own node for the folder, by a table of the front end's
(`modelToNodeStore`): *Load Diffusion Model* for diffusion_models, *Load Checkpoint* for
checkpoints. The node hangs at the pointer until the canvas is clicked.
"""

import numpy as np
import pytest

from demo_graphs import Graph, all_in_one

TOGGLE = "() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.model-library')"
PUT_DOWN = "() => app.graph._nodes.map((node) => [node.type, node.widgets[0].value])"
# what Graph.sample and Graph.save make, around the loader that was put down, and Run
DRAW = """async () => {
  const loader = app.graph._nodes[0];
  const add = (type, values) => {
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    for (const [name, value] of Object.entries(values))
      node.widgets.find((widget) => widget.name === name).value = value;
    return node;
  };
  const prompt = add("NibbleDemoPrompt", { text: "a red circle top left on black" });
  const latent = add("EmptySD3LatentImage", { width: 64, height: 64, batch_size: 1 });
  const sampler = add("KSampler", { seed: 1, steps: 8, cfg: 1, sampler_name: "euler",
    scheduler: "simple", denoise: 1 });
  const vae = add("VAELoader", { vae_name: "vae-demo.safetensors" });
  const decode = add("VAEDecode", {}), image = add("PreviewImage", {});
  [loader, prompt, prompt, latent].forEach((node, slot) => node.connect(0, sampler, slot));
  sampler.connect(0, decode, 0);
  vae.connect(0, decode, 1);
  decode.connect(0, image, 0);
  [loader, prompt, latent, sampler, vae, decode, image].forEach((node, i) => {
    node.pos = [340 + 380 * (i % 3), 60 + 390 * Math.floor(i / 3)];
  });
  app.canvas.setDirty(true, true);
  // ids begin anew with each graph, and what an earlier one drew is still told
  for (const id of Object.keys(app.nodeOutputs)) delete app.nodeOutputs[id];
  await app.queuePrompt(0, 1);
  return image.id;
}"""
DRAWN = "(id) => app.lastExecutionError?.exception_message ?? app.nodeOutputs[id]?.images"


def put_down(screen, folder: str, name: str) -> list:
    """Clicks a file in the library and then the canvas: [type, file] of the new node."""
    page = screen.page
    page.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; }")
    refresh = page.get_by_role("button", name="Refresh", exact=True)
    if not refresh.is_visible():  # it stays open after a test that failed
        page.evaluate(TOGGLE)
    refresh.click()  # the file may be new
    file = page.get_by_text(name.removesuffix(".safetensors"), exact=True)
    page.get_by_text(folder, exact=True).wait_for(timeout=60_000)
    page.wait_for_timeout(3000)
    if not file.is_visible():  # a folder that was opened before stays open
        page.get_by_text(folder, exact=True).click()
    file.wait_for(timeout=60_000)
    page.wait_for_timeout(500)  # while the folder opens, a click falls beside the file
    file.click()
    page.mouse.move(900, 500)
    page.mouse.click(900, 500)
    page.wait_for_function(f"() => ({PUT_DOWN})().length === 1", timeout=60_000)
    page.evaluate(TOGGLE)
    return page.evaluate(PUT_DOWN)[0]


def drawn(screen, server) -> np.ndarray:
    """The picture of the graph around the new node."""
    image = screen.page.evaluate(DRAW)
    images = screen.page.wait_for_function(DRAWN, arg=image, timeout=120_000).json_value()
    assert isinstance(images, list), images
    return server.picture({"images": images})


def expected(server, name: str) -> np.ndarray:
    """The same picture by Nibble's own loader."""
    graph = Graph()
    saved = graph.save(graph.sample(graph.load(name), graph.prompt()))
    return server.picture(server.run(graph.nodes)[saved])


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-dark"], indirect=True)
def test_a_click_on_a_4_bit_file_draws_a_picture(screen, server, quantized):
    assert put_down(screen, "diffusion_models", quantized) == ["UNETLoader", quantized]
    assert np.array_equal(drawn(screen, server), expected(server, quantized))
    screen.picture(f"model-library-{screen.look}")


@pytest.fixture(scope="module")
def codewords(server) -> str:
    """The demo model at 3 bits, through the node."""
    name = "flux-demo-3bit.safetensors"
    graph = Graph()
    graph.vector_quantize(filename=name)
    server.run(graph.nodes)
    return name


def test_so_does_a_click_on_a_3_bit_file(screen, server, codewords):
    assert put_down(screen, "diffusion_models", codewords) == ["UNETLoader", codewords]
    assert np.array_equal(drawn(screen, server), expected(server, codewords))


def test_so_does_a_click_on_an_all_in_one_file(screen, server, quantized):
    name = all_in_one(server, quantized)
    assert put_down(screen, "checkpoints", name) == ["CheckpointLoaderSimple", name]
    assert np.array_equal(drawn(screen, server), expected(server, quantized))
