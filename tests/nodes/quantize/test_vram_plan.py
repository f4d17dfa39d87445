"""The plan's arithmetic beside ComfyUI's own, and the node."""

import types

import comfy.model_base
import comfy.model_management as management
import comfy.supported_models
import pytest
import torch

import full_size_models
import published_sizes
from nibble.nodes.bridge.host import charts
from nibble.nodes.bridge.quantize import vram_plan
from nibble.nodes.bridge.quantized import loading
from nibble.nodes.vram import NibbleVRAMPlan
from nibble.quant.cli.plan import model
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.memory import comfyui, published
from nibble.quant.files.memory.comfyui import GIB
from nibble.quant.files.memory.decoders import KINDS, decoder_of
from nibble.quant.files.memory.published import sampler_of

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", full_size_models.SIZES)
def test_every_class_has_comfyuis_own_factor_and_latent(name):
    shapes, _ = full_size_models.build(name)
    try:
        found = sampler_of(shapes, name)
    except FileRefused:
        latent = published_sizes.config_of(name).latent_format
        assert latent.latent_dimensions == 1 or name in ("ACEStep", "TripoSplat")
        return
    facts = published_sizes.facts(name)
    assert found.factor == pytest.approx(facts["factor"], rel=1e-9)
    assert list(found.ratios) == facts["ratios"]
    assert found.known


@pytest.mark.parametrize("name", published.models())
def test_published_sizes_are_those_of_comfyuis_classes(name):
    """Run tests/support/published_sizes.py where a plan of layers has changed."""
    row = published.models()[name]
    assert {key: row[key] for key in published_sizes.sizes(row["class"])} == published_sizes.sizes(
        row["class"]
    )


def test_published_encoders_and_vaes_are_comfyuis():
    assert published.encoders() == published_sizes.encoders()
    assert published.vaes() == published_sizes.vaes()


