"""The fused neighbours: GELU into the next quantizer, several products of one quantization, a whole
MLP, and W4A16 for many tokens.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import SMALL, Case, make_input, make_w4a4, make_w4a16, options
from compare import assert_sqnr, assert_twice_plain
from nibble.kernels import ops, reference
from nibble.kernels.backends import choose
from nibble.kernels.ops import w4a4, w4a16
from nibble.quant.weights.packing import dequantize_groups, pack_int4, unpack_int4

ORDER = ("weight", "weight_scale", "smooth_factor", "proj_down", "proj_up", "bias")
LISTS = ("weight", "weight_scale", "proj_down", "proj_up", "bias")
FIRST, SECOND = Case("first", 6, 128, 192, R=5), Case("second", 6, 192, 40, R=3, act_unsigned=True)
ROTATED = Case("rotated", 6, 192, 40, R=0, rotation=64, bias=False)
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def layer(case, dtype=torch.float32):
    parameters = make_w4a4(case, dtype)
    return [parameters[name] for name in ORDER]


def group(dtype=torch.float32, ranks=(8, 3, 0), outputs=(40, 5, 64)):
    """(smooth_factor, the five lists) of linears that share an input of 128 columns."""
    layers = [
        make_w4a4(Case("", 6, 128, n, R=rank, bias=rank != 3), dtype, seed=n)
        for n, rank in zip(outputs, ranks, strict=True)
    ]
    return layers[0]["smooth_factor"], [[each[name] for each in layers] for name in LISTS]


def fused_arguments(first=FIRST, second=SECOND, dtype=torch.float32):
    """Arguments of the fused op; its quantized input comes from the reference, so that every
    backend starts from the same codes.
    """
    weight, scale, smooth, down, up, bias = layer(first, dtype)
    _, _, smooth2, down2, _, _ = layer(second, dtype)
    return (
        *reference.quantize_down(make_input(first, dtype), smooth, down),
        weight,
        scale,
        up,
        bias,
        smooth2,
        down2,
    )


# ---- gemm_w4a4_up_gelu_quantize_down -------------------------------------------------------------


def test_a_large_product_passes_the_gelu_unchanged():
    """Weights of one times codes 1..7 give 64 c; GELU(64 c) = 64 c, and the largest of a group sets
    its scale.
    """
    codes = torch.tensor([1, 4, 7], dtype=torch.int8)[:, None].expand(3, 64).contiguous()
    q, ones = pack_int4(codes), torch.ones(1, 3)
    weight = pack_int4(torch.ones(64, 64, dtype=torch.int8))
    scale = torch.linspace(1, 64, 64)[None] / 64
    none = torch.zeros(3, 0), torch.zeros(64, 0)
    found = ops.gemm_w4a4_up_gelu_quantize_down(
        q, ones, none[0], weight, scale * 448, none[1], None, torch.ones(64), torch.eye(64)
    )
    q2, ascales2, h2 = found
    y = 64 * torch.tensor([1.0, 4.0, 7.0])[:, None] * scale * 448
    torch.testing.assert_close(ascales2, 64 * 448 * torch.tensor([[1.0, 4.0, 7.0]]) / 7)
    torch.testing.assert_close(h2, y)
    assert torch.equal(unpack_int4(q2).float(), (y / ascales2.t()).round())


def test_negative_products_become_nothing_and_the_shift_covers_what_is_left():
    q = pack_int4(torch.full((2, 64), 7, dtype=torch.int8))
    weight = pack_int4(torch.full((64, 64), -8, dtype=torch.int8))
    args = (
        q,
        torch.ones(1, 2),
        torch.zeros(2, 0),
        weight,
        torch.ones(1, 64),
        torch.zeros(64, 0),
        None,
        torch.ones(64),
        torch.ones(64, 2),
    )
    q2, ascales2, h2 = ops.gemm_w4a4_up_gelu_quantize_down(*args)
    assert not q2.any() and not ascales2.any() and not h2.any()
    q2, ascales2, _ = ops.gemm_w4a4_up_gelu_quantize_down(*args, act_unsigned2=True)
    assert torch.equal(unpack_int4(q2, signed=False), torch.full((2, 64), 15, dtype=torch.int8))
    torch.testing.assert_close(ascales2, torch.full((1, 2), reference.SHIFT / 15))


@pytest.mark.parametrize("second", [SECOND, ROTATED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_fused_op_is_its_parts(second, dtype, device):
    """Against float64 of the same operands; a value on the border of two codes may round either
    way, hence decibels.
    """
    arguments = fused_arguments(second=second, dtype=dtype)
    flags = dict(act_unsigned2=second.act_unsigned, rotation2=second.rotation)
    moved = [None if tensor is None else tensor.to(device) for tensor in arguments]
    q2, ascales2, h2 = (
        tensor.cpu()
        for tensor in ops.gemm_w4a4_up_gelu_quantize_down(*moved, **flags, mid_dtype=dtype)
    )
    double = [
        tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
        for tensor in arguments
    ]
    exact = reference.gemm_w4a4_up_gelu_quantize_down(*double, **flags, mid_dtype=dtype)
    signed = not second.act_unsigned
    assert_sqnr(
        dequantize_groups(unpack_int4(q2, signed), ascales2),
        dequantize_groups(unpack_int4(exact[0], signed), exact[1], torch.float64),
        30,
    )
    if second.R:
        assert_sqnr(h2, exact[2], 45)
    assert (q2.dtype, ascales2.dtype, h2.dtype) == (torch.int8, torch.float32, torch.float32)


def test_a_nan_stays_in_its_token():
    arguments = list(fused_arguments())
    clean = ops.gemm_w4a4_up_gelu_quantize_down(*arguments, act_unsigned2=True)
    arguments[1] = arguments[1].clone()
    arguments[1][0, 2] = float("nan")
    found = ops.gemm_w4a4_up_gelu_quantize_down(*arguments, act_unsigned2=True)
    others = [0, 1, 3, 4, 5]
    assert found[1][:, 2].isnan().all() and not found[0][2].any()
    assert torch.equal(found[0][others], clean[0][others]) and torch.equal(
        found[1][:, others], clean[1][:, others]
    )


# ---- grouped, mlp, gemm_w4a16 --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("flags", [(False, 0), (True, 0), (False, 64)], ids=str)
def test_a_group_is_its_linears(dtype, flags, device):
    smooth, lists = group(dtype)
    x = make_input(FIRST, dtype)
    moved = [
        [None if tensor is None else tensor.to(device) for tensor in tensors] for tensors in lists
    ]
    found = ops.linear_w4a4_grouped(x.to(device)[None], smooth.to(device), *moved, *flags)
    for y, *parameters in zip(found, *lists, strict=True):
        weight, scale, down, up, bias = parameters
        exact = reference.linear_w4a4(
            x.double(),
            weight,
            *(tensor.double() for tensor in (scale, smooth, down, up)),
            None if bias is None else bias.double(),
            *flags,
        )
        assert y.dtype == dtype and y.shape == (1, *exact.shape)
        assert_sqnr(y[0].cpu(), exact, 35)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_mlp_is_its_layers(dtype, device):
    x, first, second = make_input(FIRST, dtype), layer(FIRST, dtype), layer(SECOND, dtype)
    moved = [
        [None if tensor is None else tensor.to(device) for tensor in tensors]
        for tensors in (first, second)
    ]
    y = ops.mlp_w4a4(x.to(device)[:, None], *moved, act_unsigned2=True)
    double = [
        [
            tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
            for tensor in each
        ]
        for each in (first, second)
    ]
    assert y.dtype == dtype and y.shape == (6, 1, 40)
    assert_sqnr(y[:, 0].cpu(), reference.mlp_w4a4(x.double(), *double, flags2=(True, 0)), 30)


def test_empty_batches():
    smooth, lists = group()
    assert [y.shape for y in ops.linear_w4a4_grouped(torch.empty(0, 128), smooth, *lists)] == [
        (0, 40),
        (0, 5),
        (0, 64),
    ]
    assert ops.mlp_w4a4(torch.empty(2, 0, 128), layer(FIRST), layer(SECOND)).shape == (2, 0, 40)
    assert ops.gemm_w4a16(torch.empty(0, 256), **make_w4a16(SMALL[0])).shape == (0, 128)


@pytest.mark.parametrize(
    "case", [Case("nine", 9, 192, 37), Case("many", 100, 128, 300, bias=False)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_w4a16_of_many_tokens(case, dtype):
    x, parameters = make_input(case, dtype), make_w4a16(case, dtype)
    exact = reference.gemv_w4a16(
        x.double(),
        *(
            tensor.double() if tensor is not None and tensor.is_floating_point() else tensor
            for tensor in (
                parameters[name] for name in ("weight", "weight_scale", "weight_zeros", "bias")
            )
        ),
    )
    dense = reference.dequantize_w4_zeros(
        parameters["weight"], parameters["weight_scale"], parameters["weight_zeros"], dtype
    )
    y = ops.gemm_w4a16(x, **parameters)
    assert y.dtype == dtype and case.M > choose.GEMV_TOKENS
    assert_twice_plain(y, exact, torch.nn.functional.linear(x, dense, parameters["bias"]))


def test_w4a16_takes_the_many_token_op_beyond_the_threshold(monkeypatch):
    calls = []
    monkeypatch.setattr(
        w4a16, "_run_tokens", lambda op, x, p: calls.append(op) or reference.gemv_w4a16(x, *p)
    )
    parameters = make_w4a16(SMALL[0], torch.float32)
    for m in (1, choose.GEMV_TOKENS, choose.GEMV_TOKENS + 1):
        torch.ops.nibble.linear_w4a16(torch.ones(1, m, 256), **parameters)
    assert calls == ["gemv_w4a16", "gemv_w4a16", "gemm_w4a16"]


# ---- gradients: the functions fall back to the linears -------------------------------------------


def test_gradients_flow_through_the_single_linears():
    smooth, lists = group()
    x = make_input(FIRST).requires_grad_()
    sum(y.sum() for y in ops.linear_w4a4_grouped(x, smooth, *lists)).backward()
    alone = make_input(FIRST).requires_grad_()
    sum(
        ops.linear_w4a4(alone, w, s, smooth, down, up, b).sum()
        for w, s, down, up, b in zip(*lists, strict=True)
    ).backward()
    torch.testing.assert_close(x.grad, alone.grad)
    first, second = layer(FIRST), layer(SECOND)
    second[5].requires_grad_()
    ops.mlp_w4a4(make_input(FIRST), first, second, act_unsigned2=True).sum().backward()
    torch.testing.assert_close(second[5].grad, torch.full((40,), 6.0))


# ---- torch's own tools ---------------------------------------------------------------------------


def samples():
    smooth, lists = group()
    yield "linear_w4a4_grouped", (make_input(FIRST), smooth, *lists, False, 64)
    yield "mlp_w4a4", (make_input(FIRST), *layer(FIRST), *layer(SECOND), False, 0, True, 0)
    yield "mlp_w4a4", (make_input(FIRST), *layer(FIRST), *layer(ROTATED), False, 0, False, 64)
    yield "gemm_w4a4_up_gelu_quantize_down", (*fused_arguments(), False, True, 0, torch.bfloat16)
    w4a16 = make_w4a16(SMALL[2], torch.float32)
    yield (
        "gemm_w4a16",
        (
            make_input(SMALL[2]).requires_grad_(),
            *(w4a16[name] for name in ("weight", "weight_scale", "weight_zeros", "bias")),
        ),
    )


@pytest.mark.parametrize(
    ("op", "arguments"), [pytest.param(*sample, id=sample[0]) for sample in samples()]
)
def test_opcheck(op, arguments):
    torch.library.opcheck(getattr(torch.ops.nibble, op).default, arguments)


def test_they_compile_whole():
    smooth, lists = group()
    x, first, second = make_input(FIRST), layer(FIRST), layer(SECOND)
    arguments = fused_arguments()

    def everything(x):
        grouped = ops.linear_w4a4_grouped(x, smooth, *lists)
        q2, ascales2, h2 = ops.gemm_w4a4_up_gelu_quantize_down(*arguments, act_unsigned2=True)
        return (
            torch.cat(grouped, 1),
            ops.mlp_w4a4(x, first, second, act_unsigned2=True),
            q2 + 1,
            ascales2,
            h2,
        )

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(x), everything(x), strict=True):
        assert torch.equal(ours, theirs)
    wanted = x.clone().requires_grad_()
    compiled(wanted)[1].sum().backward()
    assert wanted.grad is not None


def test_they_run_under_inference_mode_and_know_fakes():
    with torch.inference_mode():
        assert ops.mlp_w4a4(make_input(FIRST), layer(FIRST), layer(SECOND)).is_inference()
    with FakeTensorMode():
        smooth, lists = group(torch.bfloat16)
        x = make_input(FIRST, torch.bfloat16)
        assert [y.shape for y in ops.linear_w4a4_grouped(x[None], smooth, *lists)] == [
            (1, 6, 40),
            (1, 6, 5),
            (1, 6, 64),
        ]
        assert ops.mlp_w4a4(x, layer(FIRST), layer(SECOND)).dtype == torch.bfloat16


# ---- refusals ------------------------------------------------------------------------------------


def test_mistakes_are_named():
    smooth, lists = group()
    x, first, second = make_input(FIRST), layer(FIRST), layer(SECOND)
    with pytest.raises(ValueError, match="as many of each and at least one, not .*'bias': 2"):
        ops.linear_w4a4_grouped(x, smooth, *lists[:4], lists[4][:2])
    with pytest.raises(
        ValueError, match=r"weight_scale is \(2, 5\) and must be \(K/64, N\) = \(2, 40\)"
    ):
        ops.linear_w4a4_grouped(x, smooth, lists[0], lists[1][1:] + lists[1][:1], *lists[2:])
    with pytest.raises(ValueError, match=r"weight2 \(40, 64\) holds K=128 columns and x has K=192"):
        ops.mlp_w4a4(x, first, [second[0][:, :64], *second[1:]])
    with pytest.raises(
        ValueError, match="N=40 of the first layer is not a multiple of the group size 64"
    ):
        ops.mlp_w4a4(x, layer(Case("", 6, 128, 40)), second)
    with pytest.raises(ValueError, match=r"proj_up2 is .* must be \(N, R\)"):
        ops.mlp_w4a4(x, first, [*second[:4], first[4], second[5]])
    with pytest.raises(ValueError, match="exclude one another"):
        ops.mlp_w4a4(x, first, second, act_unsigned2=True, rotation2=64)
    arguments = list(fused_arguments())
    arguments[7] = torch.ones(64)
    with pytest.raises(ValueError, match=r"smooth_factor2 is \(64,\)"):
        ops.gemm_w4a4_up_gelu_quantize_down(*arguments)
    with pytest.raises(ValueError, match="linear_w4a16 takes any leading shape"):
        ops.gemm_w4a16(torch.ones(1, 2, 256), **make_w4a16(SMALL[0]))


@pytest.mark.parametrize("name", ["weight", "smooth_factor", "proj_up", "bias"])
def test_a_tensor_on_another_device_is_refused(name):
    parameters = make_w4a4(SMALL[0])
    parameters[name] = parameters[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} is on meta and the activations are on cpu"):
        ops.linear_w4a4(make_input(SMALL[0]), **parameters, **options(SMALL[0]))


def test_a_fused_mlp_is_chosen_by_its_floats(monkeypatch):
    """Codes are integers, and no kernel takes integer parameters."""
    asked, own = [], w4a4.choose
    monkeypatch.setattr(w4a4, "choose", lambda *given: asked.append(given) or own(*given))
    first, second = (layer(Case("layer", 3, 64, 64), torch.bfloat16) for _ in range(2))
    ops.mlp_w4a4(torch.randn(3, 64), first, second)
    kinds = next(given[3] for given in asked if given[0] == "mlp_w4a4")
    assert set(kinds) == {torch.bfloat16}
