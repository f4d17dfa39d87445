"""Running a model once more on what it read before, and looking into its blocks: for any nn.Module,
by hooks alone.

A trajectory is recorded as the calls of the model that its sampler made: noisy latents, times,
conditioning. Teacher and student are then given the same calls, so that both see the teacher's x_t
at every time (VQ4DiT, Deng et al., 2024, arXiv:2408.17131, section 3.3: a student on its own
trajectory would soon be asked for something else than the teacher).
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Call:
    """Arguments of a module, with tensors of their own."""

    args: tuple
    kwargs: dict

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return sum(tensor.nbytes for tensor in tensors_of((self.args, self.kwargs)))

    def to(self, device: torch.device | str) -> "Call":
        """The same on a device, cloned: a block may change its inputs in place."""
        return Call(*mapped((self.args, self.kwargs), lambda tensor: tensor.to(device, copy=True)))


class _Seen(Exception):
    """The block of interest is through: the rest of the model need not run."""


def mapped(value, change: Callable[[Tensor], Tensor]):
    """A nest of tuples, lists and dicts with every tensor changed; anything else is passed on as it
    is.
    """
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(item, change) for item in value)
    if type(value) is dict:
        return {key: mapped(item, change) for key, item in value.items()}
    return value


def tensors_of(value) -> list[Tensor]:
    """All floating-point tensors of such a nest, in order."""
    found: list[Tensor] = []
    mapped(value, lambda tensor: found.append(tensor) if tensor.is_floating_point() else None)
    return found


@contextmanager
def hooks(*handles) -> Iterator[None]:
    """Removes hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _own(value, device=None):
    return mapped(value, lambda tensor: tensor.detach().to(device or tensor.device, copy=True))


def record(model: nn.Module, run: Callable[[], None]) -> list[Call]:
    """Every call of the model that run() makes."""
    calls: list[Call] = []

    def remember(_module, args, kwargs):
        calls.append(Call(_own(args), _own(kwargs)))

    with hooks(model.register_forward_pre_hook(remember, with_kwargs=True)), torch.no_grad():
        run()
    return calls


def order(
    model: nn.Module, names: Iterable[str], call: Call, device: torch.device | str
) -> dict[str, int]:
    """The named modules in the order in which a call reaches them, and how often it does."""
    reached: dict[str, int] = {}

    def counter(name: str):
        def count(*_):
            reached[name] = reached.get(name, 0) + 1

        return count

    handles = [model.get_submodule(name).register_forward_pre_hook(counter(name)) for name in names]
    with hooks(*handles), torch.no_grad():
        given = call.to(device)
        model(*given.args, **given.kwargs)
    return reached


@torch.no_grad()
def visit(
    model: nn.Module,
    name: str,
    times: int,
    calls: Iterable[Call],
    device: torch.device | str,
    inputs: bool = False,
    outputs: bool = False,
) -> tuple[list[Call], list[list[Tensor]]]:
    """What a module is given, and what it gives, during the calls; each call ends when the module
    was reached `times` times.

    Returns its arguments and the float tensors of its results, on the CPU.
    """
    given: list[Call] = []
    results: list[list[Tensor]] = []
    seen = {"count": 0}

    def before(_module, args, kwargs):
        if inputs:
            given.append(Call(_own(args, "cpu"), _own(kwargs, "cpu")))

    def after(_module, _args, result):
        if outputs:
            results.append([tensor.detach().to("cpu", copy=True) for tensor in tensors_of(result)])
        seen["count"] += 1
        if seen["count"] == times:
            raise _Seen

    module = model.get_submodule(name)
    with hooks(
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ):
        for call in calls:
            seen["count"] = 0
            here = call.to(device)
            try:
                model(*here.args, **here.kwargs)
            except _Seen:
                continue
    return given, results


def beside(model: nn.Module, shared: Iterable[str]) -> nn.Module:
    """A copy of a model that shares the named modules with it: putting others in their places
    leaves the model as it is, and needs no memory.
    """
    memo = {id(module): module for module in map(model.get_submodule, shared)}
    return copy.deepcopy(model, memo).requires_grad_(False)
