"""Text generation by a pruned Qwen3-VL, whose encoder ComfyUI lets describe a picture."""

import comfy.model_management
import torch

from nibble.nodes.bridge.feather import prune as feather
from pruned_encoders import STAGES, best, dropped, hooks, inputs, tokens, transformer


def generate(clip, pairs, length=4):
    return clip.generate(pairs, do_sample=False, max_length=length, seed=0)


def test_generation_goes_on_from_the_short_cache(encoders):
    """Against the same layers fed by hand with what is left, token by token, without a cache."""
    clip, drawn = encoders["qwen3"], []
    pairs = tokens(clip)
    pruned = feather.prune(clip, feather.PruneSettings(STAGES), lambda prompt: drawn.append(prompt))
    caches, model = [], transformer(clip).model
    handle = model.layers[6].register_forward_hook(
        lambda module, args, output: caches.append(output[1][2])
    )
    found = generate(pruned, pairs)
    handle.remove()
    (prompt,) = drawn
    assert caches == [int(prompt.mask().sum()) + step for step in range(4)], (
        "the cache of a late layer holds only what was kept"
    )
    assert found[:2] == by_hand(clip, pairs, prompt)
    assert generate(clip, pairs) == generate(clip, pairs)
    assert hooks(clip) == 0


def by_hand(clip, pairs, prompt):
    """The first two tokens: the last state of a pruned prompt, then of the prompt and the first
    token together.
    """
    whole, given = transformer(clip), inputs(clip, pairs)
    picked = {3: prompt.mask(1).nonzero().flatten(), 5: prompt.mask(2).nonzero().flatten()}
    first = best(whole, dropped(clip, pairs, picked)[0])
    after = int(given["position_ids"][:, -1].max()) + 1
    x, left, positions = (
        given["embeds"],
        torch.arange(prompt.length + 1),
        torch.cat([given["position_ids"], torch.full((3, 1), after)], 1),
    )
    x = torch.cat([x, whole.model.embed_tokens(torch.tensor([[first]]))], 1)
    with torch.no_grad():
        for i, layer in enumerate(whole.model.layers):
            if i in picked:
                keep = torch.isin(left, torch.cat([picked[i], torch.tensor([prompt.length])]))
                x, left, positions = x[:, keep], left[keep], positions[:, keep]
            mask = torch.full((x.shape[1],) * 2, torch.finfo(x.dtype).min / 4).triu_(1)
            x = layer(
                x=x,
                attention_mask=mask,
                freqs_cis=whole.model.compute_freqs_cis(positions, x.device),
                past_key_value=None,
                optimized_attention=comfy.ldm.modules.attention.optimized_attention_for_device(
                    x.device, mask=True, small_input=True
                ),
            )[0]
            if i < 3:
                x[:, :-1][given["visual_pos_masks"]] += given["deepstack_embeds"][i]
    return [first, best(whole, x)]
