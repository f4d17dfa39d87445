"""The two whole linears as torch sees them: values, gradients, opcheck, torch.compile, fake
tensors, a second copy of the package.
"""

from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import SMALL, make_input, make_w4a4, make_w4a16, options, plain_w4a4
from compare import assert_twice_plain, relative_error
from nibble.kernels import GROUP, SHIFT, hadamard64, ops, reference
from nibble.quant.weights.packing import dequantize_groups, unpack_int4

ROOT = Path(__file__).resolve().parents[2]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PLAIN, UNSIGNED, ROTATED = SMALL[0], SMALL[-2], SMALL[-1]


def dense_model(
    x, weight, weight_scale, smooth_factor, proj_down, proj_up, bias, rotation=0, act_unsigned=False
):
    """The straight-through model written out densely in float64, from leaves that autograd can
    differentiate.
    """
    main = (x + SHIFT * act_unsigned) / smooth_factor.double()
    main = hadamard64(main) if rotation else main
    y = (
        main @ dequantize_groups(unpack_int4(weight), weight_scale, torch.float64).t()
        + (x @ proj_down) @ proj_up.t()
    )
    return y if bias is None else y + bias


def as_double(parameters):
    return {
        name: tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for name, tensor in parameters.items()
    }


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_linear_w4a4_is_quantize_down_then_gemm_w4a4_up(case, dtype):
    x, parameters = make_input(case, dtype), make_w4a4(case, dtype)
    q, ascales, h = ops.quantize_down(
        x, parameters["smooth_factor"], parameters["proj_down"], **options(case)
    )
    rest = {name: parameters[name] for name in ("weight", "weight_scale", "proj_up", "bias")}
    y = ops.linear_w4a4(x, **parameters, **options(case))
    assert y.dtype == dtype and y.is_contiguous()
    truth = ops.gemm_w4a4_up(
        q, ascales.double(), h.double(), **as_double(rest), act_unsigned=case.act_unsigned
    )
    assert_twice_plain(y, truth, plain_w4a4(q, ascales, h, rest, case.act_unsigned, dtype))


def test_activations_on_the_grid_give_the_exact_linear():
    x = torch.randint(-7, 8, (6, PLAIN.K)).float()
    x[:, ::GROUP] = 7
    parameters = as_double(make_w4a4(PLAIN)) | {"smooth_factor": torch.ones(PLAIN.K)}
    y = ops.linear_w4a4(x, **parameters)
    exact = dense_model(x.double(), **parameters)
    assert relative_error(y, exact) < 1e-6


def test_the_shift_is_undone_by_the_bias_on_disk():
    x = make_input(UNSIGNED)
    parameters = make_w4a4(UNSIGNED, torch.float32)
    dense = (
        reference.dequantize_w4(parameters["weight"], parameters["weight_scale"])
        / parameters["smooth_factor"]
    )
    exact = (
        x @ dense.t() + x @ parameters["proj_down"] @ parameters["proj_up"].t() + parameters["bias"]
    )
    parameters["bias"] = parameters["bias"] - SHIFT * dense.sum(1)
    assert relative_error(ops.linear_w4a4(x, **parameters, act_unsigned=True), exact) < 0.1


