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

STAGES = (Stage(3, 0.4, 3), Stage(5, 0.5))
SECOND = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> and"
    " <|vision_start|><|image_pad|><|vision_end|> swap them<|im_end|>\n"
)


@pytest.fixture(scope="module")
def encoders():
    return {"qwen2.5": vl.qwen_image(), "qwen3": vl.qwen3_vl()}


@pytest.fixture(params=["qwen2.5", "qwen3"])
def clip(request, encoders):
    return encoders[request.param]


def tokens(clip, text="make the cup blue", pictures=((140, 196),), **options):
    """Pictures of 28 (Qwen2.5) or 32 (Qwen3) pixels a token."""
    return clip.tokenize(
        text, images=[vl.image(*size, seed) for seed, size in enumerate(pictures)], **options
    )


def encode(clip, *args, **kwargs) -> dict:
    return clip.encode_from_tokens(tokens(clip, *args, **kwargs), return_dict=True)


def same(found: dict, expected: dict) -> bool:
    return torch.equal(found["cond"], expected["cond"]) and found.keys() - {
        feather.KEY
    } == expected.keys() - {feather.KEY}


def transformer(clip):
    return feather.encoder_of(clip)[1]


def hooks(clip) -> int:
    return sum(
        len(layer._forward_pre_hooks) + len(layer._forward_hooks)
        for layer in transformer(clip).model.layers
    )


# ---- the oracle: the layers one after another on a sequence that tokens are taken out of, written
# without the bridge


def inputs(clip, pairs):
    """Embeddings and what Llama2_ is given of a prompt, caught at its door."""
    name, model = feather.encoder_of(clip)
    caught = {}

    def catch(_module, args, kwargs):
        caught.update(kwargs, embeds=kwargs["embeds"].clone())

    handle = model.model.register_forward_pre_hook(catch, with_kwargs=True)
    clip.encode_from_tokens(pairs)
    handle.remove()
    return caught


def dropped(clip, pairs, picked: dict[int, torch.Tensor]):
    """(last hidden states of what is left, the indices of what is left): before each layer of
    `picked` only those positions go on.
    """
    model, given = transformer(clip).model, inputs(clip, pairs)
    x, left = given["embeds"], torch.arange(given["embeds"].shape[1])
    positions = given["position_ids"]
    attention = comfy.ldm.modules.attention.optimized_attention_for_device(
        x.device, mask=True, small_input=True
    )
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            if i in picked:
                keep = torch.isin(left, picked[i])
                x, left, positions = x[:, keep], left[keep], positions[:, keep]
            length = x.shape[1]
            mask = torch.full((length, length), torch.finfo(x.dtype).min / 4).triu_(1)[None, None]
            x = layer(
                x=x,
                attention_mask=mask,
                freqs_cis=model.compute_freqs_cis(positions, x.device),
                optimized_attention=attention,
                past_key_value=None,
            )[0]
            if given.get("deepstack_embeds") is not None and i < len(given["deepstack_embeds"]):
                x[given["visual_pos_masks"]] += given["deepstack_embeds"][i]
    return x, left


def record(found: dict) -> dict:
    return found[feather.KEY]


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
    return transformer(clip).model.norm(x) if feather.encoder_of(clip)[0] == "qwen25_7b" else x


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


# ---- text generation: Qwen3-VL, whose encoder ComfyUI lets describe a picture


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


def best(whole, x) -> int:
    return int(whole.logits(whole.model.norm(x))[0, -1].argmax())


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


# ---- a model whose answer is known (bench/seeker.py)


@pytest.fixture(scope="module")
def seeker():
    from bench import seeker

    return seeker, seeker.build()


@pytest.mark.parametrize("height, fastv_finds", [(0.0, False), (1.0, True)])
def test_feather_finds_the_square_wherever_it_stands_and_fastv_loses_it_at_the_top(
    seeker, height, fastv_finds
):
    """24 of 729 tokens are left, as in the paper; FastV's lie at the bottom (0.8 of the height in
    the paper).
    """
    world, clip = seeker
    pixels, (corner, *_) = world.picture(27, 27, 3, height)
    stages = (Stage(world.STAGES[0], 0.3, 3), Stage(world.STAGES[1], 0.09))
    finds, heights = {}, {}
    for criterion in (None, "feather", "fastv"):
        pruned = (
            clip
            if criterion is None
            else feather.prune(clip, feather.PruneSettings(stages, criterion))
        )
        found = pruned.encode_from_tokens(world.prompt(pixels), return_dict=True)
        finds[criterion] = world.right(world.answer(found["cond"], 27, 27), corner)
        if criterion:
            heights[criterion] = accel.mean_row(record(found)["pictures"][0]["masks"][-1], 27, 27)
    assert finds == {None: True, "feather": True, "fastv": fastv_finds}
    assert heights["fastv"] > 0.8 > heights["feather"]


def test_the_bench_gives_every_arm_as_many_tokens(monkeypatch):
    from bench import bench_feather

    monkeypatch.setattr(bench_feather, "KEEPS", (0.3,))
    rows = {row["arm"]: row for row in bench_feather.find(2, 15)["rows"]}
    assert rows["none"]["accuracy"] == rows["feather"]["accuracy"] == 1
    assert rows["fastv"]["accuracy_top"] == 0
    assert (
        len(
            {
                tuple(rows[arm]["tokens"])
                for arm in ("feather", "feather without grid", "fastv", "uniform")
            }
        )
        == 1
    )
