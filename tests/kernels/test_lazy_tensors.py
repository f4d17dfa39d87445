"""Tensors that torch negates or conjugates lazily (`torch._neg_view`, `z.conj().imag`): every op
sees their values, single or in a list.
"""

import pytest
import torch

from cases import SMALL, make_input, make_vq, make_w4a4, make_w4a8, make_w4a16
from nibble.kernels import ops

CASE = SMALL[0]


def negated(tensor: torch.Tensor) -> torch.Tensor:
    """A view with the tensor's values that torch is to negate before use."""
    view = torch._neg_view(-tensor)
    assert view.is_neg()
    return view


def of_conjugate(tensor: torch.Tensor) -> torch.Tensor:
    """The same as the imaginary part of a lazily conjugated tensor."""
    view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert view.is_neg()
    return view


LAZY = {"negated": negated, "of a conjugate": of_conjugate}


def grouped(x, parameters, lazy=None, only=None):
    def list_of(name):
        values = [parameters[name], parameters[name]]
        return [lazy(value) for value in values] if name == only else values

    names = ("weight", "weight_scale", "proj_down", "proj_up", "bias")
    return ops.linear_w4a4_grouped(x, parameters["smooth_factor"], *map(list_of, names))


@pytest.mark.parametrize("lazy", LAZY.values(), ids=LAZY)
@pytest.mark.parametrize("name", ["weight_scale", "proj_down", "proj_up", "bias"])
def test_lists_of_lazy_tensors_are_read_with_their_sign(name, lazy):
    x, parameters = make_input(CASE, torch.float32), make_w4a4(CASE, torch.float32)
    for found, expected in zip(
        grouped(x, parameters, lazy, name), grouped(x, parameters), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("lazy", LAZY.values(), ids=LAZY)
@pytest.mark.parametrize("op", ["linear_w4a4", "linear_w4a8", "linear_w4a16", "linear_vq"])
def test_single_lazy_tensors_are_read_with_their_sign(op, lazy):
    makers = (make_w4a4, make_w4a8, make_w4a16, make_vq)
    make = {f"linear_{maker.__name__.removeprefix('make_')}": maker for maker in makers}[op]
    x, parameters = make_input(CASE, torch.float32), make(CASE, dtype=torch.float32)
    run = getattr(ops, op)
    expected = run(x, **parameters)
    for name, tensor in parameters.items():
        if tensor is not None and tensor.is_floating_point():
            assert torch.equal(run(x, **parameters | {name: lazy(tensor)}), expected), name
    assert torch.equal(run(lazy(x), **parameters), expected)
