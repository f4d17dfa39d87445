"""Calls that go past torch's dispatcher: which do, that they give the dispatcher's bits, and that
whatever happens to a tensor after its layer was checked, no old address and no old fact is used.
"""

import gc
import weakref

import pytest
import torch

from cases import make_input
from eager_layers import CASE, CODES, make, through_dispatcher
from nibble.kernels import ops
from nibble.kernels.backends import native
from nibble.kernels.ops import eager, w4a16
from plain import plain_torch

needs_module = pytest.mark.skipif(native.module()[0] is None, reason="pip install ./kernels")


# ---- which calls go past -------------------------------------------------------------------------


@needs_module
def test_a_layer_that_was_checked_goes_past_the_dispatcher(op, layer, dispatched):
    call, x, parameters = layer
    assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))
    assert not dispatched


@needs_module
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 70])
def test_any_number_of_tokens_and_any_leading_shape_is_the_same_layer(
    op, layer, dispatched, tokens
):
    call, _, parameters = layer
    for shape in ((tokens,), (2, tokens), (1, tokens, 1)):
        x = torch.randn(*shape, CASE.K)
        assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))
    assert len(dispatched) == (3 if tokens == 0 else 0)  # without a token there is no address
    x = torch.randn(CASE.K)
    assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))


@needs_module
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_a_call_without_gradients_goes_past(op, layer, dispatched, guard):
    call, x, parameters = layer
    x = x.clone().requires_grad_()
    with guard():
        y = call(x, **parameters)
    assert not dispatched and y.is_inference() == (guard is torch.inference_mode)
    assert not y.requires_grad


@needs_module
def test_parameters_of_a_module_go_past(op, layer, dispatched):
    call, x, parameters = layer
    module = torch.nn.Module()
    for name, tensor in parameters.items():
        if isinstance(tensor, torch.Tensor):
            parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)
            setattr(module, name, parameters[name])
    assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))
    assert not dispatched  # the same memory, so the same layer


# ---- what happens to tensors afterwards ----------------------------------------------------------


def test_codes_edited_in_place_are_read_as_they_are(op, layer):
    call, x, parameters = layer
    before = call(x, **parameters)
    parameters[CODES[op]].add_(1)
    after = call(x, **parameters)
    assert torch.equal(after, through_dispatcher(op, x, parameters))
    assert not torch.equal(after, before)


def test_every_parameter_edited_in_place_is_read_as_it_is(op, layer):
    call, x, parameters = layer
    for tensor in parameters.values():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensor.mul_(1.5)
            assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))


def test_storage_that_moved_is_followed(op, layer):
    """`tensor.data = ...` is how programs swap weights under a live module."""
    call, x, parameters = layer
    for tensor in parameters.values():
        if isinstance(tensor, torch.Tensor):
            old = tensor.data
            tensor.data = old.flip(0).contiguous()
            old.fill_(1)  # whoever still reads there is found out
            assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))


def test_a_replaced_tensor_is_followed_and_the_old_one_freed(op, layer):
    call, x, parameters = layer
    for name in list(parameters):
        if isinstance(parameters[name], torch.Tensor):
            gone = weakref.ref(parameters[name])
            parameters[name] = parameters[name].roll(1, 0)
            gc.collect()
            assert gone() is None, "something keeps a tensor alive"
            assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))


def test_nothing_is_kept_alive_and_memory_of_a_dead_layer_is_never_read(op):
    """New layers come to lie where dead ones lay: same addresses, other contents and shapes."""
    call, x = getattr(ops, op), make_input(CASE)
    for seed in range(20):
        parameters = make(op)
        parameters[CODES[op]].fill_(seed)
        assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))
        del parameters


def test_another_dtype_is_noticed_at_the_same_address_too(op, layer):
    call, x, parameters = layer
    for name, tensor in list(parameters.items()):
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            parameters[name] = tensor.to(torch.bfloat16)
            assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))
            parameters[name] = tensor
    codes = CODES[op]
    good = parameters[codes]
    parameters[codes] = good.view(torch.uint8 if good.dtype == torch.int8 else torch.int8)
    with pytest.raises(ValueError, match="must be packed"):
        call(x, **parameters)


