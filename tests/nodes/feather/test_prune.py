"""FEATHER on ComfyUI's own Qwen2.5-VL and Qwen3-VL encoders, small ones: what the hooks give, bit
for bit, and that they go.
"""

import gc

import comfy.model_management
import pytest
import torch

import tiny_encoders as vl
from nibble.accel import feather as accel
from nibble.accel.feather import Stage
from nibble.nodes.bridge.feather import prune as feather
from pruned_encoders import STAGES, dropped, hooks, record, tokens, transformer

SECOND = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> and"
    " <|vision_start|><|image_pad|><|vision_end|> swap them<|im_end|>\n"
)


def encode(clip, *args, **kwargs) -> dict:
    return clip.encode_from_tokens(tokens(clip, *args, **kwargs), return_dict=True)


def same(found: dict, expected: dict) -> bool:
    return torch.equal(found["cond"], expected["cond"]) and found.keys() - {
        feather.KEY
    } == expected.keys() - {feather.KEY}


# ---- the oracle: the layers one after another on a sequence that tokens are taken out of, written
# without the bridge


def kept(found: dict, stage: int) -> torch.Tensor:
    """Positions of the prompt that are left after a stage, from what the run told."""
    left = torch.ones(record(found)["length"], dtype=torch.bool)
    for picture in record(found)["pictures"]:
        left[picture["start"] : picture["start"] + picture["height"] * picture["width"]] = picture[
            "masks"
        ][stage]
    return left.nonzero().flatten()


def final(clip, x):
    """As the encoder's conditioning of last hidden states: Qwen2.5-VL's are normalised, Qwen3-VL's
    are those before the norm.
    """
    return transformer(clip).model.norm(x) if feather.encoder_of(clip).name == "qwen25_7b" else x


@pytest.mark.parametrize("pictures", [((140, 196),), ((140, 196), (96, 64))], ids=["one", "two"])
@pytest.mark.parametrize("criterion", accel.CRITERIA)
def test_pruning_is_dropping_bit_for_bit(clip, pictures, criterion):
    pairs = tokens(clip, SECOND if len(pictures) == 2 else "make the cup blue", pictures)
    found = feather.prune(clip, feather.PruneSettings(STAGES, criterion)).encode_from_tokens(
        pairs, return_dict=True
    )
    assert [len(p["masks"]) for p in record(found)["pictures"]] == [2] * len(pictures)
    first, second = kept(found, 0), kept(found, 1)
    assert set(second.tolist()) < set(first.tolist())
    assert len(first) < record(found)["length"]
    expected, left = dropped(clip, pairs, {3: first, 5: second})
    head = record(found)["length"] - found["cond"].shape[1]  # the template's, cut off by Qwen-Image
    assert torch.equal(left, second)
    assert torch.equal(
        found["cond"][0, left[left >= head] - head], final(clip, expected)[0, left >= head]
    )
    short = feather.prune(
        clip, feather.PruneSettings(STAGES, criterion, "drop")
    ).encode_from_tokens(pairs, return_dict=True)
    assert torch.equal(short["cond"][0], final(clip, expected)[0, left >= head])


def test_the_criterion_worked_out_without_the_bridge(clip):
    """phi of the first stage from layer 2's own weights on its input, no rotation; the kept ones
    are the best and the grid.
    """
    pairs = tokens(clip)
    layer, caught = transformer(clip).model.layers[2], {}
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: caught.update(x=kwargs["x"].clone()), with_kwargs=True
    )
    found = feather.prune(clip, feather.PruneSettings(STAGES)).encode_from_tokens(
        pairs, return_dict=True
    )
    handle.remove()
    (picture,) = record(found)["pictures"]
    count = picture["height"] * picture["width"]
    with torch.no_grad():
        normed = layer.input_layernorm(caught["x"][0])
        attention = layer.self_attn
        q = attention.q_proj(normed[-1]).view(2, 128)
        k = attention.k_proj(normed[picture["start"] : picture["start"] + count])
        q, k = (q, k) if attention.q_norm is None else (attention.q_norm(q), attention.k_norm(k))
        phi = torch.softmax(q @ k.T / 128**0.5, -1).mean(0)
    best = torch.zeros(count, dtype=torch.bool)
    best[phi.topk(int(0.4 * count)).indices] = True
    grid = torch.tensor(
        [
            row % 3 == 0 and column % 3 == 0
            for row in range(picture["height"])
            for column in range(picture["width"])
        ]
    )
    assert torch.equal(picture["masks"][0], best | grid)


def test_keeping_everything_is_the_unpatched_encoder(clip):
    plain = encode(clip)
    assert same(
        encode(feather.prune(clip, feather.PruneSettings((Stage(3, 1.0, 3), Stage(5, 1.0))))), plain
    )
    # hooks on, and the grid holds every token
    grid_of_all = feather.prune(clip, feather.PruneSettings((Stage(3, 0.4, 1),)))
    found = encode(grid_of_all)
    assert hooks(clip) > 0
    assert record(found)["pictures"][0]["masks"][0].all()
    assert same(found, plain)


