"""A damaged LoRA is refused in one sentence with its name when it is converted."""

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from flux_loras import MLP, assert_untouched, bits, lora_file
from intlora_runs import STYLE, converted
from nibble.nodes.bridge.intlora import files
from nibble.quant.files.errors import FileRefused

STEM = "lora_unet_" + MLP.replace(".", "_")
DAMAGES = {
    "no down": {f"{STEM}.lora_down.weight": None},
    "an alpha of two numbers": {f"{STEM}.alpha": torch.ones(2)},
    "an infinite alpha": {f"{STEM}.alpha": torch.tensor(float("inf"))},
    "NaN": {f"{STEM}.lora_up.weight": torch.full((512, 4), float("nan"))},
    "flat factors": {f"{STEM}.lora_up.weight": torch.ones(512)},
    "factors of other ranks": {f"{STEM}.lora_up.weight": torch.ones(512, 3)},
    "whole numbers of another width": {f"{STEM}.lora_down.weight": torch.ones(4, 7).int()},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """ComfyUI's LoRA folder, and the IntLoRA folder beside it, both empty."""
    for kind in (files.LORAS, files.FOLDER):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"})
        )
        folder_paths.filename_list_cache.pop(kind, None)
    yield tmp_path
    for kind in (files.LORAS, files.FOLDER):
        folder_paths.filename_list_cache.pop(kind, None)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_lora_is_refused_by_name_and_leaves_nothing(model, folder, damage):
    tensors = lora_file(model) | DAMAGES[damage]
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / files.LORAS / STYLE)
    before = bits(model)
    with pytest.raises(FileRefused, match=STYLE) as refusal:
        converted(model)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).endswith(".")
    assert not list((folder / files.FOLDER).iterdir())
    assert_untouched(model, before)
