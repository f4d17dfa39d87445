"""Linears whose inputs change their sign at a column, as where attention and a GELU lie side by
side (FLUX's linear2): one op in place of the sum of two.
"""

import pytest
import torch

from cases import Case, make_input, make_w4a4
from compare import assert_same, assert_twice_plain
from nibble.kernels import SHIFT, ops, reference
from nibble.kernels.backends import kitchen, native, native_w4a4
from nibble.kernels.params import Activations, ProductParams, QuantizeParams, W4A4Params
from nibble.quant.weights.packing import pack_int4, unpack_int4

CASES = [
    (Case("half", 13, 256, 70), 128),
    (Case("one_signed_group", 5, 320, 37, R=3), 64),
    (Case("one_unsigned_group", 33, 192, 64, R=0), 128),
    (Case("no_bias", 3, 128, 24, bias=False), 64),
]
ISAS = native.module()[0].cpu_isas() if native.module()[0] else ()
each_case = pytest.mark.parametrize(("case", "column"), CASES, ids=str)
each_isa = pytest.mark.parametrize("isa", ISAS or [pytest.param("", marks=pytest.mark.skip)])


def mixed_input(case: Case, column: int, dtype=torch.float32) -> torch.Tensor:
    """(M, K) that follows a GELU from the column on."""
    x = make_input(case)
    x[:, column:] = torch.nn.functional.gelu(x[:, column:])
    return x.to(dtype)


def in_two(x: torch.Tensor, parameters: dict, column: int) -> torch.Tensor:
    """The same in float64, as the sum of a signed linear and an unsigned one."""
    return kitchen.sum_of_two(
        x.double(),
        W4A4Params(**double(parameters), unsigned_from=column),
        lambda x, p: reference.linear_w4a4(x, *p),
    )


def double(parameters: dict) -> dict:
    return {
        name: t.double() if t is not None and t.is_floating_point() else t
        for name, t in parameters.items()
    }


# ---- the formula ---------------------------------------------------------------------------------


def test_codes_before_the_column_are_signed_and_those_from_it_on_are_not():
    signed, unsigned = torch.arange(64.0) % 15 - 7, torch.arange(64.0) % 16
    x = torch.cat((signed, unsigned - SHIFT))[None]
    q, ascales, _ = ops.quantize_down(x, torch.ones(128), torch.ones(128, 1), unsigned_from=64)
    assert_same(unpack_int4(q[:, :32]), signed[None].to(torch.int8))
    assert_same(unpack_int4(q[:, 32:], signed=False), unsigned[None].to(torch.int8))
    assert ascales.tolist() == [[1], [1]]


def test_a_product_known_by_hand():
    q = torch.cat((pack_int4(torch.full((1, 64), -7)), pack_int4(torch.full((1, 64), 15))), 1)
    weight = pack_int4(torch.full((1, 128), 2))
    scales, ascales = torch.tensor([[1.0], [0.5]]), torch.tensor([[1.0], [2.0]])
    empty = torch.zeros(1, 0)
    y = ops.gemm_w4a4_up(q, ascales, empty, weight, scales, empty, unsigned_from=64)
    assert y.item() == 64 * (2 * -7) + 64 * (2 * 15)


@each_case
def test_it_is_the_sum_of_two_linears(case, column):
    x, parameters = mixed_input(case, column, torch.float64), make_w4a4(case, torch.float32)
    y = ops.linear_w4a4(x, **parameters, unsigned_from=column)
    torch.testing.assert_close(y, in_two(x, parameters, column), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unsigned_from": 32}, "multiple of the group size"),
        ({"unsigned_from": -64}, "unsigned_from=-64"),
        ({"unsigned_from": 256}, "none of the columns of K=256"),
        ({"unsigned_from": 64, "rotation": 64}, "neither act_unsigned nor rotation"),
        ({"unsigned_from": 64, "act_unsigned": True}, "neither act_unsigned nor rotation"),
    ],
)
def test_wrong_columns_are_refused(options, words):
    case = CASES[0][0]
    parameters = make_w4a4(case)
    with pytest.raises(ValueError, match=words):
        ops.linear_w4a4(make_input(case), **parameters, **options)
    smooth, down = parameters["smooth_factor"], parameters["proj_down"]
    with pytest.raises(ValueError, match=words):
        ops.quantize_down(make_input(case), smooth, down, **options)


