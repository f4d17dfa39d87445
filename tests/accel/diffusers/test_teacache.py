"""TeaCache's rule around diffusers' transformers: F by each official script, its decisions, what a
reused step gives, and which published numbers a model of full size gets.
"""

import diffusers
import numpy as np
import pytest
import torch
from torch.nn.functional import layer_norm, silu

from nibble.accel.caching.steps import Window
from nibble.accel.caching.teacache import MOST, distance
from nibble.accel.diffusers import all_blocks, cache
from nibble.accel.diffusers.families import FAMILIES, blocks_of, family_of, published
from tiny_diffusers import build

STEPS = 12
FLUX = (4.98651651e2, -2.83781631e2, 5.58554382e1, -3.82021401, 2.64230861e-1)
NAMES = ("flux", "hunyuan_video", "qwen", "ltx", "cogvideox", "wan")


def normed(tokens: torch.Tensor) -> torch.Tensor:
    return layer_norm(tokens, tokens.shape[-1:], eps=1e-6)


def zero(block, image, temb):
    """TeaCache4FLUX, TeaCache4HunyuanVideo: AdaLayerNormZero."""
    shift, scale = block.norm1.linear(silu(temb)).chunk(6, dim=-1)[:2]
    return normed(image) * (1 + scale[:, None]) + shift[:, None]


def qwen(block, image, temb):
    """mlx-teacache, signal A."""
    shift, scale = block.img_mod(temb).chunk(6, dim=-1)[:2]
    return normed(image) * (1 + scale[:, None]) + shift[:, None]


def ltx(block, image, temb):
    """TeaCache4LTX-Video."""
    values = block.scale_shift_table[None, None] + temb.unflatten(-1, (6, -1))
    shift, scale = values.unbind(dim=2)[:2]
    rms = image * torch.rsqrt(image.square().mean(-1, keepdim=True) + 1e-6)
    return rms * (1 + scale) + shift


def vector(block, image, temb):
    """TeaCache4CogVideoX1.5, TeaCache4Wan2.1 with use_ret_steps."""
    return temb


OFFICIAL = dict(zip(NAMES, (zero, zero, qwen, ltx, vector, vector), strict=True))


def given_to(block) -> list[tuple]:
    """(image, temb) of each of its calls from now on."""
    calls, names = [], all_blocks.arguments

    def note(module, args, kwargs):
        given = names(module, args, kwargs)
        calls.append((given["hidden_states"].clone(), given["temb"].clone()))

    block.register_forward_pre_hook(note, with_kwargs=True)
    return calls


