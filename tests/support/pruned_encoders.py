"""Prompts with pictures for ComfyUI's small encoders, and the oracle of pruning: their layers one
after another, by hand, on a sequence that tokens are taken out of.
"""

import comfy.model_management
import torch

import tiny_encoders as vl
from nibble.accel.feather import Stage
from nibble.nodes.bridge.feather import prune as feather


def record(found: dict) -> dict:
    return found[feather.KEY]


STAGES = (Stage(3, 0.4, 3), Stage(5, 0.5))


def tokens(clip, text="make the cup blue", pictures=((140, 196),), **options):
    """Pictures of 28 (Qwen2.5) or 32 (Qwen3) pixels a token."""
    return clip.tokenize(
        text, images=[vl.image(*size, seed) for seed, size in enumerate(pictures)], **options
    )


def transformer(clip):
    return feather.encoder_of(clip).transformer


def hooks(clip) -> int:
    return sum(
        len(layer._forward_pre_hooks) + len(layer._forward_hooks)
        for layer in transformer(clip).model.layers
    )


def inputs(clip, pairs):
    """Embeddings and what Llama2_ is given of a prompt, caught at its door."""
    model, caught = transformer(clip), {}

    def catch(_module, args, kwargs):
        caught.update(kwargs, embeds=kwargs["embeds"].clone())

    handle = model.model.register_forward_pre_hook(catch, with_kwargs=True)
    clip.encode_from_tokens(pairs)
    handle.remove()
    return caught


def dropped(clip, pairs, picked: dict[int, torch.Tensor], layers: int | None = None):
    """(hidden states of what is left after so many layers, all by default; the indices of what is
    left): before each layer of `picked` only those positions go on.
    """
    model, given = transformer(clip).model, inputs(clip, pairs)
    x, left = given["embeds"], torch.arange(given["embeds"].shape[1])
    positions = given.get("position_ids")
    positions = left[None] if positions is None else positions
    with torch.no_grad():
        for i, layer in enumerate(model.layers[:layers]):
            if i in picked:
                keep = torch.isin(left, picked[i])
                x, left, positions = x[:, keep], left[keep], positions[:, keep]
            x = one_layer(model, layer, x, left, positions)
            if given.get("deepstack_embeds") is not None and i < len(given["deepstack_embeds"]):
                x[given["visual_pos_masks"]] += given["deepstack_embeds"][i]
    return x, left


def one_layer(model, layer, x, left, positions):
    """A layer on the tokens at `left` (n,) of a sequence, which look at those before them, in a
    layer with a window only at those that are fewer positions away than that.
    """
    away, window = left[:, None] - left, getattr(layer, "sliding_attention", False)
    unseen = (away < 0) | (away >= window) if window else away < 0
    mask = torch.zeros(unseen.shape).masked_fill(unseen, torch.finfo(x.dtype).min / 4)
    attention = comfy.ldm.modules.attention.optimized_attention_for_device(
        x.device, mask=True, small_input=True
    )
    return layer(
        x=x,
        attention_mask=mask[None, None],
        freqs_cis=model.compute_freqs_cis(positions, x.device),
        optimized_attention=attention,
        past_key_value=None,
    )[0]


def best(whole, x) -> int:
    return int(whole.logits(whole.model.norm(x))[0, -1].argmax())
