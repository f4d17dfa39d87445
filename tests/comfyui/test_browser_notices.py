"""Errors, progress and unfinished files as the artist sees them: in the node, in both renderers."""

import pytest
from safetensors.torch import save_file

from demo_graphs import FLUX
from random_flux import flux_state

BOTH = pytest.mark.parametrize("screen", ["classic-dark", "nodes2-light"], indirect=True)
ALL = pytest.mark.parametrize(
    "screen", ["classic-dark", "classic-light", "nodes2-dark", "nodes2-light"], indirect=True
)
MAKE = """([source, name]) => {
  app.graph.clear();
  const types = ["NibbleQuantizeSVDQuant", "NibbleLoadSVDQuant", "PreviewAny"];
  const [quantize, load, text] = types.map((type) => LiteGraph.createNode(type));
  [quantize, load, text].forEach((node, i) => {
    app.graph.add(node); node.pos = [20 + 440 * i, 60];
  });
  const set = (node, name, value) => {
    node.widgets.find((widget) => widget.name === name).value = value;
  };
  set(quantize, "model_name", source); set(quantize, "preset", "best");
  set(quantize, "filename", name); set(load, "model_name", "gone.safetensors");
  load.connect(0, text, 0);
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [60, 40]; app.canvas.setDirty(true, true);
}"""
NOTICE = """([title, tone]) => {
  const node = app.graph._nodes.find((one) => one.title === title);
  const host = node.widgets.find((widget) => widget.name === "nibble_chart")?.element;
  const hosts = [...(host?.querySelectorAll(".nibble-notice-host") ?? [])];
  return hosts.map((one) => one.shadowRoot).find((root) => root.querySelector(
    ".nibble-notice-" + tone));
}"""
TEXT = f"""(given) => {{
  const root = ({NOTICE})(given);
  return root ? [...root.querySelectorAll("p, .nibble-notice-title")]
    .map((line) => line.textContent).join("\\n") : "";
}}"""
# the notice's rectangle and its node's, in pixels of the page: [left, top, right, bottom] each
BOXES = f"""([title, tone]) => {{
  const node = app.graph._nodes.find((one) => one.title === title);
  const box = ({{ left, top, right, bottom }}) => [left, top, right, bottom];
  const inner = ({NOTICE})([title, tone]).querySelector("section").getBoundingClientRect();
  const vue = document.querySelector(`[data-node-id="${{node.id}}"]`);
  if (vue) return [box(inner), box(vue.getBoundingClientRect())];
  const {{ scale, offset }} = app.canvas.ds, at = app.canvas.canvas.getBoundingClientRect();
  const left = at.left + (node.pos[0] + offset[0]) * scale;
  const top = at.top + (node.pos[1] + offset[1]) * scale;
  return [box(inner), [left, top, left + node.size[0] * scale, top + node.size[1] * scale]];
}}"""
# the least contrast of text in a notice, by WCAG 2: (L1 + 0.05) / (L2 + 0.05)
CONTRAST = f"""(given) => {{
  const root = ({NOTICE})(given), section = root.querySelector("section");
  const pen = new OffscreenCanvas(1, 1).getContext("2d", {{ willReadFrequently: true }});
  const luminance = (...layers) => {{
    for (const layer of layers) {{ pen.fillStyle = layer; pen.fillRect(0, 0, 1, 1); }}
    const [r, g, b] = [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {{
      const part = value / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    }});
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }};
  const ground = getComputedStyle(section).backgroundColor;
  const texts = [...root.querySelectorAll("p, .nibble-notice-title, .nibble-action")];
  const ratios = texts.map((one) => {{
    const style = getComputedStyle(one);
    const behind = luminance("#808080", ground, style.backgroundColor);
    const text = luminance("#808080", ground, style.backgroundColor, style.color);
    return (Math.max(behind, text) + 0.05) / (Math.min(behind, text) + 0.05);
  }});
  return Math.min(...ratios);
}}"""
QUANTIZE, LOAD = "SVDQuant Quantize Checkpoint", "Load SVDQuant Model"


def wait_for(screen, title, tone, words, seconds=120):
    """Waits until a node's notice has the words; returns its text."""
    screen.page.wait_for_function(
        f"([given, words]) => ({TEXT})(given).includes(words)",
        arg=[[title, tone], words],
        timeout=1000 * seconds,
    )
    screen.page.wait_for_timeout(500)
    return screen.page.evaluate(TEXT, [title, tone])


def assert_inside(screen, title, tone):
    inner, outer = screen.page.evaluate(BOXES, [title, tone])
    assert outer[0] <= inner[0] < inner[2] <= outer[2], (inner, outer)
    assert outer[1] <= inner[1] < inner[3] <= outer[3] + 1, (inner, outer)


def button(screen, words):
    return screen.page.get_by_role("button", name=words, exact=True)


