"""FEATHER on ComfyUI's Gemma 3 and on HunyuanVideo's LLaVA-Llama 3, small ones, and the reasons of
those that it refuses.
"""

from types import SimpleNamespace

import comfy.text_encoders.flux
import comfy.text_encoders.gemma4
import comfy.text_encoders.hidream
import comfy.text_encoders.lumina2
import comfy.text_encoders.qwen35
import pytest
import torch
from comfy_extras.nodes_hunyuan import TextEncodeHunyuanVideo_ImageToVideo
from comfy_extras.nodes_textgen import TextGenerate

import tiny_encoders as vl
from nibble.accel import feather as accel
from nibble.nodes.bridge.feather import prune as feather
from nibble.nodes.bridge.feather import report
from pruned_encoders import STAGES, best, dropped, hooks, inputs, one_layer, record, transformer

PIXELS = vl.image(300, 420)


@pytest.fixture(scope="module")
def gemma():
    return vl.gemma3_12b()


@pytest.fixture(scope="module")
def llava():
    return vl.hunyuan_video()


def asked(clip, text="make the red cup green"):
    """Gemma's prompt, of one picture: longer than its layers' window."""
    return clip.tokenize(text, image=PIXELS, skip_template=False)


def described(clip, interleave=2, text="make the red cup green"):
    """The tokens and the conditioning of ComfyUI's own node."""
    caught, tokenize = [], clip.tokenize
    told = clip.clone()
    told.tokenize = lambda *args, **kwargs: caught.append(tokenize(*args, **kwargs)) or caught[0]
    output = SimpleNamespace(mm_projected=vl.llava_output())
    node = TextEncodeHunyuanVideo_ImageToVideo.execute(told, output, text, interleave)
    return caught[0], node.result[0]


def states(clip, module, run):
    """(what `run` gives, the hidden states that the encoder gives meanwhile)."""
    caught = []
    handle = module.register_forward_hook(lambda _module, _args, output: caught.append(output[1]))
    found = run()
    handle.remove()
    return found, caught[0]


def kept(facts, stage):
    left = torch.ones(facts["length"], dtype=torch.bool)
    (picture,) = facts["pictures"]
    left[picture["start"] : picture["start"] + len(picture["masks"][stage])] = picture["masks"][
        stage
    ]
    return left.nonzero().flatten()


# ---- where the picture is


def test_gemmas_picture_is_a_square_of_tokens_of_the_middle_of_the_picture(gemma):
    pairs = asked(gemma)
    found = feather.prune(gemma, feather.PruneSettings(STAGES)).encode_from_tokens(
        pairs, return_dict=True
    )
    (picture,) = record(found)["pictures"]
    place = next(i for i, pair in enumerate(pairs[0]) if isinstance(pair[0], dict))
    assert (picture["start"], picture["height"], picture["width"]) == (place, vl.SIDE, vl.SIDE)
    seen = transformer(gemma).preprocess_embed(pairs[0][place][0], "cpu")[0][0]
    embeds = inputs(gemma, pairs)["embeds"][0]
    assert torch.equal(embeds[place : place + vl.SIDE**2], seen)
    assert len(embeds) > vl.WINDOW + vl.SIDE**2
    height, width = picture["pixels"].shape[1:3]
    whole = pairs[0][place][0]["data"]
    assert height == width == whole.shape[1] < whole.shape[2]
    left = (whole.shape[2] - width) // 2
    assert torch.equal(picture["pixels"], whole[:, :, left : left + width])


def test_llavas_picture_is_the_square_of_tokens_that_the_vision_model_gave(llava):
    pruned = feather.prune(llava, feather.PruneSettings(STAGES))
    pairs, conditioning = described(pruned)
    (picture,) = conditioning[0][1][feather.KEY]["pictures"]
    place = next(i for i, pair in enumerate(pairs["llama"][0]) if isinstance(pair[0], dict))
    assert (picture["start"], picture["height"], picture["width"]) == (
        place,
        vl.LLAVA_SIDE,
        vl.LLAVA_SIDE,
    )
    embeds = inputs(llava, pairs)["embeds"][0]
    assert torch.equal(embeds[place : place + vl.LLAVA_SIDE**2], vl.llava_output()[0])


# ---- pruning is dropping


