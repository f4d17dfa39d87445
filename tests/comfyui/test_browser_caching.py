"""The strip in a real browser: drawn while sampling, complete afterwards, back after a reload; both
renderers, both palettes.
"""

import pytest

from browser import LOOKS
from caching_graphs import CacheGraph, computed
from demo_graphs import FLUX

STEPS = 24
BUILD = """async ([prompt, places]) => {
  await app.loadApiJson(prompt, "caching");
  app.graph.id = crypto.randomUUID();
  for (const [id, pos] of Object.entries(places)) {
    const node = app.graph.getNodeById(Number(id));
    if (node) node.pos = pos;
  }
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [40, 40]; app.canvas.setDirty(true, true);
}"""
WATCH = """() => {
  window.strips = [];
  const look = () => [...document.querySelectorAll(".nibble-chart-host")]
    .map((host) => host.shadowRoot)
    .filter((root) => root.querySelector(".nibble-strip"))
    .map((root) => ["computed", "reused", "pending"].map((state) =>
      root.querySelectorAll(`.nibble-lane .nibble-step-${state}`).length));
  // drawn by a listener that was there before this one; timers come late where a page is busy
  app.api.addEventListener("nibble_chart", () => window.strips.push(look()[0]));
}"""
LANE = """() => [...document.querySelectorAll(".nibble-chart-host")]
  .map((host) => [...(host.shadowRoot.querySelector(".nibble-lane")?.children ?? [])]
    .map((cell) => ({ computed: true, reused: false }[cell.className.split("-").at(-1)])))
  .find((lane) => lane.length)"""


def sampled(size: int = 256, seed: int = 1, **changes) -> tuple[CacheGraph, str]:
    """A graph in which each step takes long enough to be seen. seed: another one for each run that
    must sample, since ComfyUI does not run an unchanged graph again.
    """
    graph = CacheGraph()
    model = graph.load(FLUX)
    parts = graph.parts(model, steps=STEPS, seed=seed)
    graph.nodes[parts["latent_image"][0]]["inputs"] |= {"width": size, "height": size}
    node = graph.teacache_sampler(model, parts=parts, **changes)
    graph.save(node)
    return graph, node


def run(
    screen,
    graph: CacheGraph,
    node: str,
    done: str = "() => app.lastExecutionError?.exception_message ?? (window.finished && 'done')",
) -> None:
    """Puts a graph on the canvas, the node of interest in view, and presses Run."""
    screen.page.keyboard.press("Escape")  # the template browser opens late on a slow machine
    others = [name for name in graph.nodes if name != node]
    places = {name: [900 + 20 * index, 60 + 90 * index] for index, name in enumerate(others)} | {
        node: [60, 60]
    }
    screen.page.evaluate(BUILD, [graph.nodes, places])
    screen.page.evaluate(WATCH)
    screen.page.evaluate(
        "() => { window.finished = false; app.api.addEventListener('execution_success', () => {"
        " window.finished = true; }, { once: true }); app.queuePrompt(0, 1); }"
    )
    assert screen.page.wait_for_function(done, timeout=240_000).json_value() == "done"
    screen.page.wait_for_timeout(400)


@pytest.mark.parametrize("screen", LOOKS, indirect=True)
def test_the_strip_grows_step_by_step_and_is_complete_at_the_end(screen):
    graph, node = sampled(compare=True, seed=10 + list(LOOKS).index(screen.look))
    half = (
        "() => app.lastExecutionError?.exception_message ??"
        " (window.strips.some((strip) => strip?.[2] > 6 && strip[2] < 18) && 'done')"
    )
    run(screen, graph, node, half)
    screen.picture(f"strip-live-{screen.look}")
    screen.page.wait_for_function("() => window.finished", timeout=240_000)
    screen.page.wait_for_timeout(400)
    pending = [strip[2] for strip in screen.page.evaluate("() => window.strips.filter(Boolean)")]
    assert pending == sorted(pending, reverse=True), "it was drawn while sampling"
    assert len(set(pending)) >= 4, "it was drawn while sampling"
    chart = screen.page.evaluate(
        "() => Object.values(app.nodeOutputs).map((o) => o.nibble_chart?.[0]).find((c) => c?.kind"
        " === 'strip')"
    )
    assert screen.page.evaluate(LANE) == computed(chart)
    assert None not in computed(chart)
    assert False in computed(chart)
    lane = screen.page.locator(".nibble-lane").first
    box = lane.bounding_box()
    reused = computed(chart).index(False)
    screen.page.mouse.move(
        box["x"] + box["width"] * (reused + 0.5) / STEPS, box["y"] + box["height"] / 2
    )
    tip = screen.page.locator(".nibble-strip .nibble-tip")
    assert tip.is_visible()
    assert tip.locator("b").inner_text() == f"Step {reused + 1}: reused"
    screen.picture(f"strip-{screen.look}")
    screen.page.mouse.move(5, 5)
    seen, needed = screen.page.locator(".nibble-widget").first.evaluate(
        "(element) => [element.offsetHeight, element.firstElementChild.offsetHeight]"
    )
    assert needed <= seen + 1
    assert needed > 100


