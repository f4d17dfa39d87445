"""FEATHER's nodes on ComfyUI's own Qwen-Image-Edit encoder and node: plan, chart while encoding,
report.
"""

import asyncio
import base64
import io
import json
from types import SimpleNamespace

import pytest
import torch
from comfy_extras.nodes_qwen import TextEncodeQwenImageEdit
from PIL import Image

import tiny_encoders as vl
from nibble.nodes import feather as nodes
from nibble.nodes.bridge.feather import prune as feather
from nibble.nodes.bridge.feather import record
from nibble.nodes.bridge.feather import report as image_patches
from nibble.nodes.bridge.host import progress

DEFAULTS = dict(
    keep=0.3, mode="scatter", criterion="feather", stride=3, first_layer=0, second_layer=0
)


@pytest.fixture(scope="module")
def clip():
    return vl.qwen_image()


def prune(clip, **changes):
    """(CLIP, chart) of the node."""

    class Node(nodes.NibbleFeatherPrune):
        hidden = SimpleNamespace(unique_id="7")

    done = Node.execute(clip, **(DEFAULTS | changes))
    return done.result[0], done.ui["nibble_chart"][0]


def encode(clip, image=None, prompt="make the cup blue"):
    return TextEncodeQwenImageEdit.execute(clip, prompt, image=image).result[0]


@pytest.fixture
def shown(monkeypatch):
    """What nodes drew while something ran."""
    charts = []
    monkeypatch.setattr(
        progress.Progress, "show", lambda self, chart: charts.append((self.node_id, chart))
    )
    return charts


def test_the_plan_names_layers_and_shares(clip):
    _, plan = prune(clip)
    assert plan["kind"] == "facts"
    assert dict(plan["summary"])["layers"] == "prunes before 2 and 4 of 8"
    keeps = "30% and one patch in 3 in both directions, then 9.0% of those"
    assert dict(plan["summary"])["keeps"] == keeps
    assert "as it is" in dict(prune(clip, keep=1.0)[1]["summary"])["keeps"]


def test_the_picture_is_drawn_in_the_node_while_a_prompt_is_encoded(clip, shown):
    conditioning = encode(prune(clip)[0], vl.image(300, 420))
    ((node, chart),) = shown
    (picture,) = chart["pictures"]
    assert node == "7"
    assert chart["kind"] == "patches"
    assert json.dumps(chart)
    assert len(picture["stage"]) == picture["rows"] * picture["columns"]
    facts = conditioning[0][1][feather.KEY]["pictures"][0]
    assert [picture["stage"].count(2), sum(level > 0 for level in picture["stage"])] == [
        int(facts["masks"][1].sum()),
        int(facts["masks"][0].sum()),
    ]
    image = Image.open(io.BytesIO(base64.b64decode(picture["url"].split(",")[1])))
    assert max(image.size) == image_patches.SIDE
    assert image.width > image.height


def test_the_report_counts_tokens_and_operations_by_hand(clip, shown):
    conditioning = encode(prune(clip)[0], vl.image(300, 420))
    done = nodes.NibbleFeatherReport.execute(conditioning)
    (chart,) = done.ui["nibble_chart"]
    facts = conditioning[0][1][feather.KEY]
    first, second = (int(mask.sum()) for mask in facts["pictures"][0]["masks"])
    text = facts["length"] - len(facts["pictures"][0]["masks"][0])
    whole = facts["length"]
    assert chart["tokens"] == [whole] * 2 + [text + first] * 2 + [text + second] * 4
    count = lambda n: 4 * n * vl.WIDTH**2 + 2 * n * n * vl.WIDTH + 2 * n * vl.WIDTH * vl.HIDDEN  # noqa: E731
    assert chart["flops"] == [
        8 * count(whole),
        2 * count(whole) + 2 * count(text + first) + 4 * count(text + second),
    ]


def test_the_report_darkens_what_was_pruned_and_leaves_the_rest(clip, shown):
    conditioning = encode(prune(clip)[0], torch.ones(1, 300, 420, 3))
    drawn = nodes.NibbleFeatherReport.execute(conditioning).result[0]
    picture = record.Picture(**conditioning[0][1][feather.KEY]["pictures"][0])
    height, width = drawn.shape[1] / picture.height, drawn.shape[2] / picture.width
    for index in range(picture.count):
        light = drawn[
            0,
            int((index // picture.width + 0.5) * height),
            int((index % picture.width + 0.5) * width),
        ].mean()
        expected = (
            1
            if picture.masks[1][index]
            else image_patches.DIM**0.5
            if picture.masks[0][index]
            else image_patches.DIM
        )
        assert abs(light - expected) < 0.02


def test_a_conditioning_that_was_not_pruned_has_no_report(clip, shown):
    for conditioning in (
        encode(clip, vl.image(300, 420)),
        encode(prune(clip)[0]),
        encode(prune(clip, keep=1.0)[0], vl.image(300, 420)),
    ):
        with pytest.raises(ValueError, match="keep below 1, and give the prompt an image"):
            nodes.NibbleFeatherReport.execute(conditioning)
    assert shown == []


def test_layers_out_of_order_are_refused_before_anything_runs(clip):
    with pytest.raises(ValueError, match="layers 5 and 4 .* choose from 1 to 7"):
        prune(clip, first_layer=5, second_layer=4)


def test_the_pack_offers_both_nodes():
    import nibble.nodes

    names = {
        node.define_schema().node_id
        for node in asyncio.run(nibble.nodes.NibbleExtension().get_node_list())
    }
    assert {"NibbleFeatherPrune", "NibbleFeatherReport"} <= names
    schema = nodes.NibbleFeatherPrune.define_schema()
    assert all(item.tooltip for item in schema.inputs)
    assert sum(not item.advanced for item in schema.inputs) <= 6