@ALL
def test_errors_are_told_in_their_nodes_and_in_toasts_with_what_helps(screen):
    """The loader is refused before the run, the quantizer fails in it."""
    screen.page.evaluate(MAKE, [FLUX, "never"])
    screen.page.evaluate("() => app.queuePrompt(0, 1)")
    told = wait_for(screen, QUANTIZE, "error", "watches the model while it samples")
    assert told.count("watches the model") == 1
    refused = wait_for(screen, LOAD, "error", "gone.safetensors is not in ComfyUI's")
    assert refused.count("gone.safetensors") == 1
    toasts = " ".join(screen.page.locator(".p-toast-message").all_inner_texts())
    assert told in toasts
    assert refused in toasts
    for title in (QUANTIZE, LOAD):
        assert_inside(screen, title, "error")
        assert screen.page.evaluate(CONTRAST, [title, "error"]) >= 4.5
    screen.picture(f"errors-{screen.look}")
    button(screen, "Set preset to fast").focus()
    screen.page.keyboard.press("Enter")
    assert (
        screen.page.evaluate(
            "() => app.graph._nodes[0].widgets.find((widget) => widget.name === 'preset').value"
        )
        == "fast"
    )
    assert screen.page.evaluate(TEXT, [QUANTIZE, "error"]) == ""
    button(screen, "Refresh lists").click()
    button(screen, "Not there yet; refresh again").wait_for(timeout=20_000)


@BOTH
def test_layers_and_time_left_are_told_while_a_node_works(screen):
    screen.page.evaluate(MAKE, [FLUX, "never"])
    send = """async (told) => {
      const { api } = await import("/scripts/api.js");
      const node = String(app.graph._nodes[0].id);
      api.dispatchCustomEvent("nibble_progress", { node, title: "quantizing", unit: "layer",
        name: "double_blocks.3.img_mlp.0", done: 34, count: 42, share: 0.8, seconds: 160.2,
        stopped: false, resumes: true, ...told });
    }"""
    screen.page.evaluate(send, {})
    told = wait_for(screen, QUANTIZE, "working", "Layer")
    assert told.splitlines() == [
        "Quantizing · Layer 35 of 42 · about 2 min 40 s left",
        "double_blocks.3.img_mlp.0",
    ]
    assert_inside(screen, QUANTIZE, "working")
    assert screen.page.evaluate(CONTRAST, [QUANTIZE, "working"]) >= 4.5
    screen.picture(f"working-{screen.look}")
    screen.page.evaluate(send, {"done": 35, "stopped": True})
    told = wait_for(screen, QUANTIZE, "stopped", "Stopped")
    assert told == "Stopped, 35 of 42 layers done; Run goes on from there."
    assert screen.page.evaluate(CONTRAST, [QUANTIZE, "stopped"]) >= 4.5
    screen.picture(f"stopped-{screen.look}")


@pytest.fixture(scope="module")
def wide(server) -> str:
    """A FLUX whose layers take seconds: the demo's are made before a busy page hears of them. Few
    blocks, since measuring takes its time by them.
    """
    path = server.folder("diffusion_models") / "wide.safetensors"
    save_file(flux_state(hidden=1024, double=1, single=2), path)
    return path.name


@pytest.fixture
def idle(server):
    """A server that nothing is left running on, however the test ends."""
    yield
    server.post("/queue", {"clear": True})
    server.post("/interrupt", {})


@BOTH
@pytest.mark.usefixtures("idle")
def test_stop_is_no_failure_and_its_file_can_be_removed(screen, server, wide):
    name = f"stopped-{screen.look}"
    screen.page.evaluate(MAKE, [wide, name])
    screen.page.evaluate("""() => {
      const [quantize, load, text] = app.graph._nodes;
      app.graph.remove(load); app.graph.remove(text);
      quantize.widgets.find((widget) => widget.name === "preset").value = "fast";
      app.queuePrompt(0, 1);
    }""")
    wait_for(screen, QUANTIZE, "working", "Quantizing · Layer", 300)
    server.post("/interrupt", {})
    told = wait_for(screen, QUANTIZE, "stopped", "layers done; Run goes on from there.")
    assert told.startswith("Stopped, ")
    screen.page.wait_for_timeout(1500)
    assert screen.page.locator(".p-toast-message").count() == 0
    files = wait_for(screen, QUANTIZE, "files", "1 unfinished file, ")
    assert f"{name}.safetensors" in files
    assert_inside(screen, QUANTIZE, "files")
    assert screen.page.evaluate(CONTRAST, [QUANTIZE, "files"]) >= 4.5
    screen.picture(f"unfinished-{screen.look}")
    left = server.folder("diffusion_models") / f"{name}.safetensors.partial"
    button(screen, "Remove").click()
    assert left.exists()  # it asks first
    screen.page.get_by_role("button", name="for good?").click()
    screen.page.wait_for_function(
        f"(given) => ({TEXT})(given) === ''", arg=[QUANTIZE, "files"], timeout=20_000
    )
    assert not left.exists()


