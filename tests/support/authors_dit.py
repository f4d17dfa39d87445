"""DiT as its authors wrote it down (Peebles and Xie, 2023, arXiv:2212.09748, section 3): the names
and shapes of their files, and their forward pass, in a few lines.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, gelu, layer_norm, linear, silu

WIDTH, HEADS, DEPTH, CHANNELS, PATCH, SIDE, CLASSES = 128, 2, 2, 4, 2, 4, 10


def state(seed: int = 0) -> dict[str, Tensor]:
    """A random one of two blocks, on latents of 4 x 8 x 8."""
    generator = torch.Generator().manual_seed(seed)

    def layer(name: str, *shape: int) -> dict[str, Tensor]:
        inputs = torch.Size(shape[1:]).numel()
        return {
            f"{name}.weight": torch.randn(shape, generator=generator) * inputs**-0.5,
            f"{name}.bias": torch.randn(shape[0], generator=generator) * 0.1,
        }

    w, outputs = WIDTH, PATCH**2 * 2 * CHANNELS
    tensors = {"pos_embed": torch.randn(1, SIDE**2, w, generator=generator)}
    tensors |= layer("x_embedder.proj", w, CHANNELS, PATCH, PATCH)
    tensors |= layer("t_embedder.mlp.0", w, 256) | layer("t_embedder.mlp.2", w, w)
    table = torch.randn(CLASSES + 1, w, generator=generator)
    tensors["y_embedder.embedding_table.weight"] = table
    for i in range(DEPTH):
        block = f"blocks.{i}"
        tensors |= layer(f"{block}.attn.qkv", 3 * w, w) | layer(f"{block}.attn.proj", w, w)
        tensors |= layer(f"{block}.mlp.fc1", 4 * w, w) | layer(f"{block}.mlp.fc2", w, 4 * w)
        tensors |= layer(f"{block}.adaLN_modulation.1", 6 * w, w)
    tensors |= layer("final_layer.linear", outputs, w)
    return tensors | layer("final_layer.adaLN_modulation.1", 2 * w, w)


def forward(tensors: dict[str, Tensor], x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """(batch, 2 * CHANNELS, 8, 8): noise and variances for latents x (batch, CHANNELS, 8, 8)."""

    def of(name: str, x: Tensor) -> Tensor:
        return linear(x, tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    patches = torch.nn.functional.conv2d(
        x, tensors["x_embedder.proj.weight"], tensors["x_embedder.proj.bias"], stride=PATCH
    )
    h = patches.flatten(2).transpose(1, 2) + tensors["pos_embed"]
    angles = t[:, None].float() * 10000 ** (-torch.arange(128) / 128)
    time = torch.cat([angles.cos(), angles.sin()], -1)
    c = of("t_embedder.mlp.2", silu(of("t_embedder.mlp.0", time)))
    c = silu(c + embedding(labels, tensors["y_embedder.embedding_table.weight"]))
    for i in range(DEPTH):
        block = f"blocks.{i}"
        shift, scale, gate, shift2, scale2, gate2 = of(f"{block}.adaLN_modulation.1", c).chunk(
            6, -1
        )
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in of(f"{block}.attn.qkv", norm(h, shift, scale)).chunk(3, -1)
        )
        seen = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + gate[:, None] * of(f"{block}.attn.proj", seen)
        inner = gelu(of(f"{block}.mlp.fc1", norm(h, shift2, scale2)), approximate="tanh")
        h = h + gate2[:, None] * of(f"{block}.mlp.fc2", inner)
    shift, scale = of("final_layer.adaLN_modulation.1", c).chunk(2, -1)
    out = of("final_layer.linear", norm(h, shift, scale))
    out = out.unflatten(1, (SIDE, SIDE)).unflatten(-1, (PATCH, PATCH, -1))
    return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
