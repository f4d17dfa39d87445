"""Schemas keep what workflows and prompts were saved with, and say where a node stands and what
finds it.
"""

import json
from pathlib import Path

import pytest
from comfy_api.latest import io

from nibble.nodes import NODES, menu

# Node -> the inputs that a prompt must give. A line is written with its node and never grows: an
# input that comes later is optional, so that a prompt from before still runs.
REQUIRED = json.loads((Path(__file__).parent.parent / "required_inputs.json").read_text())
PLACES = {value for name, value in vars(menu).items() if name.isupper()}
TYPED = {  # what people type → a node that has to be found by it
    "gguf": "NibbleLoadSVDQuant",
    "low vram": "NibbleLoadSVDQuant",
    "flux loader": "NibbleLoadSVDQuant",
    "load flux": "NibbleLoadSVDQuant",
    "nunchaku": "NibbleLoadSVDQuant",
    "int4": "NibbleLoadSVDQuant",
    "4bit": "NibbleLoadSVDQuant",
    "8gb": "NibbleLoadSVDQuant",
    "oom": "NibbleVRAMPlan",
    "speed up": "NibbleApplyTeaCache",
    "faster": "NibbleTeaCacheSampler",
    "clip loader": "NibbleLoadCLIP",
    "train lora": "NibbleTrainIntLoRA",
}


@pytest.fixture(params=NODES, ids=lambda node: node.__name__)
def node(request):
    return request.param


def test_nothing_is_required_that_was_not_at_first(node):
    required = node.INPUT_TYPES().get("required", {})
    assert set(required) <= set(REQUIRED[node.define_schema().node_id])


def test_optional_widgets_stand_behind_the_others(node):
    """As the page shows them, whatever the order in the schema; a template that follows the schema
    would put values into their neighbours' widgets.
    """
    inputs = node.define_schema().inputs
    optional = [one.optional for one in inputs if isinstance(one, io.WidgetInput)]
    assert optional == sorted(optional)


def test_every_line_is_of_a_node():
    assert {node.define_schema().node_id for node in NODES} == set(REQUIRED)


def test_a_node_stands_in_a_place_of_the_menu(node):
    schema = node.define_schema()
    assert schema.category in PLACES
    assert "nibble" in schema.search_aliases
    assert len(set(schema.search_aliases)) == len(schema.search_aliases)


@pytest.mark.parametrize(("text", "wanted"), TYPED.items(), ids=TYPED)
def test_what_people_type_finds_a_node(text, wanted):
    found = {node.define_schema().node_id: node.define_schema().search_aliases for node in NODES}
    assert text in found[wanted]