@pytest.mark.parametrize("stored", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_parameters_may_have_another_dtype_than_x(dtype, stored):
    x, parameters = make_input(PLAIN, dtype), make_w4a4(PLAIN, stored)
    y = ops.linear_w4a4(x, **parameters)
    assert y.dtype == dtype
    assert relative_error(y, ops.linear_w4a4(x.double(), **parameters)) < 4 * torch.finfo(dtype).eps


def test_rank_zero_equals_a_zero_low_rank_branch():
    case = SMALL[4]
    x, parameters = make_input(case), make_w4a4(case, torch.float32)
    branch = {"proj_down": torch.ones(case.K, 4), "proj_up": torch.zeros(case.N, 4)}
    torch.testing.assert_close(
        ops.linear_w4a4(x, **parameters),
        ops.linear_w4a4(x, **(parameters | branch)),
        rtol=1e-6,
        atol=1e-6,
    )


def test_leading_shapes_strides_and_empty_batches():
    x, parameters = make_input(PLAIN), make_w4a4(PLAIN)
    flat = ops.linear_w4a4(x, **parameters)
    assert torch.equal(
        ops.linear_w4a4(x.reshape(2, 4, 4, PLAIN.K), **parameters), flat.reshape(2, 4, 4, PLAIN.N)
    )
    assert torch.equal(ops.linear_w4a4(x.t().contiguous().t(), **parameters), flat)
    assert torch.equal(
        ops.linear_w4a4(x.reshape(4, 8, -1).transpose(0, 1), **parameters),
        flat.reshape(4, 8, -1).transpose(0, 1),
    )
    assert ops.linear_w4a4(x[0], **parameters).shape == (PLAIN.N,)
    assert ops.linear_w4a4(x[:0], **parameters).shape == (0, PLAIN.N)


def test_zero_tokens_give_the_bias_and_nan_stays_in_its_token():
    x, parameters = make_input(PLAIN), make_w4a4(PLAIN, torch.float32)
    clean = ops.linear_w4a4(x, **parameters)
    x[3] = 0
    x[5, 17] = float("nan")
    y = ops.linear_w4a4(x, **parameters)
    assert torch.equal(y[3], parameters["bias"]) and y[5].isnan().all()
    others = [row for row in range(PLAIN.M) if row not in (3, 5)]
    assert torch.equal(y[others], clean[others])


def test_the_same_inputs_give_the_same_bits():
    x, parameters = make_input(ROTATED, torch.bfloat16), make_w4a4(ROTATED)
    assert torch.equal(
        ops.linear_w4a4(x, **parameters, rotation=64), ops.linear_w4a4(x, **parameters, rotation=64)
    )


def test_the_input_is_left_alone():
    x, parameters = make_input(PLAIN), make_w4a4(PLAIN, torch.float32)
    before = x.clone()
    for kwargs in ({}, {"act_unsigned": True}, {"rotation": 64}):
        ops.linear_w4a4(x, **parameters, **kwargs)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(2, 100)}, "K=100 is not a multiple of the group size 64"),
        ({"x": torch.randn(2, 128)}, "holds K=256 columns and x has K=128"),
        (
            {"weight_scale": torch.ones(3, 128)},
            r"weight_scale is \(3, 128\) and must be \(K/64, N\) = \(4, 128\)",
        ),
        (
            {"proj_up": torch.ones(128, 9)},
            r"proj_up is \(128, 9\) and must be \(N, R\) = \(128, 8\)",
        ),
        ({"bias": torch.ones(7)}, "bias is"),
        ({"rotation": 128}, "rotation=128"),
        ({"rotation": 64, "act_unsigned": True}, "exclude one another"),
    ],
)
def test_mistakes_are_named(change, words):
    good = {"x": make_input(PLAIN)} | make_w4a4(PLAIN)
    for call in (ops.linear_w4a4, torch.ops.nibble.linear_w4a4):
        with pytest.raises(ValueError, match=words):
            call(**(good | change))


# ---- gradients -----------------------------------------------------------------------------------


