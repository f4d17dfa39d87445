"""A stock LoRA on a 4-bit model of every family, SVDQuant's and of codewords: each layer changes by
what the file says, as on 16 bit, and is its old self without it.
"""

import comfy.lora
import pytest
import torch

import class_walk
import tiny_models
from adapter_tensors import whole_load
from class_walk import draw, relative
from nibble.nodes.bridge.quantized import layouts


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    class_walk.widen(monkeypatch)


def weights(model) -> dict[str, torch.Tensor]:
    return {
        name: (
            layouts.effective_weight(module.weight)
            if layouts.is_ours(module.weight)
            else module.weight.detach().float().clone()
        )
        for name, module in class_walk.linears(model).items()
    }


@pytest.mark.parametrize("method", ["svdquant", "vq"])
@pytest.mark.parametrize("name", class_walk.EVERY)
def test_a_lora_changes_every_layer_as_it_changes_16_bit(name, method, tmp_path, monkeypatch):
    sixteen = tiny_models.build(name)
    path = class_walk.quantized(name, tmp_path, method)
    model = class_walk.load(name, path, monkeypatch)
    named, wanted_names = (
        comfy.lora.model_lora_keys_unet(patcher.model, {}) for patcher in (model, sixteen)
    )
    assert wanted_names.items() <= named.items(), "whatever a trainer calls a layer"
    tensors = class_walk.lora_tensors(sixteen)
    whole_load(model)
    base, plain = weights(model), draw(model, name)
    worn = class_walk.with_lora(model, tensors)
    whole_load(worn)
    changed = weights(model)
    assert len(changed) == len(class_walk.linears(sixteen))
    for layer, before in base.items():
        key = f"diffusion_model.{layer}"
        wanted = tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
        error = (changed[layer] - before - wanted).norm() / wanted.norm()
        assert error < 6e-3, layer  # factors are kept in bfloat16
    drawn = draw(worn, name)
    of_16_bit = draw(class_walk.with_lora(sixteen, tensors), name)
    effect = relative(draw(sixteen, name), of_16_bit)
    # 3 bits are few for the tiny Krea 2: 0.68
    assert relative(drawn, of_16_bit) < (0.7 if name == "krea 2" else 0.6) * effect
    whole_load(model)
    assert all(torch.equal(before, weights(model)[layer]) for layer, before in base.items())
    assert relative(draw(model, name), plain) == 0