@pytest.mark.parametrize("name", published_sizes.VAES)
@pytest.mark.parametrize("frames, size", [(1, (1024, 768)), (81, (832, 480))])
def test_decoding_takes_what_comfyui_says(name, frames, size):
    vae = published_sizes.vae(name)
    decoder = decoder_of(published_sizes.VAES[name])
    assert decoder is KINDS[name]
    spatial, temporal = decoder.ratios
    latent = comfyui.latent_frames(frames, temporal)
    shape = [1, vae.latent_channels, latent, size[1] // spatial, size[0] // spatial]
    if vae.latent_dim == 2:
        del shape[2]
    wanted = vae.memory_used_decode(tuple(shape), torch.bfloat16)
    assert decoder.bytes(latent, size, 2) == int(wanted)
    tile = 512 // spatial
    if decoder.is_video:
        bounded = vae._tile_bounded_shape(shape, tile, tile, max(2, 64 // temporal))
    else:
        bounded = vae._tile_bounded_shape(shape, tile, tile, None)
    wanted = vae.memory_used_decode(bounded, torch.bfloat16)
    assert decoder.tiled(latent, size, 2) == int(wanted)


@pytest.mark.parametrize("factor, shape", [(3.1, [1, 16, 128, 128]), (1.8, [2, 16, 21, 60, 104])])
def test_a_step_takes_what_comfyui_says_of_a_gpu_with_flash_attention(monkeypatch, factor, shape):
    monkeypatch.setattr(management, "pytorch_attention_flash_attention", lambda: True)
    asked = types.SimpleNamespace(
        memory_usage_factor=factor,
        memory_usage_factor_conds=(),
        get_dtype_inference=lambda: torch.bfloat16,
    )
    wanted = comfy.model_base.BaseModel.memory_required(asked, shape)
    area = shape[0] * torch.Size(shape[2:]).numel()
    assert comfyui.sampling(factor, area, 2) == int(wanted)


class Large:
    """What `load_models_gpu` asks of a model patcher."""

    size = 20 * GIB
    load_device = CUDA
    model = None

    def model_patches_models(self):
        return []

    def is_dynamic(self):
        return False

    def is_clone(self, other):
        return False


class Loaded:
    """Stands for a model in `load_models_gpu`; remembers what of it was to be loaded."""

    asked = None

    def __init__(self, model):
        self.model, self.device, self.currently_used = model, CUDA, True

    def model_memory_required(self, device):
        return self.model.size

    def model_memory(self):
        return self.model.size

    def model_loaded_memory(self):
        return 0

    def model_load(self, lowvram_model_memory=0, force_patch_weights=False):
        Loaded.asked = lowvram_model_memory


@pytest.mark.parametrize("free", [4 * GIB, 7 * GIB, 11 * GIB])
@pytest.mark.parametrize("needed", [0, GIB, 6 * GIB])
def test_comfyui_loads_as_much_of_a_model_as_the_plan_says(monkeypatch, free, needed):
    patched = {
        "get_free_memory": lambda *_, **__: free,
        "free_memory": lambda *_, **__: [],
        "is_device_cpu": lambda _: False,
        "vram_state": management.VRAMState.NORMAL_VRAM,
        "lowvram_available": True,
        "LoadedModel": Loaded,
        "current_loaded_models": [],
        "EXTRA_RESERVED_VRAM": comfyui.RESERVE,
        "cleanup_models_gc": lambda: None,
    }
    for name, value in patched.items():
        monkeypatch.setattr(management, name, value)
    management.load_models_gpu([Large()], memory_required=needed, minimum_memory_required=needed)
    assert comfyui.loaded(Large.size, free, needed) == pytest.approx(Loaded.asked, abs=1)


# ---- the loaders' chart


def test_a_loaders_chart_and_the_plan_have_one_source(quantized_file):
    loaded = loading.load(quantized_file)
    weights, step = loading.vram_needed(loaded)
    assert weights == loaded.model_size()
    assert step == comfyui.sampling(loaded.model.memory_usage_factor, 128 * 128, 2)
    label, text = charts.vram_line((weights, step), torch.device("cpu"))
    assert label == "VRAM"
    assert text.startswith("about 1.07 GB on a graphics card: ")


def test_modulation_in_ram_is_counted_as_the_loader_keeps_it(quantized_file):
    planned = model(str(quantized_file))
    kept = loading.load(quantized_file, dtype="bf16", modulation_in="ram")
    # the layers' JSON is counted there
    assert loading.ram_kept(kept) == pytest.approx(planned.modulation, rel=0.05)
    sigmas = management.module_size(kept.model.model_sampling)
    assert kept.model_size() - sigmas == pytest.approx(planned.bytes - planned.modulation, rel=0.01)


# ---- the node


def shown(**inputs) -> dict:
    defaults = dict(
        card="8 GB",
        model_name=f"flux1-dev{vram_plan.NOT_HERE}",
        text_encoder=vram_plan.AS_PUBLISHED,
        vae=vram_plan.AS_PUBLISHED,
        width=1024,
        height=1024,
    )
    return NibbleVRAMPlan.execute(**(defaults | inputs)).ui[charts.KEY][0]


def test_the_node_draws_the_stages_of_a_published_model():
    chart = shown()
    assert chart["kind"] == "memory"
    assert [stage["name"] for stage in chart["stages"]] == ["encode", "sample", "decode"]
    assert chart["verdict"] == "fits, with 3 of the switches"
    assert all(set(part) == {"label", "bytes", "kind"} for part in chart["stages"][0]["card"])
    assert all(stage["before"] >= 4e9 for stage in chart["stages"])


def test_the_node_plans_files_of_the_folders(folder, quantized_file):
    (folder / "made.safetensors").write_bytes(quantized_file.read_bytes())
    chart = shown(model_name="made.safetensors", text_encoder=vram_plan.NONE, vae=vram_plan.NONE)
    assert [stage["name"] for stage in chart["stages"]] == ["sample"]
    assert chart["verdict"] == "fits as it is"
    assert chart["stages"][0]["card"][0]["label"] == "made.safetensors"
    assert "flux.safetensors" in vram_plan.model_names()


def test_a_cpu_has_no_card():
    assert shown(card="cpu", ram_gb=64)["card"] is None
    assert vram_plan.card_of(vram_plan.THIS) is None  # of this test's process
    assert vram_plan.ram_of(0) > 1e9


def test_a_name_that_is_gone_is_refused():
    with pytest.raises(FileRefused, match="not in ComfyUI's loras folder; put it there"):
        shown(loras="gone.safetensors")
    with pytest.raises(FileRefused, match="gone.safetensors"):
        shown(model_name="gone.safetensors")
