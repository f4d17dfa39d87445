"""The example workflows as files: a front end that reads widgets by name finds what one finds that
reads them in order; models have links; nodes stand in their groups and on nobody's feet.
"""

import itertools
import json

import pytest

from checkout import ROOT
from other_packs import ADDRESSES, NEEDED, nodes_in

WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
TITLE = 30  # pixels above a node's position
# of nodes that choose a file of a model; the demo's files come with the pack
CHOOSES = ("CLIPLoader", "DualCLIPLoader", "VAELoader", "UNETLoader", "NibbleQuantizeSVDQuant")
OURS = ("demo", "-svdq-int4")
PUBLISHED = {  # model → the template that has it
    "FLUX.1 dev": "01 FLUX.1 dev, text to image",
    "Qwen-Image": "04 Qwen-Image, text to image",
    "Z-Image": "03 Z-Image Turbo, text to image",
    "Wan": "07 Wan 2.2, text to video",
    "FLUX.1 Kontext": "05 FLUX.1 Kontext, edit",
    "FLUX.1 Fill": "06 FLUX.1 Fill, inpaint",
    "MiniMax H3": "08 MiniMax H3, video and sound",
}


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def models_of(node: dict) -> list[dict]:
    return node["properties"].get("models", [])


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request) -> dict:
    return read(request.param)


def test_a_widget_has_one_value(workflow):
    inner = (workflow.get("definitions") or {}).get("subgraphs", [])
    for node in [*workflow["nodes"], *(node for graph in inner for node in graph["nodes"])]:
        named = node.get("widgets_values_named")
        if named is not None:
            assert list(named.values()) == node["widgets_values"], node["type"]


def test_a_link_is_of_a_file_that_the_node_chooses(workflow):
    for node in workflow["nodes"]:
        for model in models_of(node):
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(f"/{model['name']}")
            assert model["directory"]


def test_names_are_numbered_short_and_the_first_is_flux():
    """ComfyUI's list shows the file's name in one line of about 30 letters, in the order of the
    names where the disk gives them so, or where it is sorted.
    """
    names = [path.stem for path in WORKFLOWS]
    assert [name[:3] for name in names] == [f"{i:02} " for i in range(1, len(names) + 1)]
    assert max(map(len, names)) <= 31
    assert names[0] == PUBLISHED["FLUX.1 dev"]
    assert all(path.with_suffix(".jpg").exists() for path in WORKFLOWS)


def test_a_lora_that_nobody_has_is_bypassed(workflow):
    for node in workflow["nodes"]:
        if node["type"] == "LoraLoaderModelOnly" and not models_of(node):
            assert node["mode"] == 4


def test_nothing_is_copied_by_hand(workflow):
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            assert "demo/weights" not in node["widgets_values"][0]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_template_says_which_other_pack_it_needs(path):
    nodes = read(path)["nodes"]
    others = {node["type"] for node in nodes if "aux_id" in node["properties"]}
    assert others == nodes_in(path.stem)
    if others:
        (note,) = [node["widgets_values"][0] for node in nodes if node["type"] == "MarkdownNote"]
        pack = NEEDED[path.stem][0]
        assert f"**Needs [{pack}]({ADDRESSES[pack]})**" in note


def test_links_join_the_slots_that_name_them(workflow):
    nodes = {node["id"]: node for node in workflow["nodes"]}
    for number, source, out, target, slot, kind in workflow["links"]:
        assert number in nodes[source]["outputs"][out]["links"]
        assert nodes[target]["inputs"][slot]["link"] == number
        assert nodes[target]["inputs"][slot]["type"] == kind


def test_nodes_stand_apart(workflow):
    boxes = [
        (node["pos"][0], node["pos"][1] - TITLE, *node["size"][:2]) for node in workflow["nodes"]
    ]
    for (x, y, w, h), (x2, y2, w2, h2) in itertools.combinations(boxes, 2):
        assert x + w <= x2 or x2 + w2 <= x or y + h + TITLE <= y2 or y2 + h2 + TITLE <= y


@pytest.mark.parametrize("name", PUBLISHED.values(), ids=PUBLISHED)
def test_a_template_of_a_published_model_brings_all_of_its_files(name):
    nodes = read(ROOT / "example_workflows" / f"{name}.json")["nodes"]
    (note,) = [node for node in nodes if node["type"] == "MarkdownNote"]
    kinds = {node["type"] for node in nodes}
    assert {"NibbleQuantizeSVDQuant", "NibbleLoadSVDQuant", "VAELoader"} <= kinds
    for node in nodes:
        if node["type"] in CHOOSES:
            files = {value for value in node["widgets_values"] if ".safetensors" in str(value)}
            assert files == {model["name"] for model in models_of(node)}, node["type"]
        for model in models_of(node):  # for whoever downloads by hand
            assert (
                f"[{model['name']}]({model['url']}) into **models/{model['directory']}**"
                in (note["widgets_values"][0])
            )


def test_whatever_is_not_ours_has_a_link_in_the_templates_that_quantize(workflow):
    for node in workflow["nodes"]:
        if node["type"] == "NibbleQuantizeSVDQuant":
            connected = any(slot["name"] == "model" and slot["link"] for slot in node["inputs"])
            source = node["widgets_values"][0]
            assert connected or models_of(node) or any(part in source for part in OURS)


def test_the_template_of_a_text_encoder_brings_what_its_nodes_choose():
    templates = [{node["type"]: node for node in read(path)["nodes"]} for path in WORKFLOWS]
    (by_type,) = [found for found in templates if "NibbleQuantizeTextEncoder" in found]
    quantizer, loader = by_type["NibbleQuantizeTextEncoder"], by_type["NibbleLoadCLIP"]
    assert [model["name"] for model in models_of(quantizer)] == ["t5xxl_fp16.safetensors"]
    assert [model["name"] for model in models_of(loader)] == ["clip_l.safetensors"]
    chosen = next(slot for slot in loader["inputs"] if slot["name"] == "clip_name1")
    assert chosen["link"] in quantizer["outputs"][0]["links"]
    note = by_type["MarkdownNote"]["widgets_values"][0]
    for model in (file for node in by_type.values() for file in models_of(node)):
        assert f"[{model['name']}]({model['url']}) into **models/{model['directory']}**" in note