@pytest.mark.parametrize("criterion", accel.CRITERIA)
@pytest.mark.parametrize("mode", feather.MODES)
def test_in_gemma_pruning_is_dropping_where_windows_still_count_positions(gemma, criterion, mode):
    pairs = asked(gemma)
    found = feather.prune(gemma, feather.PruneSettings(STAGES, criterion, mode)).encode_from_tokens(
        pairs, return_dict=True
    )
    first, second = kept(record(found), 0), kept(record(found), 1)
    assert set(second.tolist()) < set(first.tolist())
    assert len(first) < record(found)["length"]
    expected, left = dropped(gemma, pairs, {3: first, 5: second})
    assert torch.equal(left, second)
    last = found["cond"][0, -1]  # all layers' states are there, these normalised
    assert len(last) == (len(second) if mode == "drop" else record(found)["length"])
    assert torch.equal(
        last if mode == "drop" else last[second], transformer(gemma).model.norm(expected)[0]
    )
    assert found["attention_mask"].shape[1] == len(last)


@pytest.mark.parametrize("criterion", accel.CRITERIA)
def test_in_llava_pruning_is_dropping(llava, criterion):
    pruned = feather.prune(llava, feather.PruneSettings(STAGES, criterion))
    (pairs, conditioning), hidden = states(llava, transformer(llava), lambda: described(pruned))
    facts = conditioning[0][1][feather.KEY]
    first, second = kept(facts, 0), kept(facts, 1)
    assert len(second) < len(first) < facts["length"]
    # the conditioning is the states after the sixth of eight layers
    expected, left = dropped(llava, pairs, {3: first, 5: second}, layers=6)
    assert torch.equal(left, second)
    assert torch.equal(hidden[0, second], expected[0])


def test_keeping_everything_is_the_unpatched_encoder(gemma, llava):
    everything = feather.PruneSettings((accel.Stage(3, 0.4, 1),))
    pairs = asked(gemma)
    pruned = feather.prune(gemma, everything).encode_from_tokens(pairs, return_dict=True)
    assert record(pruned)["pictures"][0]["masks"][0].all()
    assert torch.equal(pruned["cond"], gemma.encode_from_tokens(pairs))
    (_, found), (_, plain) = described(feather.prune(llava, everything)), described(llava)
    assert found[0][1][feather.KEY]["pictures"][0]["masks"][0].all()
    assert torch.equal(found[0][0], plain[0][0])
    assert hooks(llava) == 0


def test_gemmas_score_is_worked_out_without_the_bridge(gemma):
    """Both norms of Gemma, a scale of 1 / sqrt(256), no rotation."""
    pairs, caught = asked(gemma), {}
    layer = transformer(gemma).model.layers[2]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: caught.update(x=kwargs["x"].clone()), with_kwargs=True
    )
    found = feather.prune(gemma, feather.PruneSettings((accel.Stage(3, 0.4),))).encode_from_tokens(
        pairs, return_dict=True
    )
    handle.remove()
    (picture,) = record(found)["pictures"]

    def normed(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)

    with torch.no_grad():
        attention = layer.self_attn
        x = normed(caught["x"][0], layer.input_layernorm.weight)
        start, count = picture["start"], vl.SIDE**2
        q = normed(attention.q_proj(x[-1]).view(2, 256), attention.q_norm.weight)
        k = normed(attention.k_proj(x[start : start + count]), attention.k_norm.weight)
        phi = torch.softmax(q @ k.T / 16, -1).mean(0)
    expected = torch.zeros(count, dtype=torch.bool)
    expected[phi.topk(int(0.4 * count)).indices] = True
    assert torch.equal(picture["masks"][0], expected)


# ---- text generation: all that ComfyUI does with Gemma's pictures


@pytest.mark.parametrize("size", ["12B", "4B"])
def test_text_generation_goes_on_from_the_short_cache_within_its_windows(gemma, size):
    """Against the same layers fed by hand with what is left, without a cache."""
    clip = gemma if size == "12B" else vl.gemma3_4b()
    drawn, ids, last = [], [], []
    pruned = feather.prune(clip, feather.PruneSettings(STAGES), drawn.append)
    pruned.decode = lambda found: ids.extend(found) or "text"
    handle = (
        transformer(clip)
        .model.layers[-1]
        .register_forward_hook(lambda _module, _args, output: last.append(output[0][:, -1].clone()))
    )
    TextGenerate.execute(pruned, "make it green", 3, {"sampling_mode": "off"}, image=PIXELS)
    handle.remove()
    (prompt,) = drawn
    after = prompt.length - prompt.pictures[0].start - vl.SIDE**2
    assert after < vl.WINDOW < prompt.length - prompt.pictures[0].start, "it cuts the picture"
    expected, states = by_hand(clip, asked(clip, "make it green"), prompt, 3)
    assert ids == expected
    torch.testing.assert_close(torch.cat(last), torch.cat(states), rtol=1e-4, atol=1e-4)
    assert hooks(clip) == 0, "the unpruned CLIP that came after it took them off"


