"""The demo model in ComfyUI's lists and table of models."""

import comfy.latent_formats
import comfy.sd
import comfy.supported_models
import folder_paths
import numpy as np
import pytest
import torch

from nibble.demo import world
from nibble.nodes.bridge.host import demo_model, folders
from nibble.nodes.bridge.quantized import loading
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe

FLUX, VAE = "flux-demo.safetensors", "vae-demo.safetensors"
KINDS = {"diffusion_models": FLUX, "vae": VAE}


@pytest.fixture
def lists(tmp_path, monkeypatch):
    """ComfyUI's two kinds of folders with an empty place each, and the demo registered."""
    for kind in KINDS:
        home = tmp_path / kind
        home.mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(home)], {".safetensors"})
        )
        folder_paths.filename_list_cache.pop(kind, None)
    monkeypatch.setattr(comfy.supported_models, "models", [*comfy.supported_models.models])
    demo_model.register()
    yield tmp_path
    for kind in KINDS:
        folder_paths.filename_list_cache.pop(kind, None)


@pytest.mark.parametrize(("kind", "name"), KINDS.items(), ids=KINDS)
def test_each_list_has_the_demo_s_file_of_its_kind(lists, kind, name):
    assert folder_paths.get_filename_list(kind) == [name]
    assert folders.path_of(name, kind).parent == demo_model.WEIGHTS / kind


@pytest.mark.parametrize(("kind", "name"), KINDS.items(), ids=KINDS)
def test_the_user_s_own_copy_comes_first(lists, kind, name):
    (lists / kind / name).write_bytes(b"own")
    folder_paths.filename_list_cache.pop(kind, None)
    assert folder_paths.get_filename_list(kind) == [name]
    assert folders.path_of(name, kind) == lists / kind / name


def test_nothing_is_written_into_the_pack(lists):
    source = folders.path_of(FLUX)
    target, name = folders.place("new.safetensors", "diffusion_models", beside=source)
    assert target == lists / "diffusion_models" / "new.safetensors"
    assert name == "new.safetensors"


def test_registering_twice_is_registering_once(lists):
    before = [*comfy.supported_models.models]
    demo_model.register()
    assert comfy.supported_models.models == before
    assert folder_paths.get_folder_paths("vae")[1:] == [str(demo_model.WEIGHTS / "vae")]


def preview(latent_format, latents: torch.Tensor) -> torch.Tensor:
    """ComfyUI's `latent_preview.Latent2RGBPreviewer`, before it becomes bytes."""
    factors = torch.tensor(latent_format.latent_rgb_factors)
    bias = torch.tensor(latent_format.latent_rgb_factors_bias)
    return (latents.movedim(1, -1) @ factors + bias).clamp(-1, 1)


def test_a_preview_has_the_colours_of_the_picture(lists):
    model = comfy.sd.load_diffusion_model(str(folders.path_of(FLUX)))
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(folders.path_of(VAE, "vae"))))
    rng = np.random.default_rng(11)
    scenes = [world.random_scene(rng) for _ in range(16)]
    drawn = [world.render(scene, world.random_pose(scene.place, rng)) for scene in scenes]
    pictures = torch.tensor(np.stack(drawn)).float()
    latents = model.model.process_latent_in(vae.encode(pictures)).float()
    colours = pictures.reshape(16, 8, 8, 8, 8, 3).mean((2, 4)) * 2 - 1

    def db(latent_format) -> float:
        error = (preview(latent_format, latents) - colours) / 2
        return float(-10 * error.square().mean().log10())

    assert db(model.model.latent_format) > 35
    assert db(comfy.latent_formats.Flux()) < 15


def test_the_quantized_demo_has_the_same_previews(lists):
    target = lists / "diffusion_models" / "flux-demo-4bit.safetensors"
    recipe = Recipe.from_preset("fast", solver="svd", rotation="off")
    quantize_checkpoint(folders.path_of(FLUX), target, recipe)
    model = loading.load(target).model
    assert isinstance(model.latent_format, demo_model.DemoLatents)


def test_no_other_flux_is_taken(lists, flux_file):
    """The random FLUX of these tests is small too, but has other sizes."""
    model = comfy.sd.load_diffusion_model(str(flux_file)).model
    assert type(model.latent_format) is comfy.latent_formats.Flux