@pytest.mark.parametrize("name", NAMES)
def test_f_is_the_official_one(name, monkeypatch):
    loop, seen = build(name), []
    block = blocks_of(loop.transformer, family_of(loop.transformer))[0]

    def noted(now, before):
        seen.append((now, before))
        return distance(now, before)

    monkeypatch.setattr(all_blocks, "distance", noted)
    calls = given_to(block)
    with cache(loop, "teacache", threshold=0.0, coefficients=(1.0, 0.0)):
        loop(4)
    streams = 2 if loop.guided else 1
    with torch.no_grad():
        wanted = [OFFICIAL[name](block, *call) for call in calls]
    assert len(wanted) == 4 * streams
    assert len(seen) == 2 * streams  # the first and the last are computed without a look
    for number, (now, before) in enumerate(seen, streams):
        torch.testing.assert_close(now, wanted[number], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(before, wanted[number - streams], rtol=1e-4, atol=1e-5)


def test_wan_s_plain_set_watches_the_timestep_s_embedding(monkeypatch):
    loop, seen, embedded = build("wan"), [], []
    entry = published(full_size("wan"), plain=True)
    assert (entry.model, entry.feature) == ("Wan 2.1 T2V 14B, plain", "timestep")
    monkeypatch.setattr("nibble.accel.diffusers.published.published", lambda *_, **__: entry)
    monkeypatch.setattr(all_blocks, "distance", lambda now, before: seen.append(now) or now.sum())
    embedder = loop.transformer.condition_embedder.time_embedder
    embedder.register_forward_hook(lambda module, given, out: embedded.append(out))
    with cache(loop, "teacache", coefficients="plain", threshold=0.0) as caching:
        loop(4)
    assert caching.record.computed == 4
    assert [torch.equal(now, out) for now, out in zip(seen, embedded[2:], strict=False)] == [
        True
    ] * 4


def test_decisions_are_the_official_script_s():
    """teacache_flux.py, transcribed: np.poly1d, F of every step, first and last computed."""
    loop = build("flux")
    calls = given_to(loop.transformer.transformer_blocks[0])
    with cache(loop, "teacache", coefficients=FLUX, threshold=0.6) as caching:
        loop(STEPS)
    found = [caching.record.cells[i].computed for i in range(STEPS)]
    rescale, total, previous, wanted = np.poly1d(FLUX), 0.0, None, []
    for count, call in enumerate(calls):
        now = zero(loop.transformer.transformer_blocks[0], *call).detach()
        if count == 0 or count == STEPS - 1:
            compute, total = True, 0.0
        else:
            total += rescale(((now - previous).abs().mean() / previous.abs().mean()).item())
            compute = not total < 0.6
            total = 0.0 if compute else total
        previous = now
        wanted.append(compute)
    assert found == wanted
    assert 2 < sum(found) < STEPS - 2


@pytest.mark.parametrize("name", NAMES)
def test_a_reused_step_adds_what_all_blocks_added_before(name):
    """By plain forward hooks on the model's own calls: the last block gives what the first was
    given and the difference of the last computed step; the words of the prompt go nowhere from
    there.
    """
    loop = build(name)
    plain = loop(STEPS)
    with cache(loop, "teacache", coefficients=(0.0,), threshold=1.0) as caching:
        found = loop(STEPS)
    cells = caching.record.cells
    computed = [cells[i].computed for i in range(STEPS)]
    assert [i for i, own in enumerate(computed) if own] == [0, MOST + 1, STEPS - 1]
    with cache(loop, "teacache", coefficients=(1.0, 0.0), threshold=0.0):
        assert torch.equal(loop(STEPS), plain)
    assert torch.equal(loop(STEPS), plain)
    assert not any(
        "nibble_cache" in module._diffusers_hook.hooks
        for module in loop.transformer.modules()
        if hasattr(module, "_diffusers_hook")
    )

    family = family_of(loop.transformer)
    blocks, streams = blocks_of(loop.transformer, family), 2 if loop.guided else 1
    calls, added = [], {}
    first = given_to(blocks[0])

    def last(module, given, out):
        step, stream = divmod(len(calls), streams)
        calls.append(step)
        image = out if family.returns == 1 else out[family.image]
        entered = first[-1][0]
        if computed[step]:
            added[stream] = image - entered
            return None
        new = entered + added[stream]
        if family.returns == 1:
            return new
        return tuple(new if place == family.image else part for place, part in enumerate(out))

    blocks[-1].register_forward_hook(last)
    torch.testing.assert_close(loop(STEPS), found, rtol=1e-4, atol=1e-5)


def test_another_number_of_tokens_is_computed():
    loop = build("flux")
    call, seen = loop.call, []

    def narrower(model, x, time, prompt):
        seen.append(len(seen))
        return (
            call(model, x.repeat(2, 1, 1), time.repeat(2), prompt)[:1]
            if len(seen) == 4
            else (call(model, x, time, prompt))
        )

    loop.call = narrower
    with cache(loop, "teacache", coefficients=(0.0,), threshold=1.0) as caching:
        loop(STEPS)
    assert [caching.record.cells[i].why for i in (2, 3, 4, 5)] == ["reused", "new", "new", "reused"]


FULL = {
    "flux": (diffusers.FluxTransformer2DModel, {}, "FLUX.1 dev"),
    "flux, 8 blocks": (diffusers.FluxTransformer2DModel, {"num_layers": 8}, None),
    "flux fill": (diffusers.FluxTransformer2DModel, {"in_channels": 384}, None),
    "hunyuan": (diffusers.HunyuanVideoTransformer3DModel, {}, "HunyuanVideo"),
    "hunyuan i2v": (diffusers.HunyuanVideoTransformer3DModel, {"in_channels": 33}, None),
    "qwen": (diffusers.QwenImageTransformer2DModel, {}, "Qwen-Image"),
    "ltx": (diffusers.LTXVideoTransformer3DModel, {}, "LTX-Video 2B"),
    "cog 2b": (diffusers.CogVideoXTransformer3DModel, {}, "CogVideoX 2B"),
    "cog 1.5 i2v": (
        diffusers.CogVideoXTransformer3DModel,
        dict(
            num_attention_heads=48, num_layers=42, patch_size_t=2, in_channels=32, sample_frames=81
        ),
        "CogVideoX 1.5 5B I2V",
    ),
    "wan": (diffusers.WanTransformer3DModel, {}, "Wan 2.1 T2V 14B"),
    "wan 1.3b": (
        diffusers.WanTransformer3DModel,
        dict(num_attention_heads=12, num_layers=30, ffn_dim=8960),
        "Wan 2.1 T2V 1.3B",
    ),
    "wan i2v": (
        diffusers.WanTransformer3DModel,
        dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120),
        "Wan 2.1 I2V 14B 480P",
    ),
    "wan 2.2 i2v": (diffusers.WanTransformer3DModel, dict(in_channels=36), None),
}


def full_size(name: str):
    kind, options, _ = FULL[name]
    with torch.device("meta"):
        return kind(**options)


@pytest.mark.parametrize("name", FULL)
def test_a_model_of_full_size_gets_its_own_entry_or_none(name):
    found = published(full_size(name))
    assert (found.model if found else None) == FULL[name][2]


def test_kontext_and_large_videos_have_entries_of_their_own():
    assert published(full_size("flux"), reference=True).model == "FLUX.1 Kontext"
    small, large = torch.empty(1, 36, 21, 60, 104), torch.empty(1, 36, 21, 90, 160)
    wan = full_size("wan i2v")
    assert published(wan, small).model == "Wan 2.1 I2V 14B 480P"
    assert published(wan, large).model == "Wan 2.1 I2V 14B 720P"
    assert published(wan, large, plain=True).model == "Wan 2.1 I2V 14B 720P, plain"


def test_presets_and_windows_are_the_authors(monkeypatch):
    """Wan 2.1 14B: 0.1, 0.15, 0.2, and its first five steps always."""
    entry = published(full_size("wan"))
    monkeypatch.setattr("nibble.accel.diffusers.published.published", lambda *_, **__: entry)
    loop = build("wan")
    for preset, threshold in (("quality", 0.1), ("balanced", 0.15), ("fast", 0.2)):
        with cache(loop, "teacache", preset=preset) as caching:
            loop(STEPS)
        assert caching.record.threshold == threshold
        assert [caching.record.cells[i].why for i in range(5)] == ["first"] * 5
    with cache(loop, "teacache", threshold=0.07, window=Window(last=3)) as caching:
        loop(STEPS)
    assert caching.record.threshold == 0.07
    assert [caching.record.cells[i].why for i in range(9, 12)] == ["last"] * 3


def test_every_family_is_built_here():
    assert {type(build(name).transformer).__name__ for name in NAMES} == FAMILIES.keys()
