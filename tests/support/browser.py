"""ComfyUI's front end in a real browser, in both renderers and both palettes."""

import importlib.util
import os
import shutil
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from demo_graphs import FLUX

CHROMIUM = (
    os.environ.get("CHROMIUM_PATH")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
LOOKS = {
    "classic-dark": (False, "dark"),
    "classic-light": (False, "light"),
    "nodes2-dark": (True, "dark"),
    "nodes2-light": (True, "light"),
}
OURS = "/extensions/ComfyUI-Nibble/"
QUANTIZED = "flux-demo-browser.safetensors"
READY = (
    "() => !!(window.LiteGraph?.registered_node_types?.NibbleLoadSVDQuant &&"
    " window.app?.extensionManager && window.app.canvas)"
)
MAKE_GRAPH = """([source, target]) => {
  app.graph.clear();
  const [quantize, load, text] = ["NibbleQuantizeSVDQuant", "NibbleLoadSVDQuant", "PreviewAny"].map(
    (type) => LiteGraph.createNode(type));
  [quantize, load, text].forEach((node, i) => {
    app.graph.add(node); node.pos = [20 + 460 * i, 60];
  });
  const set = (name, value) => {
    quantize.widgets.find((widget) => widget.name === name).value = value;
  };
  set("model_name", source); set("filename", target); set("solver", "svd"); set("rotation", "off");
  quantize.connect(0, load, "model_name"); load.connect(0, text, 0);
  app.canvas.ds.scale = 1; app.canvas.ds.offset = [60, 40]; app.canvas.setDirty(true, true);
}"""


class Screen:
    """The front end in one open page, and what went wrong in it because of this pack."""

    def __init__(self, browser, url: str):
        self.look = ""
        self.page = browser.new_page(viewport={"width": 1500, "height": 1300})
        self.page.set_default_timeout(120_000)  # a busy machine draws in software
        self.problems: list[str] = []
        self.page.on(
            "console",
            lambda m: self._note(
                m.type in ("error", "warning"), f"{m.text} {m.location.get('url', '')}"
            ),
        )
        self.page.on("pageerror", lambda error: self._note(True, f"{error} {error.stack}"))
        self.page.goto(url, timeout=300_000)
        self._settle()

    def reload(self) -> None:
        """Loads the page again, as after closing and opening the browser."""
        self.page.reload()
        self._settle()

    def _settle(self) -> None:
        self.page.wait_for_function(READY, timeout=90_000)
        self.page.wait_for_timeout(1500)  # the first run's dialogs and the default workflow
        self.page.keyboard.press("Escape")
        self.set("Comfy.Minimap.Visible", False)

    def wear(self, look: str) -> None:
        """Switches the renderer and the palette and empties the canvas."""
        self.page.evaluate("() => app.graph.clear()")
        if look != self.look:
            self.look = look
            self.set("Comfy.VueNodes.Enabled", LOOKS[look][0])
            self.set("Comfy.ColorPalette", LOOKS[look][1])
            self.page.wait_for_timeout(500)
        self.page.mouse.move(5, 5)

    def _note(self, bad: bool, text: str) -> None:
        """Help pages are asked for in every language first, so a missing translation is no
        problem.
        """
        if bad and (OURS in text or "nibble" in text.lower()) and "/docs/" not in text:
            self.problems.append(text)

    def set(self, name: str, value) -> None:
        self.page.evaluate(
            "([name, value]) => app.extensionManager.setting.set(name, value)", [name, value]
        )

    def run_graph(self) -> None:
        """Quantize → load, as if Run was pressed; waits for both charts."""
        self.page.evaluate(MAKE_GRAPH, [FLUX, QUANTIZED])
        self.page.evaluate("() => app.queuePrompt(0, 1)")
        ended = """() => app.lastExecutionError?.exception_message
                   ?? (document.querySelectorAll(".nibble-chart-host").length === 2 && "drawn")"""
        assert self.page.wait_for_function(ended, timeout=240_000).json_value() == "drawn"
        self.page.wait_for_timeout(500)

    def picture(self, name: str) -> None:
        """A screenshot for people, where NIBBLE_SCREENSHOTS names a folder."""
        if folder := os.environ.get("NIBBLE_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png")


def missing() -> str | None:
    """Why no test can look at the front end here."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed: the browser tests did NOT run"
    if not CHROMIUM:
        return "no chromium found (set CHROMIUM_PATH): the browser tests did NOT run"
    return None


@contextmanager
def opened(url: str) -> Iterator[Screen]:
    """The front end of the server at `url`, until the context is left."""
    from playwright import sync_api

    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield Screen(chromium, url)
        chromium.close()


def fetch(server, path: str) -> bytes:
    with urllib.request.urlopen(server.url + urllib.parse.quote(path)) as answer:
        return answer.read()