@BOTH
def test_the_loaders_chart_folds_its_details_and_grades_the_error(screen):
    screen.page.evaluate(MAKE, [FLUX, "never"])
    seen = screen.page.evaluate("""async () => {
      const { drawChart } = await import("/extensions/ComfyUI-Nibble/charts.mjs");
      const { show } = await import("/extensions/ComfyUI-Nibble/widget.mjs");
      const chart = drawChart({ kind: "facts", title: "flux-4bit.safetensors", summary: [
        ["VRAM", "about 7.05 GB of 8.59 GB, 1.54 GB are left: 6.5 GB of weights"],
        ["fast kernels", "on"], ["error", "median 24.1 dB, worst 15.0 dB"],
        ["pictures", "fair: the same picture, fine details differ"]],
        details: [["file", "6.54 GB, nibble"], ["computed by", "native (compiled)"]] });
      show(app.graph._nodes[1], "chart", chart);
      const root = chart.shadowRoot;
      return [root.querySelector("b.nibble-grade").textContent, root.querySelector("details").open,
        [...root.querySelectorAll(".nibble-grade")].map((one) => one.textContent),
        root.querySelector(".nibble-meter .nibble-bar > span").style.width,
        [...root.querySelectorAll("details dt")].map((one) => one.textContent)];
    }""")
    screen.page.wait_for_timeout(700)
    screen.picture(f"loader-{screen.look}")
    assert seen[:3] == ["fair", False, ["poor", "fair", "good"]]
    assert float(seen[3].removesuffix("%")) == pytest.approx(100 * 7.05 / 8.59)
    assert seen[4] == ["file", "computed by"]


def test_what_comfyui_says_of_a_refused_graph_is_told_in_sentences(screen):
    """Each kind of error of its validation, with the button that it has."""
    told = screen.page.evaluate("""async () => {
      const { refusalsOf, remediesOf, sentenceOf } =
        await import("/extensions/ComfyUI-Nibble/errors.mjs");
      const node = { properties: { models: [{ name: "a.safetensors", url: "https://x.org/a" }] },
        widgets: [{ name: "rank", value: 8 }, { name: "model_name", value: "a.safetensors" },
          { name: "overwrite", value: false }] };
      const config = ["INT", { min: 16, max: 256 }];
      const errors = [
        { type: "required_input_missing", message: "", details: "model",
          extra_info: { input_name: "model" } },
        { type: "value_not_in_list", message: "", details: "",
          extra_info: { input_name: "model_name", received_value: "a.safetensors" } },
        { type: "value_smaller_than_min", message: "", details: "",
          extra_info: { input_name: "rank", received_value: 8, input_config: config } },
        { type: "custom_validation_failed", message: "", details: "model_name - It is damaged.",
          extra_info: { input_name: "model_name" } },
        { type: "custom_validation_failed", message: "", details: "verify - It is damaged.",
          extra_info: { input_name: "verify" } },
      ];
      const found = refusalsOf({ errors });
      const there = { text: "x exists already; switch 'overwrite' on, or give another filename.",
        input: "" };
      return [found.map((one) => one.text), found.map((one) => remediesOf(one, node)),
        remediesOf(there, node), sentenceOf({ exception_message: "'x'\\n",
          exception_type: "builtins.KeyError" })];
    }""")
    assert told[0] == [
        "model is not connected; it is needed.",
        "model_name is set to a.safetensors, which is not in its list; choose another, or put the"
        " file into its folder and refresh the lists.",
        "rank is 8; 16 is the least.",
        "It is damaged.",
    ]
    assert told[1] == [
        [],
        [
            {"do": "get", "url": "https://x.org/a", "name": "a.safetensors"},
            {"do": "refresh", "input": "model_name"},
        ],
        [{"do": "set", "input": "rank", "to": 16}],
        [],
    ]
    assert told[2] == [{"do": "set", "input": "overwrite", "to": True}]
    assert told[3] == "KeyError: 'x'"


def test_an_empty_panel_leaves_its_node_as_it_was(screen):
    sizes = screen.page.evaluate("""async () => {
      const { show, clear } = await import("/extensions/ComfyUI-Nibble/widget.mjs");
      const node = LiteGraph.createNode("NibbleLoadSVDQuant");
      app.graph.add(node);
      const rest = () => new Promise((done) => setTimeout(done, 400));
      node.setSize([400, node.size[1]]);
      await rest();
      const before = [...node.size];
      const tall = document.createElement("div");
      tall.style.height = "150px";
      show(node, "notice", tall);
      await rest();
      const between = [...node.size];
      clear(node, "notice");
      await rest();
      return [before, between, [...node.size], node.widgets.map((widget) => widget.name)];
    }""")
    assert sizes[1][1] >= sizes[0][1] + 150
    assert sizes[2] == pytest.approx(sizes[0], abs=3)
    assert "nibble_chart" not in sizes[3]
