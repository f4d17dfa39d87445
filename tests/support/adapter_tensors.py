"""Small adapter files of one layer of the tests' FLUX, of every kind that ComfyUI reads, and the
model with them.
"""

import comfy.lora_convert
import comfy.model_management
import comfy.samplers
import comfy.sd
import torch

from nibble.nodes.bridge.quantized import layouts, lora, patches

NAME = "double_blocks.0.img_mlp.0"
STEM = "lora_unet_" + NAME.replace(".", "_")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed + 7 * len(shape) + sum(shape))
    )


def tensors_of(
    kind: str, n: int, k: int, stem: str = STEM, seed: int = 0
) -> dict[str, torch.Tensor]:
    """A small adapter file of one layer."""
    a, b = normal(n, 4, seed=seed) * 0.15, normal(4, k, seed=seed) / k**0.5
    found = {
        "lora": {"lora_up.weight": a, "lora_down.weight": b, "alpha": torch.tensor(2.0)},
        "loha": {
            "hada_w1_a": a,
            "hada_w1_b": b * 8,
            "hada_w2_a": normal(n, 3, seed=seed + 1) * 0.1,
            "hada_w2_b": normal(3, k, seed=seed + 1),
            "alpha": torch.tensor(2.0),
        },
        "lokr": {
            "lokr_w1": normal(4, 4, seed=seed) * 0.1,
            "lokr_w2_a": normal(n // 4, 2, seed=seed) * 0.1,
            "lokr_w2_b": normal(2, k // 4, seed=seed),
            "alpha": torch.tensor(1.0),
        },
        "lokr of one matrix": {
            "lokr_w1": normal(n // 8, k // 16, seed=seed) * 0.1,
            "lokr_w2": normal(8, 1, seed=seed) @ normal(1, 16, seed=seed) * 0.1,
            "alpha": torch.tensor(9.0),
        },
        "oft": {"oft_blocks": normal(n // 8, 8, 8, seed=seed) * 0.1, "alpha": torch.tensor(1e-3)},
        "boft": {
            "oft_blocks": normal(2, n // 8, 8, 8, seed=seed) * 0.1,
            "alpha": torch.tensor(1e-3),
        },
        "glora": {
            "a1.weight": normal(k, 4, seed=seed) * 0.1,
            "a2.weight": normal(4, k, seed=seed) * 0.1,
            "b1.weight": normal(n, 4, seed=seed) * 0.1,
            "b2.weight": normal(4, k, seed=seed) * 0.1,
        },
    }
    scale = (
        {"dora_scale": torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) + 0.5}
        if kind.startswith("dora ")
        else {}
    )
    return {
        f"{stem}.{name}": tensor
        for name, tensor in (found[kind.removeprefix("dora ")] | scale).items()
    }


def layer(model, name: str = NAME):
    return model.model.diffusion_model.get_submodule(name)


def with_file(model, tensors: dict, strength: float = 0.8):
    return comfy.sd.load_lora_for_models(
        model, None, comfy.lora_convert.convert_lora(tensors), strength, 0
    )[0]


def whole_load(patcher) -> None:
    """As a sampler has a model loaded."""
    lora.plan_patches(lambda model: comfy.model_management.load_models_gpu([model]), patcher)


def effective(linear) -> torch.Tensor:
    return layouts.effective_weight(linear.weight)


EXACT, CUT = 1e-5, 1.1 * patches.ENERGY**0.5
KINDS = {
    "lora": EXACT,
    "dora lora": EXACT,
    "loha": CUT,
    "dora loha": CUT,
    "lokr": CUT,
    "dora lokr": CUT,
    "lokr of one matrix": CUT,
}


def sampled(patcher, positive: dict | None = None, seed: int = 0) -> torch.Tensor:
    """Four steps of ComfyUI's own sampler."""
    draw = torch.Generator().manual_seed(seed)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.inner_set_conds(
        {
            "positive": [
                [
                    torch.randn(1, 6, 64, generator=draw),
                    {"pooled_output": torch.randn(1, 64, generator=draw)} | (positive or {}),
                ]
            ]
        }
    )
    noise = torch.randn(1, 16, 8, 8, generator=draw)
    sampler, sigmas = (
        comfy.samplers.sampler_object("euler"),
        torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0]),
    )
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)