def test_the_strip_is_back_after_a_reload(screen):
    graph, node = sampled(64)
    run(screen, graph, node)
    lane = screen.page.evaluate(LANE)
    screen.page.evaluate(
        "() => app.extensionManager.workflow?.activeWorkflow?.changeTracker?.checkState?.()"
    )
    screen.page.wait_for_timeout(1500)  # the front end saves its draft after a pause
    screen.reload()
    screen.page.locator(".nibble-lane").first.wait_for(timeout=15_000)
    assert screen.page.evaluate(LANE) == lane


@pytest.mark.parametrize("screen", ["classic-dark", "nodes2-light"], indirect=True)
def test_apply_and_calibrate_draw_in_their_nodes(screen):
    graph = CacheGraph()
    model = graph.load(FLUX)
    calibration = graph.calibrate(model, filename="browser", steps=12)
    alpha = 0.3 + list(LOOKS).index(screen.look) / 100  # or nothing would run the second time
    applied = graph.apply_smoothcache(
        model, calibration=[calibration, 0], depth="block", alpha=alpha
    )
    graph.save(graph.sample(applied, graph.prompt(), steps=12))
    run(screen, graph, applied)
    assert screen.page.locator(".nibble-lane").count() >= 2, "a lane for each kind of block"
    assert screen.page.locator(".nibble-point").count() == 2 * 11
    assert screen.page.locator(".nibble-fit").count() >= 2
    screen.page.evaluate(
        "([a, c]) => { app.graph.getNodeById(Number(c)).pos = [520, 60];"
        " app.graph.getNodeById(Number(a)).pos = [60, 60]; app.canvas.setDirty(true, true); }",
        [applied, calibration],
    )
    screen.page.wait_for_timeout(500)
    screen.picture(f"smoothcache-{screen.look}")


def test_cells_and_line_lie_where_their_numbers_say(screen):
    """Two steps, the second with half a threshold's change on a plot that goes up to 1.3
    thresholds.
    """
    found = screen.page.evaluate("""async () => {
      const { drawChart } = await import("/extensions/ComfyUI-Nibble/charts.mjs");
      const cell = (step, computed, change) =>
        ({ step, sigma: 1 - step / 2, computed, why: computed ? "first" : "reused", change });
      const root = drawChart({ kind: "strip", title: "t", threshold: 0.4,
        cells: [cell(0, true, null), cell(1, false, 0.2)], rows: [] }).shadowRoot;
      return [root.querySelector(".nibble-teeth").getAttribute("d"),
        root.querySelector(".nibble-threshold").getAttribute("y1"),
              root.querySelector(".nibble-size").textContent];
    }""")
    line, threshold, told = found
    assert line == f"M25.000 64.00L75.000 {64 * (1 - 0.5 / 1.3):.2f}"
    assert float(threshold) == pytest.approx(64 * (1 - 1 / 1.3))
    assert told == "1 of 2steps computed2.00× less work"


def test_a_long_strip_and_hostile_names_are_drawn(screen):
    drawn = screen.page.evaluate("""async () => {
      const { drawChart } = await import("/extensions/ComfyUI-Nibble/charts.mjs");
      const cells = Array.from({ length: 1000 }, (_, step) => ({ step, sigma: 1,
        computed: step % 3 === 0, why: "new thing", change: step % 7 ? 0.1 : null }));
      const draw = (chart) => drawChart({ title: "<b>t</b>", ...chart }).shadowRoot;
      const long = draw({ kind: "strip", threshold: 0.2, cells,
        rows: [{ name: "<img src=x onerror=alert(1)>", computed: cells.map((c) => c.computed) }] });
      const empty = draw({ kind: "strip", cells: [], rows: [] });
      const bare = draw({ kind: "calibration", summary: [], points: [], series: [] });
      return [long.querySelectorAll(".nibble-step").length,
        long.querySelectorAll("img, .nibble-title b").length,
              empty.querySelectorAll(".nibble-step").length, bare.querySelectorAll("svg").length];
    }""")
    assert drawn == [1000, 0, 0, 0]
