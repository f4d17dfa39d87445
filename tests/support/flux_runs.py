"""The tests' FLUX loaded, run once, and sampled by ComfyUI."""

import comfy.model_management
import comfy.samplers
import torch


def run(patcher, seed: int = 0) -> torch.Tensor:
    """The diffusion model's output for a fixed random input."""
    draw = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=draw) for shape in ((1, 16, 8, 8), (1, 6, 64), (1, 64))]
    network = patcher.model.diffusion_model
    dtype = patcher.model.get_dtype()
    with torch.no_grad():
        x, context, y = (tensor.to(dtype) for tensor in inputs)
        return network(
            x,
            torch.tensor([0.6], dtype=dtype),
            context=context,
            y=y,
            guidance=torch.tensor([3.5], dtype=dtype),
        ).float()


def decibels(exact: torch.Tensor, other: torch.Tensor) -> float:
    return float(10 * torch.log10(exact.square().mean() / (exact - other).square().mean()))


def loaded(patcher):
    comfy.model_management.load_models_gpu([patcher])
    return patcher


def sampled(patcher) -> torch.Tensor:
    """Two steps of ComfyUI's own sampler."""
    import comfy.samplers

    draw = torch.Generator().manual_seed(0)
    guider = comfy.samplers.CFGGuider(patcher)
    guider.inner_set_conds(
        {
            "positive": [
                [
                    torch.randn(1, 6, 64, generator=draw),
                    {"pooled_output": torch.randn(1, 64, generator=draw)},
                ]
            ]
        }
    )
    noise = torch.randn(1, 16, 8, 8, generator=draw)
    sampler, sigmas = comfy.samplers.sampler_object("euler"), torch.tensor([1.0, 0.6, 0.0])
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True)


def little_for_weights(device=None, torch_free_too=False):
    """Free memory as ComfyUI asks for it: 1 MB for models, plenty for attention (which asks for
    both numbers).
    """
    return (8 << 30, 8 << 30) if torch_free_too else 1 << 20
