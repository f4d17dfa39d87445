"""Get Started: a model that fits the card, what is missing, and a template that exists."""

import folder_paths
import pytest

from nibble.nodes import get_started as node
from nibble.nodes.bridge.quantize import get_started
from nibble.nodes.bridge.quantize.get_started import PICKS, TEMPLATES, Template

FLUX = "01 FLUX.1 dev, text to image"


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Empty folders of models."""
    for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"})
        )
        folder_paths.filename_list_cache.pop(kind, None)
    yield tmp_path
    for kind in ("diffusion_models", "text_encoders", "vae", "loras"):
        folder_paths.filename_list_cache.pop(kind, None)


@pytest.mark.parametrize("goal", PICKS)
@pytest.mark.parametrize("card", ["this computer", "6 GB", "8 GB", "24 GB", "cpu"])
def test_every_goal_on_every_card_has_steps_and_a_template(goal, card):
    steps, template, chart = get_started.advise(goal, card)
    assert (TEMPLATES / f"{template}.json").exists()
    assert steps.startswith(f"Open the template {template}")
    assert dict(map(tuple, chart["summary"]))["our pick"].startswith(template)


def test_flux_is_the_pick_for_pictures_on_8_gb():
    steps, template, chart = get_started.advise("pictures", "8 GB")
    assert template == FLUX
    assert "fits" in dict(map(tuple, chart["summary"]))["our pick"]
    for name in ("flux1-dev.safetensors", "clip_l.safetensors", "ae.safetensors"):
        assert name in steps
    assert "minutes once" in steps


def test_what_is_here_is_not_downloaded_or_made_again(folders):
    (folders / "diffusion_models" / "flux1-dev-svdq-int4-r32.safetensors").touch()
    (folders / "vae" / "ae.safetensors").touch()
    steps, _, _ = get_started.advise("pictures", "8 GB")
    assert "Press Run: flux1-dev-svdq-int4-r32.safetensors is here." in steps
    assert "flux1-dev.safetensors into" not in steps
    assert "ae.safetensors" not in steps
    assert "clip_l.safetensors into models/text_encoders" in steps


@pytest.mark.parametrize("name", sorted({name for picks in PICKS.values() for _, name in picks}))
def test_a_template_says_what_it_needs(name):
    template = Template.read(name)
    assert template.made.endswith("-svdq-int4-r32.safetensors")
    assert template.source[1] == "diffusion_models"
    assert {kind for _, kind, _ in template.needed} >= {"text_encoders", "vae"}


def test_the_node_sends_the_template_with_its_chart():
    sent = node.NibbleGetStarted.execute()
    assert sent.ui["nibble_template"] == [FLUX]
    assert sent.ui["nibble_chart"][0]["kind"] == "facts"
