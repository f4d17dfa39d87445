"""Whoever has to see an op sees it, although its layer was checked before: modes, subclasses, fake
tensors, gradients, compiling, transforms, tracing and profilers.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from eager_layers import CASE, CODES, through_dispatcher


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class WatchFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Watch, WatchFunctions])
def test_a_mode_sees_the_op(op, layer, mode):
    call, x, parameters = layer
    with mode() as watch:
        call(x, **parameters)
    assert getattr(torch.ops.nibble, op).default in watch.seen


class Sub(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        Sub.seen.append(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", ["x", "codes"])
def test_a_subclass_sees_the_op(op, layer, which):
    call, x, parameters = layer
    Sub.seen = []
    if which == "x":
        x = x.as_subclass(Sub)
    else:
        parameters[CODES[op]] = parameters[CODES[op]].as_subclass(Sub)
    call(x, **parameters)
    assert getattr(torch.ops.nibble, op).default in Sub.seen


def test_fake_tensors_are_never_computed_with(op, layer):
    call, x, parameters = layer
    with FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(tensor) if isinstance(tensor, torch.Tensor) else tensor
            for name, tensor in parameters.items()
        }
        y = call(mode.from_tensor(x), **fakes)
    assert type(y) is not torch.Tensor and y.shape == (CASE.M, CASE.N)
    assert call(mode.from_tensor(x), **fakes).shape == (CASE.M, CASE.N)


def test_gradients_are_recorded(op, layer, dispatched):
    call, x, parameters = layer
    x = x.clone().requires_grad_()
    y = call(x, **parameters)
    assert y.requires_grad and len(dispatched) == 1
    y.sum().backward()
    assert x.grad.abs().sum() > 0
    bias = parameters["bias"].requires_grad_()
    call(x.detach(), **parameters).sum().backward()
    assert torch.equal(bias.grad, torch.full((CASE.N,), float(CASE.M)))


def test_torch_compile_sees_one_node(op, layer):
    call, x, parameters = layer
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: call(x, **parameters) + 1, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), call(x, **parameters) + 1)
    targets = [node.target for node in graphs[0].graph.nodes]
    assert getattr(torch.ops.nibble, op).default in targets


def outcome(run):
    """The result, or what was raised."""
    try:
        return run()
    except Exception as error:
        return error


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.jacrev, torch.func.grad])
def test_functional_transforms_meet_the_op_and_no_wrapper_is_read(op, layer, transform, dispatched):
    """The ops have no rules for transforms yet: what torch says to that is said here too."""
    call, x, parameters = layer
    batch = torch.stack([x, -x]) if transform is torch.func.vmap else x
    ours = outcome(lambda: transform(lambda x: call(x, **parameters).sum())(batch))
    theirs = outcome(
        lambda: transform(lambda x: through_dispatcher(op, x, parameters).sum())(batch)
    )
    assert dispatched and type(ours) is type(theirs)
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    else:
        assert str(ours) == str(theirs)


def test_make_fx_traces_the_op(op, layer):
    from torch.fx.experimental.proxy_tensor import make_fx

    call, x, parameters = layer
    graph = make_fx(lambda x: call(x, **parameters))(x)
    assert getattr(torch.ops.nibble, op).default in [node.target for node in graph.graph.nodes]


def test_a_profiler_sees_the_op(op, layer):
    call, x, parameters = layer
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x, **parameters)
    assert f"nibble::{op}" in {event.key for event in profile.key_averages()}


def test_saved_and_copied_layers_are_layers_like_others(op, layer, tmp_path):
    """Nothing hangs on the tensors that a file or a copy would have to carry."""
    call, x, parameters = layer
    torch.save(parameters, tmp_path / "layer.pt")
    loaded = torch.load(tmp_path / "layer.pt")
    assert torch.equal(call(x, **loaded), call(x, **parameters))
    assert all(not vars(t) for t in parameters.values() if isinstance(t, torch.Tensor))
