"""Every model class of ComfyUI: is it recognised, is the plan sensible, does the 4-bit file open,
and does the model draw as in 16 bit?

In their published sizes by shapes alone; tiny ones are quantized, loaded and run.
"""

import math
import re
from fnmatch import fnmatchcase
from pathlib import Path

import comfy.model_detection
import comfy.supported_models
import pytest
import torch

import class_walk
import full_size_models
import tiny_models
from class_walk import draw, relative
from nibble.nodes.bridge.caching.models import level_of
from nibble.nodes.bridge.quantized import loading
from nibble.quant.files import architectures, universal_plan
from nibble.quant.files.architectures import GROUP, plan, recognise
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.source import StateDictSource
from nibble.quant.svdquant.quantize import SVDQuantJob, layout, predict
from nibble.quant.svdquant.recipe import Recipe
from what_families_can import NO_CAF, NOT_TRAINED

FAST = Recipe.from_preset("fast")
NO_TRANSFORMER = {  # why not
    **dict.fromkeys(
        ["LotusD", "Stable_Zero123", "SD15_instructpix2pix", "SD15", "SD20", "SD21UnclipL"],
        "a small U-Net",
    ),
    **dict.fromkeys(["SD21UnclipH", "SD_X4Upscaler"], "a small U-Net"),
    **dict.fromkeys(["Stable_Cascade_C", "Stable_Cascade_B"], "convolutions in the main"),
    **dict.fromkeys(["RT_DETR_v4", "SAM3", "SAM31", "DepthAnything3"], "no diffusion model"),
}
STAND_FOR = {  # of the same layers as another one
    "SDXL": ["SDXLRefiner", "SDXL_instructpix2pix", "SSD1B", "KOALA_700M", "KOALA_1B"],
    "SDXL ": ["Segmind_Vega", "SV3D_u", "SV3D_p", "SVD_img2vid"],
    "StableAudio": ["StableAudio3"],
    "HunyuanDiT": ["HunyuanDiT1"],
    "HunyuanVideo15": ["HunyuanVideo15_SR_Distilled"],
    "HunyuanImage21": ["HunyuanImage21Refiner"],
    "HunyuanVideo": ["HunyuanVideoSkyreelsI2V", "HunyuanVideoI2V"],
    "CosmosT2V": ["CosmosI2V"],
    "CosmosT2IPredict2": ["CosmosI2VPredict2"],
    "WAN21_T2V": ["WAN21_FunControl2V", "WAN21_FlowRVS"],
    "Hunyuan3Dv2": ["Hunyuan3Dv2mini"],
    "Kandinsky5": ["Kandinsky5Image"],
    "CogVideoX_T2V": ["CogVideoX_Inpaint", "CogVideoX_I2V"],
}
NOT_RUN = {"MiniMaxMusic3": "one size alone"}
# share of the weights that become 4-bit, where it is less than 0.8, and why
LITTLE = {
    "ACEStep": (0.58, "its feed-forward layers are convolutions"),
    "ACEStep15": (0.65, "its encoders of lyrics and timbre are kept"),
}


def test_every_class_of_comfyui_is_listed():
    listed = {*full_size_models.SIZES, *NO_TRANSFORMER, *sum(STAND_FOR.values(), [])}
    # a newer ComfyUI has more, and they have the universal plan
    assert {cls.__name__ for cls in comfy.supported_models.models} - listed <= set()


@pytest.fixture(scope="module")
def found():
    """Class → (shapes, linears), each built once."""
    known: dict = {}

    def of(name: str):
        if name not in known:
            known[name] = full_size_models.build(name)
        return known[name]

    return of


@pytest.mark.parametrize("name", full_size_models.SIZES)
def test_a_model_of_published_size_has_a_sensible_plan(found, name):
    shapes, linears = found(name)
    layers = plan(shapes, recognise(shapes, name), FAST, name)
    changed = [layer for layer in layers if layer.action != "keep"]
    assert {layer.name for layer in changed} <= linears
    assert all(layer.columns % GROUP == 0 and layer.columns < 1.02 * layer.K for layer in changed)
    share = sum(layer.N * layer.K for layer in changed) / sum(map(math.prod, shapes.values()))
    assert share >= LITTLE.get(name, (0.8,))[0]
    ends = ("final_layer", "proj_out", "x_embedder", "img_in", "patch_embed")
    assert not [
        layer.name
        for layer in changed
        if layer.name.split(".")[0] in ends and layer.action == "w4a4"
    ]


