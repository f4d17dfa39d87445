"""Stock ModelSave of a low-bit model with patches: the file gives the picture that was saved, for
every kind of patch and every format.
"""

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapter_tensors import sampled, tensors_of, with_file
from flux_runs import decibels, little_for_weights
from nibble.nodes.bridge.quantized import layouts, loading
from nibble.quant.files.errors import FileRefused
from nibble.quant.interop.convert import convert
from nibble.quant.interop.opening import open_4bit
from nibble.quant.weights.base import tensor_json
from published_files import RandomFlux, random_linear

# one of every kind of layer: signed and unsigned inputs, two kinds of inputs, modulation, 16 bit
LAYERS = [
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.txt_mlp.2",
    "single_blocks.0.linear2",
    "double_blocks.0.img_mod.lin",
    "single_blocks.1.modulation.lin",
    "txt_in",
]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def adapter(kind):
    def patched(model):
        tensors = {}
        for name in LAYERS:
            shape = model.model.diffusion_model.get_submodule(name).weight.shape
            tensors |= tensors_of(kind, *shape, stem="lora_unet_" + name.replace(".", "_"))
        return with_file(model, tensors)

    return patched


def difference(part):
    def patched(model):
        tensors = {}
        for name in LAYERS:
            shape = getattr(model.model.diffusion_model.get_submodule(name), part).shape
            stem = "lora_unet_" + name.replace(".", "_")
            tensors[f"{stem}.{'diff' if part == 'weight' else 'diff_b'}"] = drawn(*shape)
        return comfy.sd.load_lora_for_models(model, None, tensors, 0.8, 0)[0]

    return patched


def stacked(model):
    return difference("bias")(adapter("lora")(adapter("dora lora")(model)))


PATCHES = {
    "none": lambda model: model,
    "LoRA": adapter("lora"),
    "DoRA": adapter("dora lora"),
    "LoHa": adapter("loha"),
    "LoKr": adapter("lokr"),
    "OFT": adapter("oft"),
    "difference": difference("weight"),
    "bias": difference("bias"),
    "DoRA, LoRA and bias": stacked,
}
FORMS = ["unsigned", "rotated", "in RAM", "table", "codewords", "nunchaku", "kitchen"]


@pytest.fixture(scope="session")
def files(quantized_file, rotated_file, table_file, codeword_file, tmp_path_factory):
    flux, folder = RandomFlux(), tmp_path_factory.mktemp("published")
    blocks, others = flux.nunchaku(modern=True)
    save_file(blocks | others, folder / "nunchaku.safetensors")
    save_file(flux.nibble(), folder / "kitchen.safetensors")
    return {
        "unsigned": quantized_file,
        "in RAM": quantized_file,
        "rotated": rotated_file,
        "table": table_file,
        "codewords": codeword_file,
        "nunchaku": folder / "nunchaku.safetensors",
        "kitchen": folder / "kitchen.safetensors",
    }


def opened(files, form):
    return loading.load(files[form], modulation_in="ram" if form == "in RAM" else "vram")


def saved(model, path):
    comfy.sd.save_checkpoint(str(path), model, metadata={"prompt": "{}"})
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", PATCHES)
def test_the_saved_file_gives_the_picture_that_was_saved(files, tmp_path, form, kind):
    base = opened(files, form)
    model = PATCHES[kind](base)
    picture = sampled(model)
    path = saved(model, tmp_path / "saved.safetensors")
    again = loading.load(path)
    assert torch.equal(sampled(again), picture)
    if kind != "none":
        assert not torch.equal(sampled(base), picture)
        assert torch.equal(sampled(again), picture)


def test_saving_before_sampling_keeps_the_patches(files, tmp_path):
    model = PATCHES["DoRA, LoRA and bias"](opened(files, "unsigned"))
    path = saved(model, tmp_path / "saved.safetensors")
    assert decibels(sampled(model), sampled(loading.load(path))) > 50


@pytest.mark.parametrize("kind", ["none", "DoRA, LoRA and bias"])
def test_a_model_that_is_streamed_is_refused_before_anything_is_written(
    files, tmp_path, monkeypatch, kind
):
    """ComfyUI saves such weights one by one, and floating-point ones only."""
    model = PATCHES[kind](opened(files, "unsigned"))
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(
        comfy.model_management, "vram_state", comfy.model_management.VRAMState.LOW_VRAM
    )
    monkeypatch.setattr(comfy.model_management, "get_free_memory", little_for_weights)
    with pytest.raises(ValueError, match="Use Merge and Save"):
        saved(model, tmp_path / "saved.safetensors")
    comfy.model_management.unload_all_models()
    assert not list(tmp_path.iterdir())


def test_codewords_that_were_saved_are_listed_where_they_load(folder, files):
    saved(opened(files, "codewords"), folder / "saved-codewords.safetensors")
    saved(opened(files, "unsigned"), folder / "saved-4bit.safetensors")
    assert "saved-codewords.safetensors" in loading.quantized_files("vq")
    assert "saved-4bit.safetensors" in loading.quantized_files("svdquant")
    with pytest.raises(FileRefused, match="Load VQ Model"):
        loading.opened("saved-codewords.safetensors", "svdquant")


@pytest.mark.parametrize("target", ["nibble", "nunchaku"])
def test_a_patch_beside_a_layer_is_refused_where_a_format_has_no_place_for_it(
    files, tmp_path, target
):
    path = saved(PATCHES["DoRA"](opened(files, "unsigned")), tmp_path / "saved.safetensors")
    with pytest.raises(FileRefused, match="saved with a LoRA beside"):
        convert(path, tmp_path / "other.safetensors", target)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.safetensors"]


def test_a_tensor_of_a_layer_that_is_not_known_is_refused(files, tmp_path):
    path = saved(opened(files, "unsigned"), tmp_path / "saved.safetensors")
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("img_mlp.0.weight_scale"))
    save_file(tensors | {f"{name}_of_tomorrow": torch.zeros(3)}, tmp_path / "new.safetensors")
    with pytest.raises(FileRefused, match="weight_scale_of_tomorrow, which this Nibble does not"):
        open_4bit(tmp_path / "new.safetensors")


@pytest.mark.parametrize("rotation", [0, 64])
def test_a_signed_layer_behind_a_gelu_says_so(rotation):
    """Where comfy-kitchen's files are silent, such a layer of Qwen-Image is taken for unsigned."""
    facts = {"format": "svdquant_w4a4", "rank": 16, "rotation": rotation}
    packed = layouts.pack(random_linear(128, 128, 0), facts, torch.bfloat16)
    assert tensor_json(layouts.settings_tensor(packed))["act_unsigned"] is False
