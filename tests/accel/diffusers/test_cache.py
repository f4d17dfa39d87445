"""Caching around diffusers' transformers: what is computed, what is guessed, and that nothing stays
behind. The guesses are held against the rules of accel/caching by hand.
"""

import math

import diffusers
import pytest
import torch

import tiny_diffusers
from nibble.accel.caching.error_control import ErrorControl
from nibble.accel.caching.extrapolate import History, Reuse
from nibble.accel.caching.steps import Step, Window
from nibble.accel.diffusers import cache
from nibble.accel.diffusers.outputs import tensors_of, with_tensors
from nibble.accel.diffusers.schedules import flow_times
from nibble.demo import pictures, prompts
from nibble.quant import diffusers as models
from tiny_diffusers import FAMILIES, build

STEPS = 10


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_what_it_is_told_and_is_its_own_again(name):
    loop = build(name)
    plain = loop(STEPS)
    streams = 2 if loop.guided else 1
    with cache(loop, "budget", budget=5) as caching:
        cached = loop(STEPS)
        record = caching.record
        assert (record.computed, record.reused) == (5, 5)
        assert (record.calls, record.computed_calls) == (10 * streams, 5 * streams)
        assert cached.isfinite().all() and not torch.equal(cached, plain)
        assert torch.equal(loop(STEPS), cached)  # another run begins anew
    with cache(loop, "error", threshold=0.0):
        assert torch.equal(loop(STEPS), plain)
    assert torch.equal(loop(STEPS), plain)
    assert not any("nibble_cache" in registry for registry in _hooks(loop.transformer))


def _hooks(model):
    return [m._diffusers_hook.hooks for m in model.modules() if hasattr(m, "_diffusers_hook")]


def by_hand(loop, rule, steps: int):
    """A flow's picture with whole steps guessed as a rule says: (picture, which were computed)."""
    scheduler = loop.scheduler
    scheduler.set_timesteps(steps)
    times = [float(sigma) for sigma in scheduler.sigmas]
    decider, history, computed = rule.decider(), History(rule.reuse), []
    x = tiny_diffusers.normal(*loop.shape)
    for i in range(steps):
        step = Step(i, steps, times[i], times[i])
        decision = decider.decide(step, history.nodes)
        computed.append(decision.compute)
        if decision.compute:
            with torch.no_grad():
                value = loop.call(loop.transformer, x, scheduler.timesteps[i].expand(len(x)), 1.0)
            if len(history) > rule.reuse.order:
                guess = history.guess(step.time)
                error = (guess - value).abs().mean() / value.abs().mean()
                decider.measured(step, history.nodes, float(error))
            history.store(step.time, value)
        else:
            value = history.guess(step.time)
        x = x + (times[i + 1] - times[i]) * value
    return x, computed


@pytest.mark.parametrize("order", [0, 1, 2])
def test_error_control_decides_and_guesses_as_by_hand(order):
    loop = build("flux")
    loop.scheduler.set_timesteps(24)
    times, window = flow_times(loop.scheduler), Window(first=2)
    expected, computed = by_hand(loop, ErrorControl(0.6, times, Reuse(order), window), 24)
    with cache(loop, "error", threshold=0.6, order=order, window=window) as caching:
        found = loop(24)
    cells = caching.record.cells
    assert [cells[i].computed for i in range(24)] == computed
    assert 3 < sum(computed) < 22
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def demo_flux() -> tiny_diffusers.Loop:
    """The trained demo: paths of random models are too rough to skip anything."""
    tokens, pooled = prompts.embed(prompts.word_indices(prompts.SCORED[:1]))
    guidance = torch.full((1,), 3.5)

    def call(model, x, time, prompt):
        return models.velocity(model, x, time / 1000, tokens, pooled, guidance)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=math.exp(pictures.SHIFT))
    return tiny_diffusers.Loop(pictures.load_flux(), scheduler, (1, 16, 8, 8), call)


def test_presets_compute_less_the_faster_they_are():
    counts, loop = [], demo_flux()
    for preset in ("quality", "balanced", "fast"):
        with cache(loop, preset=preset) as caching:
            loop(28)
        counts.append(caching.record.computed)
    assert 28 > counts[0] >= counts[1] > counts[2] >= 2


