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
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in tensors_of((self.args, self.kwargs)))

    def to(self, device: torch.device | str) -> "Call":
        """The same on a device, cloned: a block may change its inputs in place."""
        return Call(*mapped((self.args, self.kwargs), lambda tensor: tensor.to(device, copy=True)))


class _Reached(Exception):
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
    tensors: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            tensors.append(tensor)
        return tensor

    mapped(value, keep)
    return tensors


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


def inputs_of(
    model: nn.Module, name: str, times: int, calls: Iterable[Call], device: torch.device | str
) -> list[Call]:
    """What a module is given during the calls, on the CPU; each call ends when the module was
    reached `times` times.
    """
    given: list[Call] = []

    def keep(_module, args, kwargs) -> None:
        given.append(Call(_own(args, "cpu"), _own(kwargs, "cpu")))

    handle = model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True)
    with hooks(handle):
        _replay(model, name, times, calls, device)
    return given


def outputs_of(
    model: nn.Module, name: str, times: int, calls: Iterable[Call], device: torch.device | str
) -> list[list[Tensor]]:
    """What a module gives: the float tensors of its results, in the same way."""
    results: list[list[Tensor]] = []

    def keep(_module, _args, result) -> None:
        results.append([tensor.detach().to("cpu", copy=True) for tensor in tensors_of(result)])

    with hooks(model.get_submodule(name).register_forward_hook(keep)):
        _replay(model, name, times, calls, device)
    return results


@torch.no_grad()
def _replay(
    model: nn.Module, name: str, times: int, calls: Iterable[Call], device: torch.device | str
) -> None:
    """Calls the model as it was called; each call ends once the module was through `times`
    times.
    """
    reached = 0

    def count(*_) -> None:
        nonlocal reached
        reached += 1
        if reached == times:
            raise _Reached

    with hooks(model.get_submodule(name).register_forward_hook(count)):
        for call in calls:
            reached = 0
            arguments = call.to(device)
            try:
                model(*arguments.args, **arguments.kwargs)
            except _Reached:
                continue


def beside(model: nn.Module, shared: Iterable[str]) -> nn.Module:
    """A copy of a model that shares the named modules with it: putting others in their places
    leaves the model as it is, and needs no memory.
    """
    memo = {id(module): module for module in map(model.get_submodule, shared)}
    return copy.deepcopy(model, memo).requires_grad_(False)
