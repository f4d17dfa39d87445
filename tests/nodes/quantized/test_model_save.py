"""Stock ModelSave of a low-bit model with patches: the file gives the picture that was saved, for
every kind of patch and every format.
"""

import comfy.hooks
import comfy.model_management
import comfy.sd
import pytest
import torch

from adapter_tensors import sampled, tensors_of, with_file
from nibble.nodes.bridge.quantized import loading
from published_files import RandomFlux

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
    "DoRA on LoKr": adapter("dora lokr"),
    "OFT": adapter("oft"),
    "GLoRA": adapter("glora"),
    "difference": difference("weight"),
    "bias": difference("bias"),
    "DoRA, LoRA and bias": stacked,
}
FORMS = ["unsigned", "rotated", "in RAM", "codewords", "nunchaku", "kitchen"]


@pytest.fixture(scope="session")
def files(quantized_file, rotated_file, codeword_file, tmp_path_factory):
    from safetensors.torch import save_file

    flux, folder = RandomFlux(), tmp_path_factory.mktemp("published")
    blocks, others = flux.nunchaku(modern=True)
    save_file(blocks | others, folder / "nunchaku.safetensors")
    save_file(flux.nibble(), folder / "kitchen.safetensors")
    return {
        "unsigned": quantized_file,
        "in RAM": quantized_file,
        "rotated": rotated_file,
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
