"""What a reused step gives, on a tiny model of every family, against the rule's formula worked out
with plain forward hooks on the model's own uncached calls. The last value is held; j is the last
computed step:

    whole steps   x0 = (x - b v_j) / r,  v_j = (x_j - r_j x0_j) / b_j    (accel/caching/flow_time)
    blocks        what the last block gives = what the first was given + (the same difference)_j
    one block     out = in + (out - in)_j, of the image's tokens and of the text's
    one part      out = out_j

ComfyUI's blocks write into their inputs, models into what blocks return: both must show nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, contextmanager

import pytest
import torch
from comfy.model_sampling import CONST

import tiny_models
from family_caching import STEPS, Spy, measured, same
from nibble.accel.caching.teacache import Polynomial
from nibble.nodes.bridge.caching.apply import apply_smoothcache, apply_teacache
from nibble.nodes.bridge.caching.models import block_list, family_of, level_of
from nibble.nodes.bridge.caching.settings import SmoothCacheSettings, TeaCacheSettings

# of blocks that return the text's tokens, too: which of the two are the image's
SECOND = {
    "QwenImageTransformer2DModel",
    "LensTransformer2DModel",
    "MageFlowTransformer2DModel",
    "OpenAISignatureMMDITWrapper",
    "MMDiT",
}
IMAGE_FIRST = {"HiDreamImageTransformer2DModel"}  # in a stream of both
ALWAYS = TeaCacheSettings(
    threshold=3.0, rule="teacache", order=0, coefficients=Polynomial((0.0,)), feature="tokens"
)
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module", params=tiny_models.FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_models.build(family)


class Watched:
    """Forward hooks on modules: the inputs and outputs of each in the last call; `replaced` gives
    other outputs, None for its own.
    """

    def __init__(self, modules: list[torch.nn.Module], replaced: Callable | None = None):
        self.given: dict[int, list[torch.Tensor]] = {}
        self.gave: dict[int, list[torch.Tensor]] = {}
        self.modules, self.replaced = modules, replaced

    def __enter__(self) -> Watched:
        self._stack = ExitStack()
        for number, module in enumerate(self.modules):
            if hasattr(module, "forward_gen"):  # Wan Animate 2 calls this in forward's place
                self._stack.enter_context(self._around_method(number, module))
                continue
            for handle in (
                module.register_forward_pre_hook(self._before(number), with_kwargs=True),
                module.register_forward_hook(self._after(number)),
            ):
                self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @contextmanager
    def _around_method(self, number: int, module: torch.nn.Module):
        own = module.forward_gen

        def watched(*args, **kwargs):
            self._before(number)(module, args, kwargs)
            out = own(*args, **kwargs)
            new = self._after(number)(module, args, out)
            return out if new is None else new

        module.forward_gen = watched
        yield
        del module.forward_gen

    def _before(self, number: int):
        def note(_module, args, kwargs):
            self.given[number] = [
                value.clone()
                for value in (*args, *kwargs.values())
                if isinstance(value, torch.Tensor)
            ]

        return note

    def _after(self, number: int):
        def note(_module, _inputs, out):
            parts = out if isinstance(out, tuple) else (out,)
            self.gave[number] = [None if part is None else part.clone() for part in parts]
            if self.replaced is None:
                return None
            new = self.replaced(self, number)
            if new is None:
                return None
            return tuple(new) if isinstance(out, tuple) else new[0]

        return note

    def input_of(self, number: int, out: torch.Tensor) -> torch.Tensor:
        """The first input of that shape: the stream that it was made from."""
        return next(value for value in self.given[number] if value.shape == out.shape)


def differences(watched: Watched, number: int) -> list[torch.Tensor | None]:
    return [
        None if out is None else out - watched.input_of(number, out) for out in watched.gave[number]
    ]


def last_computed(computed: list[bool], step: int) -> int:
    return max(i for i in range(step) if computed[i])


def assert_reused(spy: Spy, computed: list[bool], expected: Callable[[int, int], torch.Tensor]):
    """Computed calls are the model's own bit for bit, reused ones are expected(step, j)."""
    assert len(spy.calls) == STEPS
    assert not all(computed)
    for step, own in enumerate(computed):
        found = spy.calls[step][-1]
        if own:
            assert torch.equal(found, spy.plain(step)), step
        else:
            wanted = expected(step, last_computed(computed, step))
            size = wanted.abs().max()
            torch.testing.assert_close(found / size, wanted / size, **CLOSE)


# ---- whole steps


def test_a_reused_step_leads_where_the_last_velocity_points(model, family):
    spy, records = Spy(model), []
    settings = SmoothCacheSettings(budget=3, order=0)
    tiny_models.sample(apply_smoothcache(spy.model, settings, watch=records.append), family, STEPS)
    levels = model.get_model_object("model_sampling")
    data = getattr(levels, "sigma_data", 1.0)
    noise = getattr(levels, "noise_scale", 1.0)
    fades = isinstance(levels, CONST)

    def sizes(call: int) -> tuple:
        """x, sigma, b and r of a call."""
        x, sigma = spy.calls[call][0][:2]
        sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
        b = noise * sigma
        return x, b, (1 - sigma if fades else 1) + b / data

    def expected(step: int, j: int) -> torch.Tensor:
        x_j, b_j, r_j = sizes(j)
        velocity = (x_j - r_j * spy.calls[j][-1]) / b_j
        x, b, r = sizes(step)
        return (x - b * velocity) / r

    assert_reused(spy, [cell.computed for _, cell in sorted(records[-1].cells.items())], expected)


