"""Models, samplers and nodes that keep something from call to call give right pictures with our
caches, heads and LoRAs.
"""

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch

import class_walk
import tiny_models
from caf_files import worn
from family_caching import STEPS, measured, same
from nibble.accel.caching.calibration_recorder import OTHER_SIZE
from nibble.accel.caching.teacache import IDENTITY, Polynomial
from nibble.nodes.bridge.caching.apply import apply_smoothcache, apply_teacache, notes
from nibble.nodes.bridge.caching.measure import Measurement, measure
from nibble.nodes.bridge.caching.settings import SmoothCacheSettings, TeaCacheSettings
from nibble.nodes.bridge.caf import sample
from nibble.nodes.bridge.host.progress import Progress
from nibble.nodes.bridge.quantized import layouts

# ---- Flux KV Cache: the reference pictures' tokens are there at the first step alone


EDITS = "flux2"


def with_reference() -> list:
    [[tokens, extras]] = tiny_models.prompt(EDITS)
    picture = tiny_models.latent(EDITS, seed=5)
    return [[tokens, extras | {"reference_latents": [picture]}]]


def edited(model, steps: int = STEPS) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": with_reference()})
    noise = tiny_models.latent(EDITS)
    return guider.sample(
        noise,
        noise * 0,
        comfy.samplers.sampler_object("euler"),
        tiny_models.schedule(model, steps),
        disable_pbar=True,
        seed=1,
    )


@pytest.fixture
def kept():
    """A tiny FLUX.2 with ComfyUI's node."""
    from comfy_extras.nodes_flux import FluxKVCache

    return FluxKVCache.execute(tiny_models.build(EDITS)).result[0]


REUSING = {
    "TeaCache": TeaCacheSettings(3.0, rule="teacache", coefficients=Polynomial((0.0,))),
    "TeaCache, probing": TeaCacheSettings(
        3.0, rule="teacache", coefficients=Polynomial((0.0,)), feature="first_residual"
    ),
    "blocks, by error": TeaCacheSettings(3.0, level="blocks", order=0),
    "whole steps": TeaCacheSettings(3.0, order=0),
}


@pytest.mark.parametrize("how", REUSING)
def test_a_kv_cache_of_reference_pictures_goes_with_teacache(kept, how):
    plain, records = edited(kept), []
    never = TeaCacheSettings(0.0, rule="teacache", coefficients=IDENTITY)
    assert torch.equal(edited(apply_teacache(kept, never)), plain)
    found = edited(apply_teacache(kept, REUSING[how], watch=records.append))
    assert records[-1].reused > 0
    if how != "whole steps":
        assert records[-1].cells[1].computed, "what was kept is of other tokens"
    assert (found - plain).norm() < 0.5 * plain.norm()


@pytest.mark.parametrize("depth", ["block", "sublayer"])
def test_a_kv_cache_of_reference_pictures_goes_with_smoothcache(kept, depth):
    plain, records = edited(kept), []
    settings = SmoothCacheSettings(alpha=0.1, depth=depth, order=0)
    free = measured(kept, EDITS, error=0.0)
    found = edited(apply_smoothcache(kept, settings, free, records.append))
    assert records[-1].work < STEPS
    assert (found - plain).norm() < 0.5 * plain.norm()


def test_a_kv_cache_of_reference_pictures_can_be_calibrated(kept):
    found = measure(
        Measurement(
            model=kept,
            positive=with_reference(),
            negative=None,
            cfg=1.0,
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=tiny_models.schedule(kept, 8),
            latent={"samples": tiny_models.latent(EDITS) * 0},
            seed=1,
        ),
        Progress("measuring"),
    )
    for kind in ("double", "double.img_mlp"):
        one_step = found.curves[kind].mean[0]
        assert one_step[0] > 0.4 * OTHER_SIZE, "the first step's tokens fit no other step"
        assert max(one_step[1:]) < 10
    plain = edited(kept, 8)
    for depth in ("step", "block", "sublayer"):
        patched = apply_smoothcache(kept, SmoothCacheSettings(alpha=3.0, depth=depth), found)
        assert (edited(patched, 8) - plain).norm() < 0.5 * plain.norm()


# ---- the AR sampler: every call moves on the keys and values that the model keeps


def continued(model) -> torch.Tensor:
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": tiny_models.prompt("wan causal")})
    noise = tiny_models.latent("wan causal")
    sampler = comfy.samplers.KSAMPLER(
        comfy.k_diffusion.sampling.sample_ar_video, {"num_frame_per_block": 1}
    )
    sigmas = tiny_models.schedule(model, STEPS)
    return guider.sample(noise, noise * 0, sampler, sigmas, disable_pbar=True, seed=1)


def test_nothing_is_skipped_of_a_video_made_frame_by_frame():
    model = tiny_models.build("wan causal")
    plain = continued(model)
    assert torch.isfinite(plain).all()
    cached = {
        "TeaCache": (TeaCacheSettings(3.0, order=0), apply_teacache),
        "SmoothCache": (SmoothCacheSettings(budget=3, order=0), apply_smoothcache),
    }
    for settings, apply in cached.values():
        patched = apply(model, settings)
        assert torch.equal(continued(patched), plain)
        assert not same(
            tiny_models.sample(patched, "wan causal", STEPS),
            tiny_models.sample(model, "wan causal", STEPS),
        ), "other samplers see a model like any other"
        assert any("every step is computed" in note for note in notes(model, settings))


# ---- HiDream-O1 keeps the keys and values of its prompt, whatever its weights are by then


O1 = "hidream o1"


def without_prefix(model):
    """The same model, which keeps nothing: it does not where a block is replaced."""
    model = model.clone()
    model.set_model_patch_replace(None, "dit", "no such block", 99)
    return model


def test_a_prompt_that_was_drawn_before_is_drawn_with_the_lora(tmp_path, monkeypatch):
    class_walk.widen(monkeypatch)
    model = class_walk.load(O1, class_walk.quantized(O1, tmp_path), monkeypatch)
    plain = class_walk.draw(model, O1)
    ours = {layer for layer, m in class_walk.linears(model).items() if layouts.is_ours(m.weight)}
    lora = class_walk.lora_tensors(tiny_models.build(O1), ours)
    worn_lora = class_walk.with_lora(model, lora)
    wanted = class_walk.draw(without_prefix(worn_lora), O1)
    class_walk.draw(model, O1)
    assert class_walk.relative(class_walk.draw(worn_lora, O1), wanted) < 1e-3
    assert class_walk.relative(class_walk.draw(model, O1), plain) < 1e-3


def test_each_of_caf_s_heads_reads_the_prompt_itself():
    model = worn(tiny_models.build(O1), seed=0)

    def drawn(patcher) -> torch.Tensor:
        guider = comfy.samplers.CFGGuider(patcher)
        guider.inner_set_conds({"positive": tiny_models.prompt(O1)})
        noise = tiny_models.latent(O1)
        levels = sample.sigmas(patcher, 2)
        return guider.sample(noise, noise * 0, sample.sampler(), levels, disable_pbar=True, seed=1)

    assert class_walk.relative(drawn(model), drawn(without_prefix(model))) < 1e-4
    assert not model.model.diffusion_model._kv_cache_entries
