"""The forward passes of blocks that were not written for training: blocks that write to their
inputs, and blocks whose activations are computed again in the backward pass.

Recomputation is torch's own (`torch.utils.checkpoint`; Chen et al. 2016, arXiv:1604.06174).
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

_MOST_STORAGES = 4096  # remembered before the dead ones are looked for


class _Saved:
    """A tensor that the backward pass needs."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


class _SavedTensors:
    """Knows what was saved for the backward pass, by storage, and copies it before it is written
    to.
    """

    def __init__(self) -> None:
        self._by_storage: dict[int, weakref.WeakSet[_Saved]] = {}

    def save(self, tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())
        if type(tensor) is Tensor and tensor.is_floating_point():
            if len(self._by_storage) > _MOST_STORAGES:
                self._by_storage = {at: alive for at, alive in self._by_storage.items() if alive}
            storage = tensor.untyped_storage().data_ptr()
            self._by_storage.setdefault(storage, weakref.WeakSet()).add(saved)
        return saved

    def before_write(self, tensor: Tensor) -> None:
        """Copies what lies in the storage of a tensor that is about to be written to."""
        for saved in self._by_storage.pop(tensor.untyped_storage().data_ptr(), ()):
            saved.tensor = saved.tensor.clone()


class _WriteWatch(TorchFunctionMode):
    """Reports every write before it happens: x += y, x.mul_(y), x[i] = y, out=x."""

    def __init__(self, saved: _SavedTensors) -> None:
        super().__init__()
        self.saved = saved

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        kwargs = kwargs or {}
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        target = args[0] if writes and args else kwargs.get("out")
        if type(target) is Tensor:
            self.saved.before_write(target)
        return func(*args, **kwargs)


@contextlib.contextmanager
def _wrapped(blocks: Iterable[nn.Module], wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """While entered, each block's forward is wrap(forward)."""
    blocks = list(blocks)
    before = [vars(block).get("forward") for block in blocks]
    for block in blocks:
        block.forward = wrap(block.forward)
    try:
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def allowing_writes(blocks: Iterable[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Lets blocks be trained through that write to tensors which the backward pass needs, as
    ComfyUI's FLUX does with `img += ...`.

    Autograd refuses that, and torch's recomputation does not even see it; here such a tensor is
    copied before it is written to.
    """
    saved = _SavedTensors()

    def wrap(plain):
        def forward(*args, **kwargs):
            # in here and not around everything: both belong to a thread, and a CUDA backward pass,
            # which computes blocks again, has its own
            with (
                _WriteWatch(saved),
                torch.autograd.graph.saved_tensors_hooks(saved.save, lambda entry: entry.tensor),
            ):
                return plain(*args, **kwargs)

        return forward

    return _wrapped(blocks, wrap)


def checkpointing(blocks: Iterable[nn.Module]) -> contextlib.AbstractContextManager[None]:
    """Recomputes the blocks' activations in the backward pass while entered.

    In torch's reentrant form, whose second pass is ordinary autograd: a tensor that was written to
    after it was saved is an error there (and with `allowing_writes` none). The other form silently
    uses what was written.
    """

    def wrap(plain):
        def forward(*args, **kwargs):
            if not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            leaves, form = tree_flatten((args, kwargs))

            def again(first, *leaves):
                inputs, named = tree_unflatten([_copied(leaf) for leaf in leaves], form)
                outputs = plain(*inputs, **named)
                return _reached(outputs, first) if torch.is_grad_enabled() else outputs

            # some input must ask for gradients: the first block's own do not
            wanted = torch.zeros((), requires_grad=True)
            return checkpoint(again, wanted, *leaves, use_reentrant=True)

        return forward

    return _wrapped(blocks, wrap)


def _reached(outputs, zero: Tensor):
    """A block's outputs with a way back to `zero`, where they have none: in a block that nothing
    trained goes into, such as a refiner of the prompt. torch refuses those.
    """
    leaves, form = tree_flatten(outputs)
    if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves):
        return outputs
    return tree_unflatten(
        [
            leaf + zero.to(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
            for leaf in leaves
        ],
        form,
    )


def _copied(value):
    """What a block adds to in place must be as it was when the block is computed again."""
    return value.clone() if isinstance(value, Tensor) and value.is_floating_point() else value
