"""LoRAs of the tests' FLUX: files, what they add to each weight by hand, and what a layer then
computes.
"""

import comfy.sd
import torch

from nibble.kernels.reference import SHIFT

QKV, MLP, POST_GELU, MODULATION = (
    "double_blocks.0.img_attn.qkv",
    "double_blocks.0.img_mlp.0",
    "double_blocks.0.img_mlp.2",
    "double_blocks.0.img_mod.lin",
)


def pair(n: int, k: int, rank: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(up, down) of a LoRA that changes a layer's output by about a third."""
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, rank, generator=draw) * 0.3 / rank**0.5,
        torch.randn(rank, k, generator=draw) / k**0.5,
    )


def layer_of(model, name: str) -> torch.nn.Module:
    return model.model.diffusion_model.get_submodule(name)


def lora_file(model, alpha: float = 2.0, seed: int = 0) -> dict[str, torch.Tensor]:
    """LoRA tensors under kohya's names for whole layers, and under diffusers' for the k part of the
    fused qkv.
    """
    tensors = {}
    for i, name in enumerate((MLP, POST_GELU, MODULATION)):
        up, down = pair(*layer_of(model, name).weight.shape, seed=seed + i)
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= {
            f"{stem}.lora_up.weight": up,
            f"{stem}.lora_down.weight": down,
            f"{stem}.alpha": torch.tensor(alpha),
        }
    up, down = pair(128, 128, seed=seed + 9)
    stem = "transformer.transformer_blocks.0.attn.to_k"
    return tensors | {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down}


def changes(tensors: dict, strength: float) -> dict[str, torch.Tensor]:
    """What that file adds to each layer's weight, computed by hand."""
    out = {}
    for name in (MLP, POST_GELU, MODULATION):
        stem = "lora_unet_" + name.replace(".", "_")
        up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
        out[name] = strength * tensors[f"{stem}.alpha"] / down.shape[0] * up @ down
    stem = "transformer.transformer_blocks.0.attn.to_k"
    out[QKV] = torch.zeros(384, 128)
    out[QKV][128:256] = (
        strength * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]
    )
    return out


def with_lora(model, tensors, strength: float = 0.8):
    """As the stock Load LoRA node does it."""
    return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]


def inputs(model, name: str, exact: bool) -> torch.Tensor:
    """Random inputs of a layer; exact: such as its activations hold without rounding."""
    linear, draw = layer_of(model, name), torch.Generator().manual_seed(3)
    shape, params = (1, 7, linear.in_features), linear.weight.params
    if not exact or name == MODULATION:
        return torch.randn(shape, generator=draw)
    lowest, highest = -7, 7
    if params.act_bits == 8:
        lowest, highest = -127, 127  # whatever their signs
    elif params.act_unsigned:
        lowest, highest = 0, 15
    codes = torch.randint(lowest, highest + 1, shape, generator=draw)
    codes[..., ::64] = highest
    return codes * params.smooth_factor.float() * 0.25 - (SHIFT if params.act_unsigned else 0)


def outputs(model, exact: bool = False) -> dict[str, torch.Tensor]:
    """Each patched layer's output for a fixed input."""
    out = {}
    for name in (QKV, MLP, POST_GELU, MODULATION):
        x = inputs(model, name, exact)
        with torch.no_grad():
            out[name] = (x, layer_of(model, name)(x))
    return out


def assert_changed_by(before, after, expected, tolerance):
    for name, delta in expected.items():
        x, y = before[name]
        wanted = x @ delta.T
        error = (after[name][1] - y - wanted).norm() / wanted.norm()
        assert error < tolerance, f"{name}: {error}"


def bits(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def assert_untouched(model, before):
    after = model.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
