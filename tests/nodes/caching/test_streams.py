"""Streams of conditioning: kept apart by everything that can tell two calls apart; ControlNets,
areas, guidance passes and second runs come out right.
"""

from types import SimpleNamespace

import comfy.controlnet
import comfy.samplers
import pytest
import torch

from caching_runs import STEPS, conditioning, draw
from nibble.accel.caching.extrapolate import Reuse
from nibble.accel.caching.mask_search import StepMask
from nibble.accel.caching.steps import Record, Step
from nibble.accel.caching.teacache import IDENTITY
from nibble.nodes.bridge.caching.apply import apply_smoothcache, apply_teacache
from nibble.nodes.bridge.caching.controlnet import Deferred
from nibble.nodes.bridge.caching.run import Run
from nibble.nodes.bridge.caching.settings import SmoothCacheSettings, TeaCacheSettings
from noise_schedules import Epsilon


@pytest.fixture
def flux(dense_model):
    return dense_model


def half(model, watch=None):
    """The model with every second step reused."""
    return apply_smoothcache(model, SmoothCacheSettings(budget=STEPS // 2), watch=watch)


def a_run(patcher=None, sampler=None) -> Run:
    sigmas = [1 - i / 4 for i in range(5)]
    return Run(sigmas, sampler, patcher, StepMask((True,) * 4), Reuse(1), None, Record(4))


X = torch.zeros(2, 16, 8, 8)


def test_streams_differ_by_uuid_window_replacement_hooks_and_tile():
    hook = SimpleNamespace(hook_ref=object(), strength=1.0)
    patcher = SimpleNamespace(current_hooks=None)
    run, number = a_run(patcher), iter(range(100))

    def stream(options):
        return run.streams_of(options, Step(0, 4, 1.0 - next(number) / 1000), X[:1])[0]

    def replaced(name):
        def skip(args, extra):
            return args

        return {"patches_replace": {"dit": {(name, 3): skip}}}

    plain = {"uuids": ["a"]}
    first = stream(plain)
    assert stream(plain) is first
    assert stream({"uuids": ["b"]}) is not first
    assert stream(plain | {"context_window": SimpleNamespace(index_list=[0, 1])}) is not stream(
        plain | {"context_window": SimpleNamespace(index_list=[1, 2])}
    )
    slg = stream(plain | replaced("double_block"))
    assert slg is not first
    assert stream(plain | replaced("double_block")) is slg
    assert stream(plain | replaced("single_block")) is not slg
    patcher.current_hooks = SimpleNamespace(hooks=[hook])
    hooked = stream(plain)
    hook.strength = 0.5
    assert hooked is not first
    assert stream(plain) is not hooked
    patcher.current_hooks = None
    tiles = [run.streams_of(plain, Step(1, 4, 0.75), X[:1])[0] for _ in range(3)]
    again = [run.streams_of(plain, Step(2, 4, 0.5), X[:1])[0] for _ in range(3)]
    assert tiles == again
    assert len({id(tile) for tile in tiles}) == 3
    assert tiles[0] is first


def test_a_batch_is_split_into_its_streams_and_a_new_resolution_forgets():
    run = a_run()
    both = run.streams_of({"uuids": ["a", "b"]}, Step(0, 4, 1.0), X)
    assert len(both) == 2
    assert both[0] is not both[1]
    assert both[0].first
    assert not both[1].first
    alone = run.streams_of({"uuids": ["b"]}, Step(1, 4, 0.75), X[:1])
    assert alone[0] is both[1]
    alone[0].history.store(0.75, X[:1])
    larger = run.streams_of({"uuids": ["b"]}, Step(2, 4, 0.5), torch.zeros(1, 16, 16, 16))
    assert larger[0] is both[1]
    assert len(larger[0].history) == 0


def test_steps_are_counted_where_the_sampler_allows_it_and_read_elsewhere():
    counted = a_run(sampler=comfy.samplers.sampler_object("euler"))
    assert counted.counted
    assert counted.step(None).index == 0  # the noise level is never looked at
    counted.stepped()
    assert counted.step(None) == Step(1, 4, 0.75, 0.75)
    assert not a_run(sampler=comfy.samplers.sampler_object("heun")).counted
    assert a_run().step(torch.tensor([0.52])).index == 2


def adds_noise(sampler) -> bool:
    """Whether a run of a denoiser that answers x / 2 draws noise after its beginning."""

    def denoiser(x, sigma, model_options, **_):
        for told in model_options.get("sampler_post_cfg_function", ()):
            told({"denoised": x / 2, "uncond_denoised": x / 3})
        return x / 2

    denoiser.inner_model = SimpleNamespace(
        inner_model=SimpleNamespace(model_sampling=Epsilon()),
        model_patcher=SimpleNamespace(get_model_object=lambda _: Epsilon()),
    )
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        options = {"model_options": {}, "seed": seed}
        x = torch.ones(1, 4, 4, 4)
        sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0])
        function = sampler.sampler_function
        found.append(
            function(denoiser, x, sigmas, extra_args=options, disable=True, **sampler.extra_options)
        )
    return not torch.equal(*found)


# these take other arguments, and draw no noise
OTHERS = {"dpm_fast", "dpm_adaptive", "uni_pc", "uni_pc_bh2"}


