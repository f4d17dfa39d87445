"""The front end's node search, by its own search code: what people type finds our nodes."""

import pytest

FOUND = """(text) => {
  const pinia = document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia;
  const store = pinia._s.get("nodeDef");
  return store.nodeSearchService.searchNode(text, [], { limit: 64 }).map((node) => node.name);
}"""


def test_nibble_lists_the_loader_first(screen):
    found = screen.page.evaluate(FOUND, "nibble")
    assert found[0] == "NibbleLoadSVDQuant"
    assert len(found) > 20
    screen.picture("search-nibble")


@pytest.mark.parametrize(
    "text", ["nunchaku", "gguf", "load flux", "low vram", "int4", "4bit", "8gb", "faster", "svdq"]
)
def test_what_people_type_finds_ours(screen, text):
    assert any(name.startswith("Nibble") for name in screen.page.evaluate(FOUND, text))


@pytest.mark.parametrize("look", ["classic-dark"])
def test_the_search_box_shows_it(screen, look):
    screen.page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
    screen.page.wait_for_timeout(800)
    screen.page.keyboard.type("nibble")
    screen.page.wait_for_timeout(1200)
    screen.picture("search-box-nibble")
    screen.page.keyboard.press("Escape")
    assert screen.problems == []
