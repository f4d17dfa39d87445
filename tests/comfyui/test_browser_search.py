"""The front end's node search, by its own search code: what people type finds our nodes; and their
places in the menus, in the user's language.
"""

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


# type -> category, of the canvas's menu and of the node library
PLACES = """() => {
  const store = document.querySelector("#vue-app").__vue_app__.config.globalProperties.$pinia
    ._s.get("nodeDef");
  return Object.entries(LiteGraph.registered_node_types).map(([type, { category }]) =>
    [type, category, store.nodeDefsByName[type]?.category]);
}"""
TRANSLATED = "() => LiteGraph.registered_node_types.NibbleLoadSVDQuant.category === %r"


def places(screen, language, loader):
    screen.set("Comfy.Locale", language)
    screen.page.evaluate("() => app.refreshComboInNodes()")
    screen.page.wait_for_function(TRANSLATED % loader, timeout=60_000)
    screen.page.wait_for_timeout(1500)
    return {name: found for name, *found in screen.page.evaluate(PLACES)}


def test_the_menus_are_in_the_users_language(screen):
    english = places(screen, "en", "Nibble/Load")
    assert english["NibbleCAFSampler"] == ["Nibble/Few steps"] * 2
    try:
        chinese = places(screen, "zh", "Nibble/加载")
        screen.picture("menu-zh")
    finally:
        assert places(screen, "en", "Nibble/Load") == english
    assert chinese["NibbleCAFSampler"] == ["Nibble/少步采样"] * 2
    ours = {name: found for name, found in chinese.items() if name.startswith("Nibble")}
    assert len(ours) > 20
    for canvas, library in ours.values():
        assert canvas == library
        assert canvas in ("Nibble", "Nibble/LoRA") or not canvas.isascii()