def test_samplers_that_add_noise_are_known():
    """Every sampler of ComfyUI, with two seeds."""
    samplers = {
        name: comfy.samplers.sampler_object(name)
        for name in comfy.samplers.SAMPLER_NAMES
        if name not in OTHERS
    }
    samplers["churned"] = comfy.samplers.ksampler("euler", {"s_churn": 2.0})
    known = {name: a_run(sampler=sampler).noisy for name, sampler in samplers.items()}
    assert known == {name: adds_noise(sampler) for name, sampler in samplers.items()}
    assert known["seeds_2"]
    assert known["seeds_3"]
    assert not known["res_multistep"]


def test_cond_and_uncond_together_or_apart_draw_the_same(flux, monkeypatch):
    together = draw(half(flux), cfg=3.0)
    monkeypatch.setattr(flux.model, "memory_required", lambda *args, **kwargs: 1e30)
    seen = []
    apart = draw(half(flux, seen.append), cfg=3.0)
    assert seen[-1].calls == 2 * STEPS
    assert torch.allclose(together, apart, atol=1e-4)


def test_two_samplers_in_one_graph_and_a_second_pass_at_another_size(flux):
    patched = half(flux)
    small, large, other = (
        draw(patched),
        draw(patched, side=12),
        draw(patched, positive=conditioning(8)),
    )
    assert torch.equal(draw(half(flux)), small)
    assert torch.equal(draw(half(flux), side=12), large)
    assert torch.equal(draw(half(flux), positive=conditioning(8)), other)


def test_areas_have_streams_of_their_own(flux):
    areas = conditioning(0, area=(8, 4, 0, 0), strength=1.0) + conditioning(
        1, area=(8, 4, 0, 4), strength=1.0
    )
    assert torch.equal(
        draw(apply_teacache(flux, TeaCacheSettings(0.0)), positive=areas),
        draw(flux, positive=areas),
    )
    seen = []
    found = draw(half(flux, seen.append), positive=areas)
    plain = draw(flux, positive=areas)
    assert seen[-1].computed == STEPS // 2
    assert (found - plain).square().mean() < 0.1 * plain.square().mean()


def test_skip_layer_guidances_pass_is_not_mixed_with_the_others(flux):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def guided(model):
        return SkipLayerGuidanceDiT.execute(model, 2.0, 0.0, 1.0, "", "1").result[0]

    plain = draw(guided(flux), cfg=3.0)
    for settings in (
        TeaCacheSettings(0.0),
        TeaCacheSettings(0.0, rule="teacache", coefficients=IDENTITY),
    ):
        assert torch.equal(draw(guided(apply_teacache(flux, settings)), cfg=3.0), plain)
    found = draw(guided(half(flux)), cfg=3.0)
    reused = apply_teacache(flux, TeaCacheSettings(0.5, rule="teacache", coefficients=IDENTITY))
    for drawn in (found, draw(guided(reused), cfg=3.0)):
        assert (drawn - plain).square().mean() < 0.1 * plain.square().mean()


class Control(comfy.controlnet.ControlBase):
    """A ControlNet of one ramp (norms would take out a constant), added behind the first double and
    the first single block, that counts how often it is run.
    """

    def __init__(self):
        super().__init__()
        self.runs = 0

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
        self.runs += 1
        add = torch.linspace(-1, 1, 128).expand(1, 16, 128)
        return {"input": [add], "middle": [], "output": [add]}

    def pre_run(self, model, percent_to_timestep_function):
        """Nothing to prepare."""

    def get_models(self):
        return []

    def copy(self):
        return self


CACHED = {
    "steps": lambda m, w: half(m, w),
    "blocks": lambda m, w: apply_teacache(
        m, TeaCacheSettings(0.5, rule="teacache", coefficients=IDENTITY), watch=w
    ),
    "blocks, by error": lambda m, w: apply_teacache(
        m, TeaCacheSettings(0.5, level="blocks"), watch=w
    ),
}


@pytest.mark.parametrize("level", CACHED)
def test_a_controlnet_runs_for_computed_steps_only_and_its_effect_stays(flux, level):
    bare, control = draw(flux), Control()
    plain = draw(flux, positive=conditioning(0, control=control))
    assert control.runs == STEPS
    assert not torch.allclose(bare, plain, atol=1e-3)
    zero = apply_teacache(
        flux,
        TeaCacheSettings(
            0.0, **({} if level == "steps" else {"rule": "teacache", "coefficients": IDENTITY})
        ),
    )
    assert torch.equal(draw(zero, positive=conditioning(0, control=control)), plain)
    seen, control = [], Control()
    found = draw(CACHED[level](flux, seen.append), positive=conditioning(0, control=control))
    assert control.runs == seen[-1].computed < STEPS
    assert (found - plain).square().mean() < 0.5 * (bare - plain).square().mean()


def test_a_promise_is_kept_once_and_empty_when_the_step_is_reused():
    asked = []
    promise = Deferred(lambda: asked.append(1) or {"input": [1, 2]})
    promise.skip = True
    assert promise.get("input") == []
    assert "input" not in promise
    assert asked == []
    promise.skip = False
    assert promise.get("input") == [1, 2]
    assert promise["input"] == [1, 2]
    assert "input" in promise
    assert promise.get("output") == []
    assert asked == [1]
    nothing = Deferred(lambda: None)
    assert nothing.resolve() is None
    assert nothing.get("input") == []
