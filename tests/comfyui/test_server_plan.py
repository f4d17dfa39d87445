"""The memory plan in a real ComfyUI: a published model, files of the folders, and wrong names."""

import pytest

from comfyui_server import Refused
from demo_graphs import FLUX, VAE, Graph

NODE = "NibbleVRAMPlan"
PUBLISHED = "flux1-dev (published size)"


def plan(server, **changes) -> dict:
    """The chart that the browser gets."""
    inputs = dict(
        card="8 GB",
        model_name=PUBLISHED,
        text_encoder="as published",
        vae="as published",
        width=1024,
        height=1024,
    )
    graph = Graph()
    node = graph.add(NODE, **(inputs | changes))
    return server.run(graph.nodes)[node]["nibble_chart"][0]


def test_the_node_is_there_with_tooltips_and_at_most_six_visible_widgets(server):
    inputs = server.get(f"/object_info/{NODE}")[NODE]["input"]
    specs = [spec for group in ("required", "optional") for spec in inputs.get(group, {}).values()]
    assert all(spec[1].get("tooltip") for spec in specs)
    assert sum(not spec[1].get("advanced") for spec in specs) == 6
    listed = inputs["required"]["model_name"][1]["options"]
    assert {FLUX, PUBLISHED} <= set(listed)


def test_flux_with_its_t5_fits_into_8_gb_by_the_plan(server):
    chart = plan(server)
    assert chart["kind"] == "memory"
    assert chart["verdict"] == "fits, with 3 of the switches"
    for stage in chart["stages"]:
        held = sum(part["bytes"] for part in stage["card"] if part["kind"] != "stays")
        assert held < 7.5e9
        assert sum(part["bytes"] for part in stage["ram"]) < 16e9


def test_files_of_the_folders_are_planned_as_they_are(server):
    chart = plan(server, model_name=FLUX, text_encoder="none", vae=VAE, width=64, height=64)
    assert chart["verdict"] == "fits as it is"
    assert chart["stages"][0]["card"][0]["label"] == FLUX
    assert chart["switches"][0]["name"] == "4-bit model"
    assert not chart["switches"][0]["on"]


def test_a_lora_that_is_not_there_is_refused_in_a_sentence(server):
    with pytest.raises(Refused, match="gone.safetensors is not in ComfyUI's loras folder"):
        plan(server, loras="gone.safetensors")