# what adds sound and faces to Wan: layers that read the video's tokens, and those that read a few
# tokens a frame; how many of them there are
ADAPTERS = {
    "WAN21_HuMo": {"blocks.*.audio_cross_attn_wrapper.audio_cross_attn.[qkvo]": ("w4a4", 160)},
    "WAN22_S2V": {
        "audio_injector.injector.*.[qo]": ("w4a4", 24),
        "audio_injector.injector.*.[kv]": ("w4a16", 24),
        "audio_injector.injector_adain_layers.*": ("w4a16", 12),
    },
    "WAN22_WanDancer": {
        "music_injector.injector.*.[qo]": ("w4a4", 16),
        "music_injector.injector.*.[kv]": ("w4a16", 16),
    },
    "WAN22_Animate": {
        "face_adapter.fuser_blocks.*.linear1_q": ("w4a4", 8),
        "face_adapter.fuser_blocks.*.linear2": ("w4a4", 8),
        "face_adapter.fuser_blocks.*.linear1_kv": ("w4a16", 8),
    },
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_sound_and_faces_reach_the_video_through_4_bit_layers(found, name):
    shapes, _ = found(name)
    layers = plan(shapes, recognise(shapes, name), FAST, name)
    for pattern, (action, count) in ADAPTERS[name].items():
        theirs = [layer.action for layer in layers if fnmatchcase(layer.name, pattern)]
        assert theirs == [action] * count, pattern


@pytest.mark.parametrize("name", full_size_models.SIZES)
def test_comfyui_recognises_the_4_bit_file_of_published_size(found, name):
    shapes, _ = found(name)
    layers = plan(shapes, recognise(shapes, name), FAST, name)
    meta = torch.device("meta")
    before = {key: torch.empty(shape, device=meta) for key, shape in shapes.items()}
    after = {
        spec.name: torch.empty(spec.shape, device=meta, dtype=spec.dtype)
        for spec in layout(shapes, layers, FAST.rank)
    }
    detect = comfy.model_detection.detect_unet_config
    assert detect(after, "") == detect(before, "")


def page_rows() -> dict[str, list[str]]:
    """Class → its cells from the plan on."""
    page = Path(architectures.__file__).parents[2] / "docs" / "models.md"
    rows = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 10 and (cls := re.fullmatch(r"`(\w+)`", cells[1])):
            rows[cls[1]] = cells[2:]
    return rows


def test_the_page_says_what_the_walk_found(found):
    rows = page_rows()
    drawn = {family.config for family in tiny_models.FAMILIES.values()}
    for name in full_size_models.SIZES:
        shapes, _ = found(name)
        guessed = recognise(shapes, name).guessed
        report = predict(shapes, FAST, name)
        sizes = [f"{size / 1e9:.1f} GB" for size in (report.bytes_before, report.bytes_after)]
        run = "yes" if name in drawn else NOT_RUN[name]
        assert rows[name][:4] == ["guessed" if guessed else "own", *sizes, run], name


def test_the_page_says_what_else_each_family_can():
    """As the walks of the other methods hold it."""
    rows, words = page_rows(), {"step": "steps", "blocks": "blocks", "sublayer": "parts"}
    told: dict[str, list[str]] = {}
    for name, family in tiny_models.FAMILIES.items():
        trained = "converted" if name in NOT_TRAINED else "yes"
        caf = "no" if name in NO_CAF else "yes"
        cache = words[level_of(tiny_models.build(name))]
        told.setdefault(family.config, ["yes", cache, trained, caf])
    for cls, cells in rows.items():
        assert cells[4:] == told.get(cls, ["–"] * 4), cls


# ---- tiny models, run


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    class_walk.widen(monkeypatch)


@pytest.mark.parametrize("name", class_walk.EVERY)
def test_a_tiny_model_is_quantized_loaded_and_draws(name, tmp_path, monkeypatch):
    dense = tiny_models.build(name)
    source = StateDictSource(class_walk.state(dense))
    report = SVDQuantJob.prepare(source, tmp_path / "made.safetensors", class_walk.TINY).write()
    assert open_quantized(tmp_path / "made.safetensors").layers
    quantized = class_walk.load(name, tmp_path / "made.safetensors", monkeypatch)
    assert relative(draw(quantized, name), draw(dense, name)) < 0.6
    guessed = any(architectures.GUESSED == note for note in report.notes)
    assert guessed == (report.architecture == universal_plan.NAME)


@pytest.mark.parametrize("name", class_walk.EVERY)
def test_a_tiny_model_of_codewords_is_loaded_and_draws(name, tmp_path, monkeypatch):
    """VQ at 3 bits: the picture is nearer to that of 16 bit than a model of other weights draws."""
    path = class_walk.quantized(name, tmp_path, "vq")
    file = open_quantized(path)
    assert file.layers
    assert {layer["format"] for layer in file.layers.values()} == {"vq"}
    dense = tiny_models.build(name)
    plain, other = draw(dense, name), draw(tiny_models.build(name, seed=1), name)
    error = relative(draw(class_walk.load(name, path, monkeypatch), name), plain)
    # 3 bits are few for the tiny Krea 2: 0.54
    assert error < (0.6 if name == "krea 2" else 0.5) * relative(other, plain)


# some of the families that have 4-bit modulation layers
IN_RAM = {"flux", "minimax h3", "lens", "joyimage", "ace-step 1.5", "triposplat"}


@pytest.mark.parametrize("name", class_walk.EVERY)
def test_modulation_in_ram_gives_the_same_picture(name, tmp_path, monkeypatch):
    path = class_walk.quantized(name, tmp_path)
    in_vram = class_walk.load(name, path, monkeypatch)
    in_ram = class_walk.load(name, path, monkeypatch, modulation_in="ram")
    assert loading.ram_kept(in_ram) or name not in IN_RAM
    assert relative(draw(in_ram, name), draw(in_vram, name)) < 1e-5
