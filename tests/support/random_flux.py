"""A random FLUX with a guidance embedder, small enough to quantize in a test."""

from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, CONTEXT = 128, 64
# the smallest, as diffusers names its sizes
IN_DIFFUSERS = dict(
    patch_size=1,
    in_channels=64,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=128,
    num_attention_heads=1,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    guidance_embeds=True,
)


def flux_shapes(
    hidden: int = HIDDEN, double: int = 1, single: int = 2, context: int = CONTEXT
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a FLUX with a guidance embedder, as Black Forest Labs names them."""
    mlp = 4 * hidden
    linears = {
        "img_in": (hidden, 64),
        "txt_in": (hidden, context),
        "final_layer.linear": (64, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }
    for name, width in {"time_in": 256, "guidance_in": 256, "vector_in": context}.items():
        linears |= {f"{name}.in_layer": (hidden, width), f"{name}.out_layer": (hidden, hidden)}
    norms = []
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            linears |= {
                f"{block}_mod.lin": (6 * hidden, hidden),
                f"{block}_attn.qkv": (3 * hidden, hidden),
                f"{block}_attn.proj": (hidden, hidden),
                f"{block}_mlp.0": (mlp, hidden),
                f"{block}_mlp.2": (hidden, mlp),
            }
            norms += [f"{block}_attn.norm.query_norm.scale", f"{block}_attn.norm.key_norm.scale"]
    for i in range(single):
        block = f"single_blocks.{i}"
        linears |= {
            f"{block}.modulation.lin": (3 * hidden, hidden),
            f"{block}.linear1": (3 * hidden + mlp, hidden),
            f"{block}.linear2": (hidden, hidden + mlp),
        }
        norms += [f"{block}.norm.query_norm.scale", f"{block}.norm.key_norm.scale"]
    shapes = {f"{name}.weight": shape for name, shape in linears.items()} | {
        f"{name}.bias": shape[:1] for name, shape in linears.items()
    }
    return shapes | {name: (128,) for name in norms}


def flux_state(seed: int = 0, **sizes) -> dict[str, torch.Tensor]:
    """Random bfloat16 weights of that FLUX, scaled so that signals neither die nor grow."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name, shape):
        if name.endswith("scale"):
            return torch.ones(shape)
        return torch.randn(shape, generator=generator) * (
            0.02 if len(shape) == 1 else 0.7 / shape[1] ** 0.5
        )

    return {name: draw(name, shape).bfloat16() for name, shape in flux_shapes(**sizes).items()}


def write(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file of random bfloat16 weights of these shapes."""
    generator = torch.Generator().manual_seed(0)
    save_file(
        {
            name: (torch.randn(shape, generator=generator) * 0.05).bfloat16()
            for name, shape in shapes.items()
        },
        path,
    )
    return path


def quantize(source: Path, name: str, **options) -> Path:
    """A 4-bit file beside the source, made by the pipeline."""
    from nibble.quant.svdquant.quantize import quantize_checkpoint
    from nibble.quant.svdquant.recipe import Recipe

    quantize_checkpoint(
        source, source.with_name(name), Recipe.from_preset("fast", rank=16, solver="svd", **options)
    )
    return source.with_name(name)