def test_scatter_keeps_the_length_and_drop_shortens_it_by_the_pruned(clip):
    plain, scattered, short = (
        encode(c)
        for c in (
            clip,
            *(
                feather.prune(clip, feather.PruneSettings(STAGES, mode=mode))
                for mode in feather.MODES
            ),
        )
    )
    pruned = record(short)["length"] - len(kept(short, 1))
    assert scattered["cond"].shape == plain["cond"].shape
    assert not torch.equal(scattered["cond"], plain["cond"])
    assert pruned > 15
    assert short["cond"].shape[1] == plain["cond"].shape[1] - pruned
    if "attention_mask" in plain:
        assert short["attention_mask"].shape[1] == short["cond"].shape[1]


def test_drop_shortens_the_attention_mask_where_there_is_one(encoders):
    """A padding token in the middle of the text keeps Qwen-Image from leaving the mask out."""
    clip = encoders["qwen2.5"]
    pairs = tokens(clip)
    pairs["qwen25_7b"][0].append((151643, 1.0))
    plain = clip.encode_from_tokens(pairs, return_dict=True)
    short = feather.prune(clip, feather.PruneSettings(STAGES, mode="drop")).encode_from_tokens(
        pairs, return_dict=True
    )
    assert (plain["attention_mask"] == 0).sum() == (short["attention_mask"] == 0).sum() == 1
    assert short["attention_mask"].shape[1] == short["cond"].shape[1] < plain["cond"].shape[1]
    assert record(short)["last"] == record(short)["length"] - 2, "the padding asks nothing"


def test_text_without_an_image_runs_unpruned(clip):
    plain = clip.encode_from_tokens(clip.tokenize("a red cup"), return_dict=True)
    pruned = feather.prune(clip, feather.PruneSettings(STAGES, mode="drop"))
    encode(pruned)
    found = pruned.encode_from_tokens(clip.tokenize("a red cup"), return_dict=True)
    assert feather.KEY not in found
    assert same(found, plain)


def test_pruned_and_unpruned_clips_of_the_same_weights_take_turns(clip):
    plain, pruned = encode(clip), feather.prune(clip, feather.PruneSettings(STAGES))
    first = encode(pruned)
    assert hooks(clip) == 2 + 2 * (vl.LAYERS - 3)
    assert same(encode(clip), plain)
    assert hooks(clip) == 0
    assert same(encode(pruned), first)
    assert same(encode(pruned.clone()), first)
    assert not same(first, plain)
    other = encode(feather.prune(pruned, feather.PruneSettings((Stage(3, 0.1),), mode="drop")))
    assert len(record(other)["pictures"][0]["masks"]) == 1, (
        "a second node takes the place of the first"
    )
    assert same(encode(feather.prune(pruned, feather.PruneSettings((Stage(3, 1.0),)))), plain)


def test_a_pruned_clip_that_is_forgotten_takes_its_hooks_with_it(clip):
    plain, pruned = encode(clip), feather.prune(clip, feather.PruneSettings(STAGES))
    encode(pruned)
    del pruned
    gc.collect()
    assert hooks(clip) == 0
    assert same(encode(clip), plain)


def test_unloading_takes_everything_off(clip):
    pruned = feather.prune(clip, feather.PruneSettings(STAGES))
    encode(pruned)
    comfy.model_management.unload_all_models()
    assert hooks(clip) == 0
    found, expected = encode(pruned), encode(feather.prune(clip, feather.PruneSettings(STAGES)))
    assert same(found, expected)


def test_nothing_is_left_after_an_exception(clip):
    plain, pruned = encode(clip), feather.prune(clip, feather.PruneSettings(STAGES))
    expected = encode(pruned)
    layer = transformer(clip).model.layers[4]

    def fail(*_):
        raise RuntimeError("stopped half-way")

    # between the two hooks of a layer that runs on few tokens
    handle = layer.mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="half-way"):
        encode(pruned)
    handle.remove()
    text = pruned.encode_from_tokens(clip.tokenize("a red cup"))
    assert torch.equal(text, clip.encode_from_tokens(clip.tokenize("a red cup")))
    assert same(encode(pruned), expected)
    assert same(encode(clip), plain)


# ---- refusals


@pytest.mark.parametrize(
    "bad, words", [(dict(criterion="best"), "criterion 'best'"), (dict(mode="hide"), "mode 'hide'")]
)
def test_settings_out_of_range_are_refused(bad, words):
    with pytest.raises(ValueError, match=words):
        feather.PruneSettings(STAGES, **bad)


def test_layers_that_are_not_there_or_get_the_picture_still_are_refused(encoders):
    with pytest.raises(ValueError, match="layer 8 .* has 8 layers; choose from 1 to 7"):
        feather.prune(encoders["qwen2.5"], feather.PruneSettings((Stage(8, 0.5),)))
    with pytest.raises(ValueError, match="feeds the picture in until layer 2; choose from 3 to 7"):
        feather.prune(encoders["qwen3"], feather.PruneSettings((Stage(2, 0.5),)))


def test_an_encoder_without_visual_tokens_is_refused_by_its_name():
    import comfy.sd1_clip
    import comfy.text_encoders.sd3_clip

    class Clip:
        def __init__(self, model):
            self.patcher = type("Patcher", (), {"model": model})

    with torch.device("meta"):
        models = [
            comfy.sd1_clip.SD1ClipModel(device="meta"),
            comfy.text_encoders.sd3_clip.SD3ClipModel(
                clip_l=False, clip_g=False, t5=True, device="meta"
            ),
        ]
    for model in models:
        with pytest.raises(
            ValueError, match=f"{type(model).__name__} has no vision tower.*Qwen2.5-VL"
        ):
            feather.prune(Clip(model), feather.PruneSettings(STAGES))
