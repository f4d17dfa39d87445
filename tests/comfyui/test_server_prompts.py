"""Graphs and workflows that artists have saved still load and run: node ids, input names, choices,
and the order of widgets, by which a workflow keeps their values.
"""

import json
from pathlib import Path

import pytest

import comfyui_server
from demo_prompts import furnish, prompts
from object_info import check_value, inputs_of, kind_of, widgets_of

WORKFLOWS = sorted((Path(__file__).parent / "workflows").glob("*.json"))


def name_of(path: Path) -> str:
    return path.stem


@pytest.fixture(scope="module")
def demo(seeker):
    """The server with what the prompts need in its folders."""
    furnish(seeker)
    return seeker


@pytest.fixture(scope="module")
def nodes(demo) -> dict[str, dict]:
    """Node id → its schema."""
    return demo.get("/object_info")


@pytest.mark.parametrize("path", prompts(), ids=name_of)
def test_a_prompt_names_nodes_inputs_and_choices_that_there_are(nodes, path):
    for node in json.loads(path.read_text(encoding="utf-8")).values():
        schema = nodes[node["class_type"]]
        known = inputs_of(schema)
        assert node["inputs"].keys() <= known.keys()
        assert schema["input"].get("required", {}).keys() <= node["inputs"].keys()
        for name, value in node["inputs"].items():
            check_value(value, known[name])


@pytest.mark.slow
@pytest.mark.parametrize("path", prompts(), ids=name_of)
def test_a_prompt_runs(demo, monkeypatch, path):
    """In the order of their names: later ones use the files of earlier ones."""
    monkeypatch.setattr(comfyui_server, "RUN_SECONDS", 3600)  # a busy machine is no failure
    assert demo.run(json.loads(path.read_text(encoding="utf-8")))


def ours(path: Path) -> list[dict]:
    saved = json.loads(path.read_text(encoding="utf-8"))["nodes"]
    return [node for node in saved if node["type"].startswith("Nibble")]


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_workflow_s_nodes_have_their_sockets_and_widgets_in_the_same_order(nodes, path):
    """New inputs may follow the saved ones."""
    for node in ours(path):
        schema = nodes[node["type"]]
        widgets = widgets_of(schema)
        sockets = [name for name in inputs_of(schema) if name not in widgets]
        saved = [entry["name"] for entry in node["inputs"] if "widget" in entry]
        assert widgets[: len(saved)] == saved
        saved = [entry["name"] for entry in node["inputs"] if "widget" not in entry]
        assert sockets[: len(saved)] == saved


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_workflow_s_values_are_those_of_their_widgets(nodes, path):
    for node in ours(path):
        known = inputs_of(nodes[node["type"]])
        values = iter(node["widgets_values"])
        for name in (entry["name"] for entry in node["inputs"] if "widget" in entry):
            value = next(values)
            if value != "":  # a choice that a link gives
                check_value(value, known[name])
            if kind_of(known[name])[1].get("control_after_generate"):
                next(values)  # what becomes of a seed after a run, a widget of the front end
        assert not list(values)


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_a_workflow_s_outputs_are_those_of_its_nodes(nodes, path):
    for node in ours(path):
        saved = [output["type"] for output in node["outputs"]]
        assert nodes[node["type"]]["output"][: len(saved)] == saved


def test_the_prompts_use_every_node_of_the_pack(nodes):
    used = {
        node["class_type"]
        for path in prompts()
        for node in json.loads(path.read_text(encoding="utf-8")).values()
    }
    elsewhere = {
        "NibbleCAFInvert",
        # an encoder has to be made first: test_server_encoders.py
        "NibbleLoadCLIP",
        "NibbleQuantizeTextEncoder",
    }
    assert {name for name in nodes if name.startswith("Nibble")} - used <= elsewhere
