"""The pack in a real browser: search, charts in both renderers and both palettes, help pages,
templates, translations.
"""

import json

import pytest

from browser import LOOKS, OURS, fetch
from comfyui_server import ROOT
from object_info import check_value
from other_packs import nodes_in

NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("Nibble*.md"))
TEMPLATES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))


def test_nodes_are_found_by_search(screen):
    screen.page.mouse.dblclick(800, 700)
    screen.page.get_by_test_id("search-filter-input").wait_for(timeout=10_000)
    screen.page.keyboard.type("svdquant", delay=30)
    for name in ("SVDQuant Quantize Checkpoint", "Load SVDQuant Model"):
        screen.page.get_by_test_id("result-item").filter(has_text=name).first.wait_for(
            timeout=10_000
        )
    screen.page.keyboard.press("Escape")


@pytest.mark.parametrize("screen", LOOKS, indirect=True)
def test_charts_are_drawn_in_the_nodes_after_a_run(screen):
    screen.run_graph()
    report = screen.page.evaluate(
        "() => Object.values(app.nodeOutputs).map((o) => o.nibble_chart?.[0]).find((c) => c?.kind"
        " === 'layers')"
    )
    assert (
        screen.page.locator(".nibble-dot").count()
        == sum(row["db"] is not None for row in report["rows"])
        > 20
    )
    assert "smaller" in screen.page.locator(".nibble-size").inner_text()
    box = screen.page.locator(".nibble-plot svg").bounding_box()
    screen.page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 60)
    tip = screen.page.locator(".nibble-tip")
    assert tip.is_visible()
    assert tip.locator("b").inner_text() in {row["name"] for row in report["rows"]}
    screen.picture(f"charts-{screen.look}")
    for chart in screen.page.locator(".nibble-widget").all():  # nothing is cut off
        seen, needed = chart.evaluate(
            "(element) => [element.offsetHeight, element.firstElementChild.offsetHeight]"
        )
        assert needed <= seen + 1
        assert needed > 60


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-dark"], indirect=True)
def test_node_grows_and_shrinks_with_the_lists_in_its_chart(screen):
    screen.run_graph()

    def height():
        return screen.page.evaluate("() => document.querySelector('.nibble-widget').offsetHeight")

    closed = height()
    screen.page.locator(".nibble-details summary").first.click()
    screen.page.wait_for_timeout(500)
    opened = height()
    screen.page.locator(".nibble-details summary").first.click()
    screen.page.wait_for_timeout(500)
    assert opened > closed + 60
    assert abs(height() - closed) <= 2


def test_chart_comes_back_with_its_workflow_tab(screen):
    screen.run_graph()
    screen.page.evaluate("() => app.extensionManager.command.execute('Comfy.NewBlankWorkflow')")
    screen.page.locator(".nibble-plot").wait_for(state="detached", timeout=10_000)
    screen.page.evaluate(
        "() => app.extensionManager.command.execute('Workspace.PreviousOpenedWorkflow')"
    )
    screen.page.locator(".nibble-plot").wait_for(timeout=10_000)


def test_wheel_over_a_chart_still_zooms_the_canvas(screen):
    screen.run_graph()
    box = screen.page.locator(".nibble-plot").bounding_box()
    screen.page.mouse.move(box["x"] + 50, box["y"] + 50)
    screen.page.mouse.wheel(0, -200)
    screen.page.wait_for_timeout(300)
    assert screen.page.evaluate("() => app.canvas.ds.scale") > 1


def test_chart_is_not_saved_with_the_workflow(screen):
    screen.run_graph()
    saved = screen.page.evaluate("() => JSON.stringify(app.graph.serialize())")
    assert "nibble_chart" not in saved
    assert "bytes_before" not in saved


def test_seed_stays_so_that_a_second_run_does_nothing(screen):
    screen.run_graph()
    assert (
        screen.page.evaluate(
            "() => app.graph._nodes[0].widgets.find((widget) => widget.name === 'seed').value"
        )
        == 0
    )


@pytest.mark.parametrize("node", NODES)
def test_help_page_opens(screen, node):
    screen.page.evaluate(
        """(name) => {
      const node = LiteGraph.createNode(name);
      node.pos = [300, 300];
      app.graph.add(node);
      app.canvas.ds.scale = 1; app.canvas.ds.offset = [100, 100];
      app.canvas.selectNode(node); app.canvas.setDirty(true, true);
    }""",
        node,
    )
    screen.page.get_by_test_id("info-button").click()
    heading = (ROOT / "web" / "docs" / f"{node}.md").read_text().splitlines()[0].removeprefix("# ")
    screen.page.get_by_role("heading", name=heading, level=1).wait_for(timeout=10_000)
    assert screen.page.get_by_role("heading", name="Troubleshooting").count() == 1


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_loads_without_missing_nodes(screen, server, name):
    workflow = json.loads(fetch(server, f"/api/workflow_templates/ComfyUI-Nibble/{name}.json"))
    screen.page.evaluate("(workflow) => app.loadGraphData(workflow)", workflow)
    screen.page.wait_for_timeout(500)
    notes = {"MarkdownNote", "Note"}
    loaded = screen.page.evaluate(
        "() => app.graph._nodes.map((node) => [node.type, node.type in"
        " LiteGraph.registered_node_types])"
    )
    assert len(loaded) == len(workflow["nodes"])
    assert {kind for kind, known in loaded if not known} - notes == nodes_in(name)
    prompt = screen.page.evaluate("async () => (await app.graphToPrompt()).output")
    schema = json.loads(fetch(server, "/object_info"))
    # every required input has a value, and a choice that the pack itself offers is one of the
    # choices
    known = [node for node in prompt.values() if node["class_type"]]  # a missing node has none
    assert len(prompt) - len(known) == len(nodes_in(name))
    for node in known:
        for key, spec in schema[node["class_type"]]["input"]["required"].items():
            # an input that grows is there by its parts: images.image0, images.image1
            given = [value for name, value in node["inputs"].items() if name.split(".")[0] == key]
            assert given, f"{node['class_type']} lacks {key}"
            for value in given:
                check_value(value, spec)


