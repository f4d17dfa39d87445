"""The example workflows as files: a front end that reads widgets by name finds what one finds that
reads them in order.
"""

import json

import pytest

from checkout import ROOT

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_widget_has_one_value(path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    inner = (workflow.get("definitions") or {}).get("subgraphs", [])
    for node in [*workflow["nodes"], *(node for graph in inner for node in graph["nodes"])]:
        named = node.get("widgets_values_named")
        if named is not None:
            assert list(named.values()) == node["widgets_values"], node["type"]
