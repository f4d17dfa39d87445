"""Names and shapes of text encoders, as ComfyUI's files have them: of any size, and the real ones.

Sizes are those of ComfyUI's classes (comfy/text_encoders/*.py and their JSON); what a file may hold
besides (a tokenizer, a head that ComfyUI drops) is left out.
"""

Shapes = dict[str, tuple[int, ...]]


def t5(layers: int, width: int, inner: int, hidden: int, words: int, heads: int, umt5=False):
    """T5 1.1's encoder; umt5: each layer has a position table of its own."""
    shapes: Shapes = {"shared.weight": (words, width)}
    for i in range(layers):
        block = f"encoder.block.{i}.layer"
        for name in "qkv":
            shapes[f"{block}.0.SelfAttention.{name}.weight"] = (inner, width)
        shapes[f"{block}.0.SelfAttention.o.weight"] = (width, inner)
        if umt5 or i == 0:
            shapes[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = (32, heads)
        shapes[f"{block}.0.layer_norm.weight"] = (width,)
        shapes[f"{block}.1.DenseReluDense.wi_0.weight"] = (hidden, width)
        shapes[f"{block}.1.DenseReluDense.wi_1.weight"] = (hidden, width)
        shapes[f"{block}.1.DenseReluDense.wo.weight"] = (width, hidden)
        shapes[f"{block}.1.layer_norm.weight"] = (width,)
    return shapes | {"encoder.final_layer_norm.weight": (width,)}


def language_model(  # noqa: PLR0913  (its sizes)
    layers: int,
    width: int,
    hidden: int,
    words: int,
    queries: int,
    keys: int,
    head: int = 128,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    four_norms: bool = False,
    prefix: str = "model.",
) -> Shapes:
    """A decoder such as Llama's. queries, keys: outputs of those projections."""
    shapes: Shapes = {f"{prefix}embed_tokens.weight": (words, width)}
    for i in range(layers):
        block = f"{prefix}layers.{i}"
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{block}.self_attn.{name}_proj.weight"] = (rows, width)
            if qkv_bias:
                shapes[f"{block}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{block}.self_attn.o_proj.weight"] = (width, queries)
        if qk_norm:
            shapes[f"{block}.self_attn.q_norm.weight"] = (head,)
            shapes[f"{block}.self_attn.k_norm.weight"] = (head,)
        shapes[f"{block}.mlp.gate_proj.weight"] = (hidden, width)
        shapes[f"{block}.mlp.up_proj.weight"] = (hidden, width)
        shapes[f"{block}.mlp.down_proj.weight"] = (width, hidden)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if four_norms:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes |= {f"{block}.{norm}.weight": (width,) for norm in norms}
    return shapes | {f"{prefix}norm.weight": (width,)}


def qwen25_tower(layers: int, width: int, hidden: int, out: int) -> Shapes:
    """Qwen2.5-VL's vision tower."""
    shapes: Shapes = {"visual.patch_embed.proj.weight": (width, 3, 2, 14, 14)}
    for i in range(layers):
        block = f"visual.blocks.{i}"
        linears = [("attn.qkv", 3 * width, width), ("attn.proj", width, width)]
        linears += [("mlp.gate_proj", hidden, width), ("mlp.up_proj", hidden, width)]
        for name, rows, columns in [*linears, ("mlp.down_proj", width, hidden)]:
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
        shapes |= {f"{block}.norm{j}.weight": (width,) for j in (1, 2)}
    for j, rows in ((0, 4 * width), (2, out)):
        shapes |= {
            f"visual.merger.mlp.{j}.weight": (rows, 4 * width),
            f"visual.merger.mlp.{j}.bias": (rows,),
        }
    return shapes | {"visual.merger.ln_q.weight": (width,)}


REAL: dict[str, Shapes] = {
    "T5-XXL": t5(24, 4096, 4096, 10240, 32128, 64),
    "UMT5-XXL": t5(24, 4096, 4096, 10240, 256384, 64, umt5=True),
    "Gemma 2 2B": language_model(26, 2304, 9216, 256000, 2048, 1024, four_norms=True),
    "Gemma 3 4B": language_model(
        34, 2560, 10240, 262208, 2048, 1024, head=256, qk_norm=True, four_norms=True
    ),
    "Gemma 3 12B": language_model(
        48, 3840, 15360, 262208, 4096, 2048, head=256, qk_norm=True, four_norms=True
    ),
    "Qwen2.5-VL 3B": language_model(36, 2048, 11008, 151936, 2048, 256, qkv_bias=True),
    "Qwen2.5-VL 7B": language_model(28, 3584, 18944, 152064, 3584, 512, qkv_bias=True)
    | qwen25_tower(32, 1280, 3420, 3584),
    "Qwen3 0.6B": language_model(28, 1024, 3072, 151936, 2048, 1024, qk_norm=True),
    "Qwen3 4B": language_model(36, 2560, 9728, 151936, 4096, 1024, qk_norm=True),
    "Qwen3 8B": language_model(36, 4096, 12288, 151936, 4096, 1024, qk_norm=True),
    "Llama 3.1 8B": language_model(32, 4096, 14336, 128320, 4096, 1024),
    "Mistral Small 24B": language_model(40, 5120, 32768, 131072, 4096, 1024),
}