def test_a_resized_or_transposed_parameter_is_refused_or_copied(op, layer):
    call, x, parameters = layer
    codes = parameters[CODES[op]]
    codes.resize_(codes.shape[0], codes.shape[1] // 2)
    with pytest.raises(ValueError, match="hold"):
        call(x, **parameters)
    parameters = make(op)
    call(x, **parameters)
    codes = parameters[CODES[op]]
    codes.as_strided_(codes.shape, (1, codes.shape[0]))  # the same address, other elements
    assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))


@needs_module
def test_freed_storage_is_not_read(op, layer, dispatched):
    """Sharded training frees a parameter's storage and leaves its shape."""
    call, x, parameters = layer
    parameters[CODES[op]].untyped_storage().resize_(0)
    try:
        call(x, **parameters)
    except (RuntimeError, ValueError):
        pass
    assert len(dispatched) == 1


def test_another_device_is_refused(op, layer):
    call, x, parameters = layer
    parameters[CODES[op]] = parameters[CODES[op]].to("meta")
    with pytest.raises(ValueError, match="is on meta and the activations are on cpu"):
        call(x, **parameters)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.randn(2, 100), "K=100|hold"),
        (torch.randn(2, 64), "K=64"),
        (torch.ones(2, CASE.K, dtype=torch.int32), "x must be a floating-point tensor"),
        (torch.tensor(1.0), "x must be a floating-point tensor"),
        (torch.randn(2, CASE.K, device="meta"), "the activations are on meta"),
    ],
    ids=["K", "half", "integers", "scalar", "device"],
)
def test_a_wrong_x_after_a_right_one_is_refused_with_the_ops_sentence(op, layer, wrong, words):
    call, _, parameters = layer
    with pytest.raises(ValueError, match=words) as ours:
        call(wrong, **parameters)
    with pytest.raises(ValueError) as theirs:
        through_dispatcher(op, wrong, parameters)
    assert str(ours.value) == str(theirs.value)


def test_wrong_options_after_right_ones_are_refused(layer, op):
    if op == "linear_w4a16":
        pytest.skip("it has no options")
    call, x, parameters = layer
    with pytest.raises(ValueError, match="rotation=128"):
        call(x, **parameters, rotation=128)


def test_an_option_makes_another_layer(layer, op):
    if op == "linear_w4a16":
        pytest.skip("it has no options")
    call, x, parameters = layer
    rotated = parameters | {"rotation": 64}
    for given in (rotated, parameters, rotated):
        assert torch.equal(call(x, **given), through_dispatcher(op, x, given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_x_of_another_dtype_makes_another_layer(op, layer, dtype):
    call, x, parameters = layer
    for given in (x.to(dtype), x, x.to(dtype)):
        y = call(given, **parameters)
        assert y.dtype == given.dtype
        assert torch.equal(y, through_dispatcher(op, given, parameters))


@needs_module
def test_x_that_is_not_dense_or_not_aligned_takes_the_dispatcher(op, layer, dispatched):
    call, x, parameters = layer
    expected = call(x, **parameters)
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    for given in (x.t().contiguous().t(), shifted):
        assert torch.equal(call(given, **parameters), expected)
    assert len(dispatched) == 2


@needs_module
def test_a_layer_whose_parameters_would_be_copied_is_not_prepared(op, layer, dispatched):
    call, x, parameters = layer
    mixed = parameters | {"bias": parameters["bias"].bfloat16()}
    for _ in range(3):
        assert torch.equal(call(x, **mixed), through_dispatcher(op, x, mixed))
    assert len(dispatched) == 3


def test_without_the_module_the_layer_takes_the_dispatcher(op, layer, dispatched):
    call, x, parameters = layer
    with plain_torch():
        assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))
        assert len(dispatched) == 1
    assert torch.equal(call(x, **parameters), through_dispatcher(op, x, parameters))


def test_no_more_layers_are_remembered_than_said(monkeypatch):
    monkeypatch.setattr(eager, "LAYERS", 4)
    kept = [make("linear_w4a16") for _ in range(9)]
    for parameters in kept:
        ops.linear_w4a16(make_input(CASE), **parameters)
    assert len(w4a16._eager_linear._layers) <= 4