def gradients(function, leaves, grad):
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        function(**leaves), list(leaves.values()), grad.to(next(iter(leaves.values())).dtype)
    )
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("case", [PLAIN, SMALL[1], SMALL[4], SMALL[7], UNSIGNED, ROTATED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_straight_through_model(case, dtype):
    parameters = make_w4a4(case, dtype)
    constants = {name: parameters.pop(name) for name in ("weight", "weight_scale", "smooth_factor")}
    leaves = {"x": make_input(case, dtype)} | parameters
    grad = torch.randn(case.M, case.N, generator=torch.Generator().manual_seed(2))
    ours = gradients(
        lambda **leaves: ops.linear_w4a4(**leaves, **constants, **options(case)), leaves, grad
    )
    exact = gradients(
        lambda **leaves: dense_model(**leaves, **constants, **options(case)),
        as_double(leaves),
        grad.to(dtype),
    )
    for name in leaves:
        assert ours[name].dtype == dtype and ours[name].shape == leaves[name].shape
        assert relative_error(ours[name], exact[name]) < 8 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_w4a16_gradients_are_those_of_the_dense_linear(dtype):
    x, parameters = make_input(PLAIN, dtype), make_w4a16(PLAIN, dtype)
    bias = parameters.pop("bias")
    dense = reference.dequantize_w4_zeros(**parameters, dtype=torch.float64)
    grad = torch.randn(PLAIN.M, PLAIN.N)
    ours = gradients(
        lambda x, bias: ops.linear_w4a16(x, **parameters, bias=bias), {"x": x, "bias": bias}, grad
    )
    exact = gradients(
        lambda x, bias: x @ dense.t() + bias,
        {"x": x.double(), "bias": bias.double()},
        grad.to(dtype),
    )
    for name in ours:
        assert relative_error(ours[name], exact[name]) < 8 * torch.finfo(dtype).eps, name


def test_only_asked_gradients_are_made():
    x, parameters = make_input(PLAIN), make_w4a4(PLAIN, torch.float32)
    parameters["proj_up"].requires_grad_()
    ops.linear_w4a4(x, **parameters).sum().backward()
    assert parameters["proj_up"].grad is not None
    assert (
        x.grad is None and parameters["proj_down"].grad is None and parameters["bias"].grad is None
    )


def test_the_forward_keeps_nothing_but_its_inputs():
    x, parameters = make_input(PLAIN).requires_grad_(), make_w4a4(PLAIN)
    inputs = {tensor.data_ptr() for tensor in (x, *parameters.values())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
    ):
        ops.linear_w4a4(x, **parameters).sum().backward()
    assert kept and set(kept) <= inputs


# ---- torch's own tools ---------------------------------------------------------------------------


W4A16_ORDER = ("weight", "weight_scale", "weight_zeros", "bias")
NO_BIAS = SMALL[5]


def samples():
    for case in (NO_BIAS, ROTATED):
        x, parameters = make_input(case), make_w4a4(case, torch.float32)
        smooth, down = parameters["smooth_factor"], parameters["proj_down"]
        yield "quantize_down", case, (x, smooth, down, *options(case).values())
        yield (
            "linear_w4a4",
            case,
            (x.clone().requires_grad_(), *parameters.values(), *options(case).values()),
        )
    q, ascales, h = ops.quantize_down(x, smooth, down, rotation=64)
    rest = [parameters[name] for name in ("weight", "weight_scale", "proj_up", "bias")]
    yield "gemm_w4a4_up", ROTATED, (q, ascales, h, *rest, False, torch.bfloat16)
    w4a16 = [make_w4a16(PLAIN, torch.float32)[name] for name in W4A16_ORDER]
    yield "linear_w4a16", PLAIN, (make_input(PLAIN).requires_grad_(), *w4a16)
    yield "gemv_w4a16", PLAIN, (make_input(PLAIN), *w4a16)


@pytest.mark.parametrize(
    ("op", "args"), [pytest.param(op, args, id=f"{op}-{case}") for op, case, args in samples()]
)
def test_opcheck(op, args):
    torch.library.opcheck(getattr(torch.ops.nibble, op).default, args)


@pytest.mark.parametrize("case", [NO_BIAS, ROTATED], ids=str)
def test_linear_w4a4_compiles_whole_with_its_gradient(case):
    x, parameters = make_input(case), make_w4a4(case, torch.float32)
    function = torch.compile(
        lambda x: ops.linear_w4a4(x, **parameters, **options(case)).relu(),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    function(compiled).sum().backward()
    expected = ops.linear_w4a4(plain, **parameters, **options(case)).relu()
    expected.sum().backward()
    assert torch.equal(function(x), expected.detach())
    torch.testing.assert_close(compiled.grad, plain.grad)


def test_linear_w4a16_compiles_whole():
    x, parameters = make_input(PLAIN), make_w4a16(PLAIN)
    function = torch.compile(
        lambda x: ops.linear_w4a16(x, **parameters) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(function(x), ops.linear_w4a16(x, **parameters) * 2)


def test_ops_run_under_inference_mode_and_on_its_tensors():
    with torch.inference_mode():
        x, parameters = make_input(PLAIN), make_w4a4(PLAIN)
        y = ops.linear_w4a4(x, **parameters)
    assert y.is_inference() and torch.equal(y, ops.linear_w4a4(x, **parameters))


def test_fake_tensors_know_shape_and_dtype():
    with FakeTensorMode():
        for case in SMALL:
            x = make_input(case, torch.bfloat16)
            for leading in ((case.M,), (2, case.M)):
                y = ops.linear_w4a4(x.expand(*leading, case.K), **make_w4a4(case), **options(case))
                assert y.shape == (*leading, case.N) and y.dtype == torch.bfloat16
                assert ops.linear_w4a16(x.expand(*leading, case.K), **make_w4a16(case)).shape == (
                    *leading,
                    case.N,
                )
