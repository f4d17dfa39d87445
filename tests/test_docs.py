"""The documents say what is true: every path and page that they name exists, and every system has
its row in the table of docs/architecture.md.
"""

import re

import pytest

from support.import_graph import ROOT, graph

PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "accel|demo|docs|farm|example_workflows|kernels|locales|nodes|quant|tests|web"
PATH = re.compile(rf"`((?:{FOLDERS})/[\w./-]*)`")  # `quant/files/writer.py`, `nodes/bridge/caf/`
LINK = re.compile(r"\]\(([^)#:\s]+)\)")
SYSTEMS = {
    "SVDQuant",
    "LoRA on 4 bit",
    "IntLoRA",
    "VQ4DiT",
    "TeaCache, SmoothCache",
    "CAF",
    "FEATHER",
    "other programs' files",
    "modulation",
}


def systems() -> dict[str, list[str]]:
    """System → the cells of its row: equation, bridge, node, tests, help page."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = text[text.index("| system |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    return {row[0]: row[1:] for row in rows}


def test_every_system_has_a_row():
    assert set(systems()) == SYSTEMS


@pytest.mark.parametrize("system", sorted(SYSTEMS))
def test_equation_bridge_node_tests_and_help_page_exist(system):
    cells = systems()[system]
    assert len(cells) == 5
    for cell, floor in zip(
        cells, (("quant/", "accel/"), "nodes/bridge/", "nodes/", "tests/", "web/docs/"), strict=True
    ):
        paths = re.findall(r"`([^`]+)`", cell)
        assert paths, f"{system}: an empty cell"
        for path in paths:
            assert path.startswith(floor)
            assert (ROOT / path).exists(), f"{system}: {path} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_and_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    lost = [path for path in PATH.findall(text) if not (ROOT / path).exists()]
    lost += [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not lost


@pytest.mark.parametrize("floor", ["nodes/bridge", "quant", "accel"])
def test_every_room_has_a_line(floor):
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {path.parent.name for path in (ROOT / floor).glob("*/__init__.py")}
    if floor == "nodes/bridge":
        assert rooms == set(graph(floor).rooms), "files lie loose in the bridge"
    for room in rooms:
        assert f"| `{floor}/{room}/` |" in text, f"{floor}/{room} is not described"
