"""LoRA on a 4-bit text encoder that ComfyUI loads whole: its own factors, nothing decomposed."""

import shutil

import comfy.hooks
import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch

import nodes
import small_encoders as small
from dequantized_files import dequantized
from nibble.nodes.bridge.quantized import encoders, layouts, lora, patches
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe

RECIPES = {
    "w4a16": Recipe.from_preset("fast"),
    "w4a8": Recipe.from_preset("fast", format="svdquant_w4a8", rank=0),
}
WO = "encoder.block.1.layer.1.DenseReluDense.wo"
RANK = 4


@pytest.fixture(scope="module", params=RECIPES)
def path(request, tmp_path_factory):
    encoders.register()
    source = small.t5_file(tmp_path_factory.mktemp("encoders") / "t5.safetensors")
    target = source.with_name(f"t5-{request.param}.safetensors")
    quantize_checkpoint(source, target, RECIPES[request.param])
    return target


@pytest.fixture
def no_factorising(monkeypatch):
    for module, name in ((lora, "factors_of_lowest_rank"), (layouts, "effective_weight")):
        monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} was called"))


def file(rows: int = 128, columns: int = 256) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    name = f"text_encoders.t5xxl.transformer.{WO}"
    return {
        f"{name}.lora_up.weight": torch.randn(rows, RANK, generator=generator) * 0.3,
        f"{name}.lora_down.weight": torch.randn(RANK, columns, generator=generator) * 0.1,
        f"{name}.alpha": torch.tensor(2.0),
    }


def with_lora(clip, tensors: dict[str, torch.Tensor]):
    return comfy.sd.load_lora_for_models(None, clip, tensors, 0, 1.0)[1]


def weight(clip):
    return clip.cond_stage_model.t5xxl.transformer.get_submodule(WO).weight


def test_the_factors_are_the_files_own(path, no_factorising):
    """strength 1 · alpha 2 / rank 4 is 0.5 of up · down."""
    clip, tensors = small.opened(path), file()
    comfy.model_management.load_models_gpu([with_lora(clip, tensors).patcher])
    up, down = (tensor for name, tensor in tensors.items() if name.endswith("weight"))
    params = weight(clip).params
    assert params.proj_up.shape[1] == lora.pad_rank(up).shape[1]
    found = params.proj_up.float() @ params.proj_down.float().T
    expected = (up * 0.5) @ down
    assert (found - expected).norm() / expected.norm() < 8e-3  # the rounding of bfloat16


def test_it_does_what_it_does_in_16_bit_and_comes_off(path, no_factorising):
    whole, clip = small.t5(dequantized(path)), small.opened(path)
    before = small.conditioning(clip)
    expected, found = (small.conditioning(with_lora(c, file())) for c in (whole, clip))
    floor = 40 if "w4a16" in path.name else 24  # inputs of 8 bits
    assert small.db(expected, before) < 20  # it does something
    assert small.db(expected, found) > floor
    assert torch.equal(small.conditioning(clip), before)


def test_so_it_does_behind_the_stock_loader(path, tmp_path, monkeypatch, no_factorising):
    shutil.copy(path, tmp_path / "four.safetensors")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "text_encoders", ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop("text_encoders", None)
    with small.small_xxl():
        (clip,) = nodes.CLIPLoader().load_clip("four.safetensors", "sd3")
    before, found = (small.conditioning(c) for c in (clip, with_lora(clip, file())))
    assert small.db(found, before) < 30
    assert weight(clip).params.proj_up.shape[1] >= RANK


def test_two_loras_are_added(path, no_factorising):
    clip = small.opened(path)
    comfy.model_management.load_models_gpu([with_lora(with_lora(clip, file()), file()).patcher])
    up, down = (tensor for name, tensor in file().items() if name.endswith("weight"))
    params = weight(clip).params
    found = params.proj_up.float() @ params.proj_down.float().T
    assert (found - up @ down).norm() / (up @ down).norm() < 8e-3


def test_a_hook_does_what_the_lora_does_and_comes_off(path, no_factorising):
    clip = small.opened(path)
    before, wanted = small.conditioning(clip), small.conditioning(with_lora(clip, file()))
    _, hooked, hooks = comfy.hooks.load_hook_lora_for_models(None, clip, file(), 0, 1.0)
    target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip)
    hooked.patcher.register_all_hook_patches(hooks, target)
    for _ in range(2):  # the second time from ComfyUI's cache of hooked weights
        hooked.patcher.forced_hooks = hooks
        assert small.db(wanted, small.conditioning(hooked)) > 40
        hooked.patcher.forced_hooks = None
        assert torch.equal(small.conditioning(hooked), before)


@pytest.mark.parametrize("kind", ["of another size", "not a number"])
def test_one_that_cannot_be_right_is_refused_in_words(path, kind):
    tensors, said = file(64), "made for another model"
    if kind == "not a number":
        tensors = {name: tensor * float("nan") for name, tensor in file().items()}
        said = WO
    with pytest.raises(patches.DoesNotFit, match=said):
        small.conditioning(with_lora(small.opened(path), tensors))