def test_calls_without_a_context_are_told_apart_by_their_time():
    loop = build("qwen")
    with cache(loop, "budget", budget=5):
        told = loop(STEPS)
    loop.contexts = False
    with cache(loop, "budget", budget=5) as caching:
        assert torch.equal(loop(STEPS), told)
    assert caching.record.calls == 20


def test_a_second_transformer_goes_on_counting_and_starts_its_own_guesses():
    """As Wan 2.2: one for much noise, one for little."""
    high, low = build("flux"), build("flux")
    with torch.no_grad():
        for parameter in low.transformer.parameters():
            parameter.mul_(1.1)
    low.transformer_2, call, first = low.transformer, low.call, low.transformer
    low.transformer = high.transformer
    low.call = lambda model, x, time, prompt: call(
        model if float(time[0]) > 500 else first, x, time, prompt
    )
    low.contexts = False
    with cache(low, "budget", budget=4) as caching:
        low(STEPS)
    cells = caching.record.cells
    assert sorted(cells) == list(range(STEPS))
    turn = sum(float(time) > 500 for time in low.scheduler.timesteps)
    assert cells[turn].computed and cells[turn].why == "new"


def test_another_size_in_mid_run_is_computed():
    loop = build("flux")
    call = loop.call
    seen = []

    def narrower(model, x, time, prompt):
        seen.append(len(seen))
        if len(seen) == 4:
            return call(model, x.repeat(2, 1, 1), time.repeat(2), prompt)[:1]
        return call(model, x, time, prompt)

    loop.call = narrower
    with cache(loop, "budget", budget=2) as caching:
        loop(STEPS)
    assert caching.record.cells[3].why == "new"
    assert caching.record.cells[4].why == "new"


def test_steps_that_a_pipeline_leaves_out_are_counted():
    """Image to image: the scheduler begins later, and the first call is not its first step."""
    loop = build("flux")
    set_timesteps = loop.scheduler.set_timesteps

    def later(steps):
        set_timesteps(steps)
        loop.scheduler.set_begin_index(4)

    loop.scheduler.set_timesteps = later
    with cache(loop, "budget", budget=5) as caching:
        loop.scheduler.set_timesteps(STEPS)
        x = tiny_diffusers.normal(*loop.shape)
        for time in loop.scheduler.timesteps[4:]:
            with loop.transformer.cache_context("cond"):
                loop.call(loop.transformer, x, time.expand(1), 1.0)
    assert sorted(caching.record.cells) == [4, 5, 6, 7, 8, 9]


def test_refusals_say_what_to_do():
    loop = build("flux")
    for arguments, words in (
        ({"rule": "fast"}, "rule is one of error, budget, smoothcache, teacache, not 'fast'"),
        ({"preset": "slow"}, "preset is one of quality, balanced, fast, not 'slow'"),
        ({"threshold": -1.0}, "threshold is 0"),
        ({"rule": "budget"}, "needs the number of steps to compute"),
        ({"rule": "smoothcache"}, "nibble.calibrate_cache makes one"),
        ({"rule": "teacache"}, "no published TeaCache coefficients for Flux.* of this size"),
        ({"rule": "teacache", "coefficients": "best"}, "coefficients are 'auto', 'plain' or"),
        ({"order": 7}, "order of extrapolation is 0 to 3"),
    ):
        with pytest.raises(ValueError, match=words):
            cache(loop, **arguments)
    with pytest.raises(ValueError, match="give its scheduler, too"):
        cache(loop.transformer)
    with pytest.raises(ValueError, match="has no transformer"):
        cache(object())
    with pytest.raises(ValueError, match="knows FluxTransformer2DModel.*not DiTTransformer2D"):
        cache(build("dit"), "teacache")
    assert not _hooks(loop.transformer)


def test_a_transformer_with_its_scheduler_will_do():
    loop = build("flux")
    with cache(loop.transformer, "budget", budget=3, scheduler=loop.scheduler) as caching:
        loop(STEPS)
    assert caching.record.computed == 3


def test_outputs_are_put_together_as_they_were():
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    one, two, three = torch.ones(1), torch.zeros(2), torch.full((3,), 2.0)
    for output in (
        one,
        (one,),
        (one, None, two),
        Transformer2DModelOutput(sample=one),
        ([one, two],),
    ):
        tensors = tensors_of(output)
        changed = with_tensors(output, [three] * len(tensors))
        assert type(changed) is type(output)
        assert len(tensors_of(changed)) == len(tensors)
        assert all(tensor is three for tensor in tensors_of(changed))