def by_hand(clip, pairs, prompt, count):
    whole, given = transformer(clip), {}

    def catch(_module, _args, kwargs):
        given.setdefault("embeds", kwargs["x"].clone())

    handle = whole.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    clip.generate(pairs, do_sample=False, max_length=1, seed=0)
    handle.remove()
    stages = {3: prompt.mask(1).nonzero().flatten(), 5: prompt.mask(2).nonzero().flatten()}
    embeds, found, states = given["embeds"], [], []
    for _ in range(count):
        x, left = embeds, torch.arange(embeds.shape[1])
        since = left[prompt.length :]
        with torch.no_grad():
            for i, layer in enumerate(whole.model.layers):
                if i in stages:
                    keep = torch.isin(left, torch.cat([stages[i], since]))
                    x, left = x[:, keep], left[keep]
                x = one_layer(whole.model, layer, x.clone(), left, left[None])
        found.append(best(whole, x))
        states.append(x[:, -1])
        embeds = torch.cat([embeds, whole.model.embed_tokens(torch.tensor([[found[-1]]]))], 1)
    return found, states


def test_in_ltx_2_tokens_are_dropped_and_the_filling_at_the_left_asks_nothing():
    clip = vl.ltx2()
    pairs = asked(clip)
    plain = clip.encode_from_tokens(pairs, return_dict=True)
    found = {
        mode: feather.prune(clip, feather.PruneSettings(STAGES, mode=mode)).encode_from_tokens(
            pairs, return_dict=True
        )
        for mode in feather.MODES
    }
    facts = record(found["drop"])
    filling = sum(pair[0] == 0 for pair in pairs["gemma3_12b"][0])
    real, pruned = facts["length"] - filling, facts["length"] - len(kept(facts, 1))
    assert filling > 100
    assert pruned > 40
    assert plain["cond"].shape[1] == found["scatter"]["cond"].shape[1] == real
    assert found["drop"]["cond"].shape[1] == real - pruned
    assert facts["last"] == facts["length"] - 1
    everything = feather.prune(clip, feather.PruneSettings((accel.Stage(3, 0.4, 1),)))
    assert torch.equal(everything.encode_from_tokens(pairs), plain["cond"])


# ---- the report


def test_the_report_draws_what_it_has_of_the_picture(gemma, llava):
    settings = feather.PruneSettings(STAGES)
    found = feather.prune(gemma, settings).encode_from_tokens(asked(gemma), return_dict=True)
    drawn, chart = report.report([[found.pop("cond"), found]])
    assert drawn.shape[1] == drawn.shape[2]
    assert chart["pictures"][0]["rows"] == chart["pictures"][0]["columns"] == vl.SIDE
    _, conditioning = described(feather.prune(llava, settings))
    drawn, chart = report.report(conditioning)
    assert drawn.shape == (1, 14 * vl.LLAVA_SIDE, 14 * vl.LLAVA_SIDE, 3)
    assert drawn.max() == 0.5, "grey: the encoder never had the pixels"
    assert chart["pictures"][0]["rows"] == vl.LLAVA_SIDE


# ---- refusals


def test_hunyuan_video_cannot_drop_tokens(llava):
    with pytest.raises(ValueError, match="at places that it counts.*set mode to scatter"):
        feather.prune(llava, feather.PruneSettings(STAGES, mode="drop"))


def built(make, **options):
    with torch.device("meta"):
        return SimpleNamespace(
            patcher=SimpleNamespace(model=make(device="meta", model_options=options))
        )


@pytest.mark.parametrize(
    "make, name, why",
    [
        (
            lambda: comfy.text_encoders.gemma4.gemma4_te(
                model_class=comfy.text_encoders.gemma4.Gemma4_E2B
            ),
            "Gemma4TEModel",
            "caches of a fixed length",
        ),
        (comfy.text_encoders.qwen35.te, "Qwen35TEModel", "linear attention"),
        (comfy.text_encoders.flux.flux2_te, "Flux2TEModel", "no pictures by ComfyUI"),
        (
            lambda: comfy.text_encoders.lumina2.te(model_type="gemma3_4b"),
            "LuminaTEModel",
            "no pictures by ComfyUI",
        ),
        (
            lambda: comfy.text_encoders.hidream.hidream_clip(
                clip_l=False, clip_g=False, t5=False, llama=True
            ),
            "HiDreamTEModel",
            "no pictures by ComfyUI",
        ),
    ],
    ids=["Gemma 4", "Qwen3.5", "Mistral 3", "Gemma 3 without a tower", "HiDream's Llama"],
)
def test_every_other_encoder_is_refused_with_its_reason(make, name, why):
    with pytest.raises(ValueError, match=f"{name} .*{why}.*Gemma 3 text encoder"):
        feather.prune(built(make()), feather.PruneSettings(STAGES))
