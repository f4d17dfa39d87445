"""Names and shapes of well-known models, so that a plan can be made without a file."""

from typing import Any


def flux1_shapes(
    double: int = 19,
    single: int = 38,
    hidden: int = 3072,
    context: int = 4096,
    vector: int = 768,
    guidance: bool = True,
    channels: int = 64,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a FLUX.1 (black-forest-labs/flux, model.py), by default those of
    FLUX.1-dev.
    """

    def linear(name: str, n: int, k: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (n, k), f"{name}.bias": (n,)}

    h = hidden
    shapes: dict[str, tuple[int, ...]] = {}
    for name, k in [("time_in", 256), ("vector_in", vector)] + [("guidance_in", 256)] * guidance:
        shapes |= linear(f"{name}.in_layer", h, k) | linear(f"{name}.out_layer", h, h)
    shapes |= linear("img_in", h, channels) | linear("txt_in", h, context)
    shapes |= linear("final_layer.linear", channels, h) | linear(
        "final_layer.adaLN_modulation.1", 2 * h, h
    )
    for i in range(double):
        for stream in ("img", "txt"):
            block = f"double_blocks.{i}.{stream}"
            shapes |= (
                linear(f"{block}_mod.lin", 6 * h, h)
                | linear(f"{block}_attn.qkv", 3 * h, h)
                | linear(f"{block}_attn.proj", h, h)
            )
            shapes |= linear(f"{block}_mlp.0", 4 * h, h) | linear(f"{block}_mlp.2", h, 4 * h)
            shapes |= {f"{block}_attn.norm.{norm}_norm.scale": (128,) for norm in ("query", "key")}
    for i in range(single):
        block = f"single_blocks.{i}"
        shapes |= (
            linear(f"{block}.linear1", 7 * h, h)
            | linear(f"{block}.linear2", h, 5 * h)
            | linear(f"{block}.modulation.lin", 3 * h, h)
        )
        shapes |= {f"{block}.norm.{norm}_norm.scale": (128,) for norm in ("query", "key")}
    return shapes


KNOWN_MODELS: dict[str, dict[str, Any]] = {  # name → arguments of `flux1_shapes`
    "flux1-dev": {},
    "flux1-schnell": {"guidance": False},
    "flux1-fill-dev": {"channels": 384},
}


def known_shapes(name: str) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a well-known model by its name ('flux1-dev', …), or None."""
    return flux1_shapes(**KNOWN_MODELS[name]) if name in KNOWN_MODELS else None