def test_gradients_are_those_of_the_two_linears():
    case, column = CASES[0]
    parameters = make_w4a4(case, torch.float64)
    found = []
    for signs in ({"unsigned_from": column}, {}):
        p = {n: t if n == "weight" else t.clone().requires_grad_() for n, t in parameters.items()}
        x = mixed_input(case, column, torch.float64).requires_grad_()
        y = ops.linear_w4a4(x, **p, **signs)
        y.backward(torch.ones_like(y))
        found.append([x.grad, p["proj_down"].grad, p["proj_up"].grad, p["bias"].grad])
    # the quantizer counts as the identity, so the signs change none of them
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def test_it_is_traced_with_its_column():
    case, column = CASES[0]
    x, parameters = mixed_input(case, column), make_w4a4(case)

    def layer(x):
        return ops.linear_w4a4(x, **parameters, unsigned_from=column)

    assert_same(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))


# ---- compiled ------------------------------------------------------------------------------------


@each_isa
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_codes_are_the_references(case, column, dtype, isa):
    x, parameters = mixed_input(case, column, dtype), make_w4a4(case, dtype)
    smooth, down = parameters["smooth_factor"], parameters["proj_down"]
    p = QuantizeParams(smooth, down, unsigned_from=column)
    q, ascales, _ = native_w4a4.quantize_down(dtype, x, p, native.ISAS[isa])
    expected = reference.quantize_down(x.float(), smooth.float(), down.float(), False, 0, column)
    assert_same(q, expected[0])
    assert_same(ascales, expected[1])


@each_isa
@each_case
def test_compiled_products_are_right(case, column, isa):
    x, parameters = mixed_input(case, column), make_w4a4(case, torch.float32)
    smooth, down = parameters.pop("smooth_factor"), parameters.pop("proj_down")
    q, ascales, h = reference.quantize_down(x, smooth, down, False, 0, column)
    act = Activations(q, ascales, h, unsigned_from=column)
    names = ("weight", "weight_scale", "proj_up", "bias")
    p = ProductParams(*(parameters[name] for name in names))
    y = native_w4a4.gemm_w4a4_up(torch.float32, act, p, torch.float32, native.ISAS[isa])
    wide = [t if t is None or t.dtype == torch.int8 else t.double() for t in p]
    exact = reference.gemm_w4a4_up(q, ascales.double(), h.double(), *wide, unsigned_from=column)
    plain = reference.gemm_w4a4_up(q, ascales, h, *p, unsigned_from=column)
    assert_twice_plain(y, exact, plain)


@each_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_compiled_linear_is_within_twice_plain_torch(dtype, isa):
    case, column = Case("linear2", 40, 640, 96, R=16), 256
    x, parameters = mixed_input(case, column, dtype), make_w4a4(case, dtype)
    p = W4A4Params(**parameters, unsigned_from=column)
    y = native_w4a4.linear_w4a4(dtype, x, p, native.ISAS[isa])
    plain = reference.linear_w4a4(x, *p)
    assert_twice_plain(y, in_two(x.float(), parameters, column), plain)


# ---- rows of x that lie apart --------------------------------------------------------------------


@each_isa
@pytest.mark.parametrize("column", [64, 192])
def test_columns_of_a_wider_x_are_read_where_they_lie(isa, column, monkeypatch):
    case = Case("part", 9, 128, 40)
    wide = torch.randn(9, 384).to(torch.bfloat16)
    part, parameters = wide[:, column : column + 128], make_w4a4(case)
    p = W4A4Params(**parameters)
    expected = native_w4a4.linear_w4a4(torch.bfloat16, part.contiguous(), p, native.ISAS[isa])
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda tensor: pytest.fail("x is copied"))
    operands = native.dense_rows(part)
    monkeypatch.undo()
    assert operands is part
    assert_same(native_w4a4.linear_w4a4(torch.bfloat16, part, p, native.ISAS[isa]), expected)


def test_other_strides_are_copied():
    x = torch.randn(6, 256)
    parts = (x[:, 1:65], x[:, ::2], torch.randn(6, 70)[:, :64], x[:1].expand(6, 256), x.t())
    for part in parts:
        found = native.dense_rows(part)
        assert found is not part and found.is_contiguous()
        assert_same(found, part.contiguous())