def test_templates_have_thumbnails_and_say_where_models_come_from(server):
    assert {
        "01 FLUX.1 dev, text to image",
        "11 Quantize to 4 bits",
        "02 Demo model, 16 and 4 bits",
    } <= set(TEMPLATES)
    assert (
        sorted(json.loads(fetch(server, "/api/workflow_templates"))["ComfyUI-Nibble"]) == TEMPLATES
    )
    for name in TEMPLATES:
        assert (
            fetch(server, f"/api/workflow_templates/ComfyUI-Nibble/{name}.jpg")[:3]
            == b"\xff\xd8\xff"
        )
    workflow = json.loads(
        (ROOT / "example_workflows" / "01 FLUX.1 dev, text to image.json").read_text()
    )
    models = {
        model["name"]: model
        for node in workflow["nodes"]
        for model in node["properties"].get("models", [])
    }
    assert {"clip_l.safetensors", "ae.safetensors"} <= set(models)
    assert all(
        model["url"].startswith("https://huggingface.co/") and model["directory"]
        for model in models.values()
    )


@pytest.mark.parametrize("language", ["en", "zh"])
def test_translations_follow_the_schema(server, language):
    served = json.loads(fetch(server, "/i18n"))[language]["nodeDefs"]
    schema = json.loads(fetch(server, "/object_info"))
    for node in NODES:
        inputs = {
            key: spec
            for part in ("required", "optional")
            for key, spec in schema[node]["input"].get(part, {}).items()
        }
        assert set(served[node]["inputs"]) == set(inputs), f"{language} {node}"
        assert len(served[node].get("outputs", {})) == len(schema[node]["output"])
        if language == "en":
            assert all(
                served[node][key] == schema[node][key] for key in ("display_name", "description")
            )
            assert all(
                served[node]["inputs"][key]["tooltip"] == spec[1]["tooltip"]
                for key, spec in inputs.items()
            )


def test_front_end_imports_one_script_of_ours(server):
    assert [path for path in json.loads(fetch(server, "/extensions")) if "Nibble" in path] == [
        OURS + "nibble.js"
    ]


def test_plot_puts_layers_where_their_numbers_say(screen):
    """Two layers of 10 and 20 dB on an axis from 5 to 25 dB: at a quarter and three quarters of the
    width and of the height.
    """
    circles = screen.page.evaluate("""async () => {
      const { drawChart } = await import("/extensions/ComfyUI-Nibble/charts.mjs");
      const row = (name, db) =>
        ({ name, action: "w4a4", why: "", db, bytes_before: 8, bytes_after: 2, seconds: 1 });
      const chart = drawChart({ kind: "layers", title: "t", summary: [],
        rows: [row("a.0", 10), row("a.1", 20)] });
      return [...chart.shadowRoot.querySelectorAll("circle")]
        .map((c) => ["cx", "cy"].map((name) => parseFloat(c.getAttribute(name))));
    }""")
    assert circles == [[25, 99], [75, 33]]  # per cent, and pixels of 132 from the top


def test_plot_counts_blocks_up_and_puts_the_rest_behind(screen):
    """Files sort names as text; the plot shows blocks as the model runs through them."""
    names = screen.page.evaluate("""async () => {
      const { layerPlot } = await import("/extensions/ComfyUI-Nibble/charts/layer_plot.mjs");
      const row = (name) => ({ name, action: "w4a4", db: 20, bytes_before: 8, bytes_after: 2 });
      const rows = ["blocks.10.a", "blocks.2.a", "final.1", "in"].map(row);
      const plot = layerPlot(rows.reverse()), svg = plot.querySelector("svg"), names = [];
      for (const _ of rows) {
        svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
        names.push(plot.querySelector(".nibble-tip b").textContent);
      }
      return names;
    }""")
    assert names == ["blocks.2.a", "blocks.10.a", "final.1", "in"]


def test_chart_with_hundreds_of_layers_and_hostile_names_is_drawn(screen):
    drawn = screen.page.evaluate("""async () => {
      const { drawChart } = await import("/extensions/ComfyUI-Nibble/charts.mjs");
      const rows = Array.from({ length: 500 },
        (_, i) => ({ name: `blocks.${i}.<img src=x onerror=alert(1)>`,
        action: i % 9 ? "w4a4" : "keep", why: "why",
        db: i % 9 ? 20 + Math.sin(i) : null,
        bytes_before: 1e6, bytes_after: i % 9 ? 3e5 : 1e6, seconds: 0 }));
      const draw = (chart) => drawChart({ title: "t", ...chart }).shadowRoot;
      const root = draw({ kind: "layers", title: "<b>t</b>", summary: [["time", "1 s"]], rows });
      const empty = draw({ kind: "layers", rows: [] });
      const unknown = draw({ kind: "new", summary: [["a", "b"]] });
      const count = (selector) => root.querySelectorAll(selector).length;
      return [count("circle"), count("img, .nibble-title b"), empty.textContent,
        unknown.textContent];
    }""")
    assert drawn == [444, 0, "t", "tab"]
