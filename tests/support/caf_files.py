"""CAF files for tests: heads that change nothing, and heads that were never trained but change a
great deal.
"""

import torch

from nibble.accel.caf import adapter
from nibble.nodes.bridge.caf import load as caf_model


def linears(network: torch.nn.Module) -> list[str]:
    """Names of a model's linears in its blocks."""
    named = [
        (name, module)
        for name, module in network.named_modules()
        if hasattr(module, "in_features") and "." in name
    ]
    return [
        name
        for name, module in named
        if name.split(".")[1].isdigit() or name.split(".")[2:3] and name.split(".")[2].isdigit()
    ]


def heads(
    model, seed: int | None = 0, h: float = 1.0, rank: int = 2, middle: float = 1.0
) -> adapter.CAFAdapter:
    """An adapter of all blocks of a MODEL, which acts alike at all noise levels; seed None: as
    before training.
    """
    network = model.model.diffusion_model
    made = adapter.CAFAdapter.create(network, linears(network), rank=rank, h=h, middle=middle)
    if seed is not None:
        draw = torch.Generator().manual_seed(seed)
        for head in (made.velocity, made.acceleration):
            for name, tensor in head.tensors().items():
                if not name.endswith("down"):
                    tensor.data = 0.1 * torch.randn(tensor.shape, generator=draw)
    return made


def worn(model, seed: int | None = 0, name: str = "test.caf.safetensors", **options):
    """The MODEL with such an adapter, without a file."""
    return caf_model.with_heads(model, heads(model, seed, **options), name)