# ---- inside the model


@pytest.fixture
def blocks(model) -> list[torch.nn.Module]:
    if level_of(model) == "step":
        pytest.skip("its whole steps are reused")
    network = model.model.diffusion_model
    return [block for kind in family_of(network).blocks for block in block_list(network, kind)]


def test_a_reused_step_adds_what_all_blocks_added_before(model, family, blocks):
    spy, records = Spy(model), []
    tiny_models.sample(apply_teacache(spy.model, ALWAYS, watch=records.append), family, STEPS)
    name = type(model.model.diffusion_model).__name__
    ends = [blocks[0], blocks[-1]] if len(blocks) > 1 else blocks

    def image(parts: list[torch.Tensor]) -> torch.Tensor:
        return parts[name in SECOND] if len(parts) > 1 else parts[0]

    def place(whole: torch.Tensor, tokens: int) -> slice:
        """Where the image's tokens are in a stream."""
        length = whole.shape[1]
        return slice(0, tokens) if name in IMAGE_FIRST else slice(length - tokens, length)

    def entered(watched: Watched) -> torch.Tensor:
        return watched.input_of(0, image(watched.gave[0]))

    def expected(step: int, j: int) -> torch.Tensor:
        with Watched(ends) as before:
            spy.plain(j)
        first, last = entered(before), image(before.gave[len(ends) - 1])
        added = (last[:, place(last, first.shape[1])] if last.ndim < 5 else last) - first

        def replaced(now: Watched, number: int):
            if number != len(ends) - 1:
                return None
            new, start = list(now.gave[number]), entered(now)
            own = new[len(new) > 1 and name in SECOND]
            if own.ndim < 5:
                own[:, place(own, start.shape[1])] = start + added
            else:
                own.copy_(start + added)
            return new

        with Watched(ends, replaced):
            return spy.plain(step)

    assert_reused(spy, [cell.computed for _, cell in sorted(records[-1].cells.items())], expected)


def scheduled(model, family: str, depth: str) -> tuple[Spy, list[bool]]:
    """A run in which every part is reused at the same steps."""
    spy, records = Spy(model), []
    settings = SmoothCacheSettings(alpha=0.1, depth=depth, order=0)
    free = measured(spy.model, family, error=0.0)
    tiny_models.sample(apply_smoothcache(spy.model, settings, free, records.append), family, STEPS)
    masks = [[computed for _, computed in sorted(row.items())] for row in records[-1].rows.values()]
    assert all(mask == masks[0] for mask in masks)
    return spy, masks[0]


def test_a_reused_block_adds_what_it_added_before(model, family, blocks):
    spy, computed = scheduled(model, family, "block")

    def expected(step: int, j: int) -> torch.Tensor:
        with Watched(blocks) as before:
            spy.plain(j)
        added = {number: differences(before, number) for number in range(len(blocks))}

        def replaced(now: Watched, number: int):
            if None in added[number]:  # a block without the text's tokens is computed
                return None
            return [now.input_of(number, change) + change for change in added[number]]

        with Watched(blocks, replaced):
            return spy.plain(step)

    assert_reused(spy, computed, expected)


def modules_of(block, kind, part: str) -> list[torch.nn.Module]:
    """What gives a part's result: of an attention among a block's own lines, its projections."""
    if part == "attn" and kind.joint:
        return [getattr(block, name).proj for name in kind.joint]
    module = getattr(block, part, None)
    return [] if module is None else [module]


def test_a_reused_part_gives_what_it_gave_before(model, family, blocks):
    kinds = family_of(model.model.diffusion_model).blocks
    network = model.model.diffusion_model
    whole = [b for kind in kinds if not kind.parts for b in block_list(network, kind)]
    parts = [
        module
        for kind in kinds
        for block in block_list(network, kind)
        for part in kind.parts
        for module in modules_of(block, kind, part)
    ]
    if not parts:
        pytest.skip("its blocks are reused whole")
    spy, computed = scheduled(model, family, "sublayer")
    modules = whole + parts

    def expected(step: int, j: int) -> torch.Tensor:
        with Watched(modules) as before:
            spy.plain(j)
        added = {number: differences(before, number) for number in range(len(whole))}

        def replaced(now: Watched, number: int):
            if number >= len(whole):
                return before.gave[number]
            return [now.input_of(number, change) + change for change in added[number]]

        with Watched(modules, replaced):
            return spy.plain(step)

    assert_reused(spy, computed, expected)


def test_nothing_of_it_is_seen_afterwards(model, family):
    """The plain model draws as it did before any of these runs."""
    assert same(
        tiny_models.sample(model, family, STEPS),
        tiny_models.sample(tiny_models.build(family), family, STEPS),
    )
