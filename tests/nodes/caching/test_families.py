"""Caching on a tiny random model of every transformer family of ComfyUI: exact where it computes,
gone when it is done.
"""

import re

import comfy.model_management
import comfy.model_patcher
import pytest
import torch

import tiny_models
from caching_runs import traces
from checkout import ROOT
from family_caching import STEPS, Spy, latents, measured, same
from nibble.accel.caching.teacache import Polynomial
from nibble.nodes.bridge.caching.apply import apply_smoothcache, apply_teacache
from nibble.nodes.bridge.caching.models import level_of
from nibble.nodes.bridge.caching.settings import SmoothCacheSettings, TeaCacheSettings

HELP = ROOT / "web" / "docs" / "NibbleApplyTeaCache.md"
# reuses wherever it may
ALWAYS = TeaCacheSettings(threshold=3.0, rule="teacache", order=0, coefficients=Polynomial((0.0,)))
NEVER = TeaCacheSettings(threshold=0.0, rule="teacache", coefficients=Polynomial((1.0, 0.0)))
# the same for a model of whole steps: its rule would look at errors first
HALF = SmoothCacheSettings(budget=3, order=0)


def cached(model, settings):
    """The model with caching, and the list whose last entry is the run's record."""
    records = []
    if settings is ALWAYS and level_of(model) == "step":
        return apply_smoothcache(model, HALF, watch=records.append), records
    return apply_teacache(model, settings, watch=records.append), records


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family):
    """Built once a family: every test sees that it leaves nothing on it."""
    return tiny_models.build(family)


@pytest.fixture(scope="module")
def plain(model, family):
    """The run without caching."""
    return tiny_models.sample(model, family, STEPS)


def test_a_threshold_of_zero_changes_no_bit(model, family):
    patched, records = cached(model, NEVER)
    batch = 1 if family == "minimax h3" else 2  # ComfyUI's own takes no more
    alone = tiny_models.sample(model, family, STEPS, batch=batch, cfg=3.0)
    before = traces(model)
    assert same(tiny_models.sample(patched, family, STEPS, batch=batch, cfg=3.0), alone)
    assert records[-1].reused == 0
    assert len(records[-1].cells) == STEPS
    assert traces(model) == before


def test_reuse_works_and_computed_steps_are_exact(model, family, plain):
    spy = Spy(model)
    patched, records = cached(spy.model, ALWAYS)
    before = traces(model)
    result = tiny_models.sample(patched, family, STEPS)
    computed = [cell.computed for _, cell in sorted(records[-1].cells.items())]
    assert computed[0]
    assert computed[-1]
    assert computed.count(False) >= STEPS - 3
    assert len(spy.calls) == STEPS
    exact = [torch.equal(spy.plain(call), spy.calls[call][-1]) for call in range(STEPS)]
    assert exact == computed, "a computed step is the model's own, bit for bit; a reused one is not"
    assert all(torch.isfinite(part).all() for part in latents(result))
    assert not same(result, plain)
    assert traces(model) == before


def test_prompts_keep_their_own_results_together_and_apart(model, family, monkeypatch):
    """Positive and negative prompt in one call of the model, or in two where memory is short: the
    same picture.
    """
    if family in ("ace-step 1.5", "seedvr 2"):
        pytest.skip("ComfyUI's model itself gives other results when prompts share a batch")
    together = tiny_models.sample(cached(model, ALWAYS)[0], family, STEPS, cfg=3.0)
    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "get_free_memory", lambda *_: 0)
    spy = Spy(model)
    patched, records = cached(spy.model, ALWAYS)
    apart = tiny_models.sample(patched, family, STEPS, cfg=3.0)
    assert len(spy.calls) == 2 * STEPS
    assert records[-1].reused >= STEPS - 3
    for one, other in zip(latents(together), latents(apart), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=2e-3 * one.abs().max().item())


def test_blocks_and_their_parts_are_reused_by_a_schedule(model, family, plain):
    level = level_of(model)
    if level == "step":
        return  # its whole steps are tested above
    before = traces(model)
    for depth in ("block", "sublayer") if level == "sublayer" else ("block",):
        settings, records = SmoothCacheSettings(alpha=0.1, depth=depth, order=0), []
        exact = apply_smoothcache(model, settings, measured(model, family, error=1.0))
        assert same(tiny_models.sample(exact, family, STEPS), plain), (
            f"{depth}: where nothing may be reused, nothing changes"
        )
        reusing = apply_smoothcache(
            model, settings, measured(model, family, error=0.0), records.append
        )
        result = tiny_models.sample(reusing, family, STEPS)
        assert any(False in states.values() for states in records[-1].rows.values()), depth
        assert not same(result, plain), depth
        assert all(torch.isfinite(part).all() for part in latents(result))
        assert traces(model) == before


class Broken(Exception):
    """What a model raises in the middle of a block."""


@pytest.mark.parametrize("how", ["exception in a block", "interrupt in a reused step"])
def test_nothing_is_left_when_a_run_stops_midway(model, family, plain, how):
    before = traces(model)
    patched, _ = cached(model, ALWAYS if "interrupt" in how else NEVER)
    if "interrupt" in how:

        def stop(step, *_):  # step 3 is reused
            if step == 2:
                comfy.model_management.interrupt_current_processing(True)

        with pytest.raises(comfy.model_management.InterruptProcessingException):
            tiny_models.sample(patched, family, STEPS, callback=stop)
        comfy.model_management.interrupt_current_processing(False)
    else:
        hook = deepest_linear(model).register_forward_pre_hook(Stumble(calls=3))
        with pytest.raises(Broken):
            tiny_models.sample(patched, family, STEPS)
        hook.remove()
    assert traces(model) == before
    assert same(tiny_models.sample(model, family, STEPS), plain)


class Stumble:
    """A hook that raises when its layer is called for the n-th time."""

    def __init__(self, calls: int):
        self.left = calls

    def __call__(self, *_) -> None:
        self.left -= 1
        if self.left == 0:
            raise Broken


def deepest_linear(model) -> torch.nn.Module:
    """A Linear inside a block, where hooks of ours are at work around it."""
    linears = {
        name: module
        for name, module in model.model.diffusion_model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor)
        and module.weight.ndim == 2
        and re.match(r"((decoder|language_model|transformer)\.)?\w*(blocks|layers)\.", name)
    }
    return max(linears.items(), key=lambda item: item[0].count("."))[1]


def test_the_help_page_tells_every_family_and_its_depth():
    """The table's first column names the family, its second the depth, as it was found here."""
    rows = re.findall(
        r"^\| ([^|]+?) \| (whole steps|blocks|blocks and their parts) \|",
        HELP.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    told = {name.strip().lower(): depth for name, depth in rows}
    found = {
        family: {"step": "whole steps", "blocks": "blocks", "sublayer": "blocks and their parts"}[
            level_of(tiny_models.build(family))
        ]
        for family in tiny_models.FAMILIES
    }
    assert found.items() <= told.items(), {
        family: depth for family, depth in found.items() if told.get(family) != depth
    }
