"""A running ComfyUI with the demo model in its folders, one for the whole session; the front end in
a browser; and LoRAs of the demo model.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import browser
from comfyui_server import COMFYUI, Server
from demo_graphs import FLUX, QUANTIZED, WEIGHTS, Graph, furnish
from demo_loras import lora_file
from demo_prompts import SEEKER_FLAGS, add_seeker_nodes

HERE = Path(__file__).parent


def _why_no_server() -> str | None:
    """Why no test here can run."""
    if not COMFYUI:
        return "COMFYUI_PATH is not set: the tests against a real ComfyUI server did NOT run"
    if not (WEIGHTS / "diffusion_models" / FLUX).exists():
        return f"no demo weights in {WEIGHTS}: the tests against a real ComfyUI server did NOT run"
    return None


def pytest_collection_modifyitems(items):
    no_server, no_browser = _why_no_server(), browser.missing()
    for item in items:
        if HERE not in item.path.parents:
            continue
        if no_server:
            item.add_marker(pytest.mark.skip(reason=no_server))
        elif no_browser and "page" in item.fixturenames:
            item.add_marker(pytest.mark.skip(reason=no_browser))


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with furnish(Server(tmp_path_factory.mktemp("comfyui"))) as running:
        yield running


@pytest.fixture(scope="module")
def seeker(tmp_path_factory):
    """A server that also has the nodes of seeker_nodes/."""
    home = tmp_path_factory.mktemp("seeker")
    add_seeker_nodes(home)
    with Server(home, *SEEKER_FLAGS) as running:
        yield running


@pytest.fixture(scope="session")
def quantized(server) -> str:
    """The demo model at 4 bits, made through the node."""
    server.run(Graph().quantize(filename=QUANTIZED).nodes)
    return QUANTIZED


@pytest.fixture
def graph() -> Graph:
    return Graph()


@pytest.fixture(scope="module")
def page(server):
    with browser.opened(server.url) as screen:
        yield screen


@pytest.fixture
def screen(page, request):
    """The page in the look that the test asks for (classic-dark by default); errors of ours fail
    the test that caused them.
    """
    page.wear(getattr(request, "param", "classic-dark"))
    page.problems.clear()
    yield page
    assert page.problems == []


@pytest.fixture(scope="module")
def lora_files(server) -> dict[str, str]:
    """Name → file in models/loras: two LoRAs, one with a scale for each row, one of another
    family, and one that is not a number.
    """
    other = load_file(WEIGHTS / "diffusion_models" / FLUX)["double_blocks.0.img_mlp.0.weight"]
    stem = "lora_unet_double_blocks_0_img_mlp_0"
    save_file(
        {
            "lora_unet_down_blocks_1_attentions_0_proj_in.lora_up.weight": torch.ones(640, 4),
            "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.ones(4, 640),
        },
        server.folder("loras") / "sdxl.safetensors",
    )
    save_file(
        {
            f"{stem}.lora_up.weight": torch.full((other.shape[0], 4), float("nan")),
            f"{stem}.lora_down.weight": torch.ones(4, other.shape[1]),
        },
        server.folder("loras") / "nan.safetensors",
    )
    return {
        name: lora_file(server, name, seed, kind)
        for name, seed, kind in (("first", 1, "lora"), ("second", 2, "lora"), ("scaled", 3, "dora"))
    } | {"sdxl": "sdxl.safetensors", "nan": "nan.safetensors"}
