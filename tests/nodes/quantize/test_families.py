"""Every family of ComfyUI's transformers is quantized with the nodes' defaults, and by both ways to
the same file: a measurement that fails is done without, and said.
"""

import json

import comfy.model_management
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models
from nibble.nodes.bridge.quantize import record_inputs
from nibble.nodes.bridge.quantize.svdquant import SVDQuantRequest
from nibble.nodes.bridge.quantize.vq4dit import VQRequest, recipe_of
from nibble.nodes.bridge.quantized import loading
from nibble.quant.calibration import pictures
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.svdquant.recipe import Recipe

FAST = Recipe.from_preset("fast", rank=16, solver="svd", smoothing_grid=1)
# families that are not quantized, or not at this size: in words, before anything is run
REFUSALS = (
    "no layer that could be quantized",
    "holds no diffusion transformer",
    "has diffusers' names",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """ComfyUI's diffusion_models folder, empty; pictures are small."""
    monkeypatch.setattr(pictures, "TOKENS", 7)
    monkeypatch.setattr(pictures, "RANDOM_PIXELS", 64)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, loading.FOLDER, ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    yield tmp_path
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)


def svdquant(model=None, **changes) -> tuple[str, list[str]]:
    """(the new file's name, the report's notes)"""
    asked = dict(model_name="", recipe=FAST, filename="made", model=model) | changes
    with torch.inference_mode():
        name, report = SVDQuantRequest(**asked).run()
    return name, report.notes


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_family_is_quantized_with_the_defaults(folder, family):
    try:
        name, notes = svdquant(tiny_models.build(family))
    except FileRefused as refusal:
        assert any(words in str(refusal) for words in REFUSALS)
        return
    assert open_quantized(folder / name).layers
    assert len(notes) == 1
    measured = "measured on noise" in notes[0]
    kind = open_quantized(folder / name).fact("calibration")["kind"]
    assert kind == ("random conditioning" if measured else "weights only")
    assert measured or "weights alone" in notes[0]


def test_a_model_that_requires_its_text_encoder_s_mask_is_measured(folder):
    _, notes = svdquant(tiny_models.build("ltxv"))
    assert notes == ["inputs were measured on noise and random conditioning"]


def broken(monkeypatch, error: Exception):
    """A tiny FLUX that cannot be run."""
    model = tiny_models.build("flux")

    def fails(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(type(model.model.diffusion_model), "forward", fails)
    return model


@pytest.mark.parametrize("kind", ["svdquant", "vq"])
def test_fast_goes_on_from_the_weights_where_the_model_cannot_be_run(folder, monkeypatch, kind):
    model = broken(monkeypatch, RuntimeError("mat1 and mat2\nin full"))
    requests = {
        "svdquant": SVDQuantRequest(model_name="", recipe=FAST, filename="made", model=model),
        "vq": VQRequest(model_name="", recipe=recipe_of("fast", 3), filename="made", model=model),
    }
    with torch.inference_mode():
        name, report = requests[kind].run()
    assert report.notes == [
        "the 16-bit model could not be run (RuntimeError: mat1 and mat2), so the weights alone"
        " were used"
    ]
    assert open_quantized(folder / name).fact("calibration") == {"kind": "weights only"}


@pytest.mark.parametrize("kind", ["svdquant", "vq"])
def test_best_says_in_a_sentence_that_the_model_cannot_be_run(folder, monkeypatch, kind):
    model = broken(monkeypatch, RuntimeError("mat1 and mat2\nin full"))
    best = Recipe.from_preset("best", rank=16)
    prompt = tiny_models.prompt("flux")
    requests = {
        "svdquant": SVDQuantRequest(model_name="", recipe=best, model=model, positive=prompt),
        "vq": VQRequest(model_name="", recipe=recipe_of("best", 3), model=model),
    }
    with pytest.raises(ValueError, match=r"^The 16-bit model could not be run .* 'fast'"):
        requests[kind].run()
    assert list(folder.iterdir()) == []


def test_stop_is_no_failure(folder, monkeypatch):
    stopped = comfy.model_management.InterruptProcessingException()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        svdquant(broken(monkeypatch, stopped))


def test_a_model_that_overflows_is_not_measured(folder):
    model = tiny_models.build("flux")
    with torch.no_grad():
        model.model.diffusion_model.img_in.bias.fill_(torch.inf)
    with pytest.raises(FileRefused, match=r"NaN or infinity in img_in\.bias"):
        svdquant(model)


# ---- two ways to the same file


def ltx_file(path, **settings) -> None:
    """A tiny LTX-Video, whose heads only its metadata tell."""
    state = tiny_models.build("ltxv").model.diffusion_model.state_dict()
    config = dict(num_attention_heads=2, attention_head_dim=32, caption_channels=24) | settings
    metadata = {"config": json.dumps({"transformer": config}), "format": "pt"}
    save_file({key: value.contiguous() for key, value in state.items()}, path, metadata)


def test_a_connected_model_keeps_what_its_file_says_of_it(folder, monkeypatch):
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: False)
    ltx_file(folder / "ltx.safetensors")
    import comfy.sd

    model = comfy.sd.load_diffusion_model(str(folder / "ltx.safetensors"), {"dtype": torch.float32})
    same = dict(positive=tiny_models.prompt("ltxv"), latent={"samples": tiny_models.latent("ltxv")})
    read, _ = svdquant(model_name="ltx.safetensors", filename="read", **same)
    connected, _ = svdquant(model, filename="connected", **same)
    files = [open_quantized(folder / name) for name in (read, connected)]
    assert files[0].metadata["config"] == files[1].metadata["config"]
    assert files[0].layers == files[1].layers
    tensors = [load_file(folder / name) for name in (read, connected)]
    assert tensors[0].keys() == tensors[1].keys()
    for name in tensors[0]:
        assert torch.equal(tensors[0][name].view(torch.uint8), tensors[1][name].view(torch.uint8))
    assert loading.load(folder / connected).model.diffusion_model.num_attention_heads == 2


def test_a_model_that_no_file_tells_of_says_itself_how_it_is_built(folder):
    name, _ = svdquant(tiny_models.build("ltxv"), filename="unnamed")
    assert loading.load(folder / name).model.diffusion_model.num_attention_heads == 2
    name, _ = svdquant(tiny_models.build("flux"), filename="plain")
    assert "config" not in open_quantized(folder / name).metadata


def test_a_file_made_without_its_config_is_made_again(folder):
    model = tiny_models.build("ltxv")
    name, _ = svdquant(model)
    told = json.loads(open_quantized(folder / name).metadata["config"])
    model.model.model_config.unet_config["timestep_scale_multiplier"] = 500
    with pytest.raises(FileRefused, match="overwrite"):
        svdquant(model)
    svdquant(model, overwrite=True)
    assert json.loads(open_quantized(folder / name).metadata["config"]) != told
