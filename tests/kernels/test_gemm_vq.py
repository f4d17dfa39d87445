"""gemm_vq and linear_vq: codebook weights with a row scale, a low-rank branch and a rotation."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import SMALL, VQ_LAYOUTS, Case, make_input, make_vq
from compare import assert_twice_plain, relative_error
from nibble.kernels import hadamard64, ops, which
from nibble.kernels.backends import choose, native_vq
from nibble.kernels.reference import vq as reference_vq
from nibble.quant.weights.packing import pack_indices, unpack_indices

PLAIN, ROTATED, NO_BIAS = SMALL[0], SMALL[-1], SMALL[5]
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CASES = [case for case in SMALL if not case.act_unsigned]
LAYOUTS = pytest.mark.parametrize(("bits", "vector"), VQ_LAYOUTS.values(), ids=VQ_LAYOUTS)


def dense(p: dict, dtype: torch.dtype) -> torch.Tensor:
    """The weight (N, K), by another way than the op's: one index after another."""
    words, vector = p["codebook"].shape
    bits = words.bit_length() - 1
    rows = unpack_indices(p["indices"], bits, p["indices"].shape[1] * 8 // bits)
    weight = p["codebook"].to(dtype)[rows.long()].flatten(-2)
    return weight if p["scale"] is None else weight * p["scale"].to(dtype)[:, None]


def model(x, indices, codebook, scale, proj_down, proj_up, bias, rotation=0):
    """The layer as ordinary torch would compute it in x's dtype."""
    y = (hadamard64(x) if rotation else x) @ dense(
        {"indices": indices, "codebook": codebook, "scale": scale}, x.dtype
    ).t()
    y = y if proj_down is None else y + x @ proj_down.to(x.dtype) @ proj_up.to(x.dtype).t()
    return y if bias is None else y + bias.to(x.dtype)


def double(p: dict) -> dict:
    return {
        name: t.double() if t is not None and t.is_floating_point() else t for name, t in p.items()
    }


# ---- values --------------------------------------------------------------------------------------


def test_an_answer_known_by_hand():
    codebook = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 200.0], [0.5, -0.5]])
    indices = pack_indices(torch.tensor([[0, 1, 2, 3], [3, 3, 0, 2]]), 2)
    x = torch.tensor([[1.0, 0, 0, 1, 1, 1, 2, 4], [0, 0, 0, 0, 0, 0, 0, 1]])
    y = ops.gemm_vq(x, indices, codebook, torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1000.0]))
    # Row 0 is 1 2 10 20 100 200 0.5 -0.5, row 1 is .5 -.5 .5 -.5 1 2 100 200, doubled.
    assert y.tolist() == [
        [1 + 20 + 300 + 1 - 2, 2 * (0.5 - 0.5 + 3 + 200 + 800) + 1000],
        [-0.5, 400 + 1000],
    ]


@LAYOUTS
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(case, dtype, bits, vector):
    x, p = make_input(case, dtype), make_vq(case, bits, vector, dtype)
    ours = ops.linear_vq(x, **p, rotation=case.rotation)
    assert ours.dtype == dtype and ours.is_contiguous()
    exact = model(x.double(), **double(p), rotation=case.rotation)
    if dtype == torch.float64:
        assert relative_error(ours, exact) < 1e-14
    else:
        assert_twice_plain(ours, exact, model(x, **p, rotation=case.rotation))


@pytest.mark.parametrize(
    ("bits", "vector", "k"),
    [
        (6, 3, 96),
        (1, 1, 72),
        (4, 2, 24),
        (8, 8, 64),
        (5, 1, 40),
        (10, 4, 80),
        (16, 8, 32),
        (8, 5, 15),
    ],
)
def test_unusual_layouts_are_computed_too(bits, vector, k):
    case = Case("unusual", 5, k, 70, R=2)
    x, p = make_input(case), make_vq(case, bits, vector)
    assert relative_error(ops.linear_vq(x, **p), model(x.double(), **double(p))) < 1e-6


def test_the_low_rank_branch_sees_the_raw_tokens():
    x, p = make_input(ROTATED), make_vq(ROTATED, dtype=torch.float32)
    alone = p | {"proj_down": None, "proj_up": None}
    branch = x @ p["proj_down"] @ p["proj_up"].t()
    torch.testing.assert_close(
        ops.linear_vq(x, **p, rotation=64),
        ops.linear_vq(x, **alone, rotation=64) + branch,
        rtol=1e-5,
        atol=1e-4,
    )
    torch.testing.assert_close(
        ops.linear_vq(hadamard64(x), **alone, rotation=64),
        ops.linear_vq(x, **alone),
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_parameters_may_have_another_dtype_than_x(dtype, stored):
    x, p = make_input(PLAIN, dtype), make_vq(PLAIN, dtype=stored)
    p["bias"] = p["bias"].float()
    y = ops.linear_vq(x, **p)
    assert (
        y.dtype == dtype
        and relative_error(y, model(x.double(), **double(p))) < 4 * torch.finfo(dtype).eps
    )


def test_leading_shapes_strides_and_empty_batches():
    x, p = make_input(PLAIN, torch.bfloat16), make_vq(PLAIN)
    flat = ops.linear_vq(x, **p)
    assert torch.equal(
        ops.linear_vq(x.reshape(2, 4, 4, PLAIN.K), **p), flat.reshape(2, 4, 4, PLAIN.N)
    )
    assert torch.equal(ops.linear_vq(x.t().contiguous().t(), **p), flat)
    assert ops.linear_vq(x[0], **p).shape == (PLAIN.N,)
    assert ops.linear_vq(x[:0], **p).shape == (0, PLAIN.N)


def test_rank_zero_is_no_branch():
    case = SMALL[4]
    x, p = make_input(case), make_vq(case)
    empty = p | {"proj_down": torch.empty(case.K, 0), "proj_up": torch.empty(case.N, 0)}
    assert p["proj_down"] is None and torch.equal(ops.linear_vq(x, **empty), ops.linear_vq(x, **p))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.randn(2, 255)}, "K=255 is not a multiple of the sub-vector length D=4"),
        (
            {"x": torch.randn(2, 128)},
            r"indices \(128, 64\) hold 512 bits a row and K=128, D=4, C=256 need 256",
        ),
        ({"x": torch.ones(2, 256, dtype=torch.int32)}, "x must be a floating-point tensor"),
        ({"indices": torch.zeros(128, 64, dtype=torch.int8)}, "indices must be packed uint8"),
        ({"codebook": torch.randn(200, 4)}, "C=200 codewords and must have a power of two"),
        ({"codebook": torch.zeros(256, 4, dtype=torch.int32)}, "codebook must be floating point"),
        ({"codebook": torch.randn(256)}, r"codebook must be floating point \(C, D\)"),
        ({"scale": torch.ones(7)}, r"scale is \(7,\) and must be \(N,\) = \(128,\)"),
        ({"bias": torch.ones(128, 1)}, "bias is"),
        ({"proj_up": None}, "proj_down and proj_up come together"),
        (
            {"proj_up": torch.ones(128, 9)},
            r"proj_up is \(128, 9\) and must be \(N, R\) = \(128, 8\)",
        ),
        ({"proj_down": torch.ones(250, 8)}, "proj_down is"),
        ({"rotation": 32}, "rotation=32"),
    ],
)
def test_mistakes_are_named(change, words):
    good = {"x": make_input(PLAIN)} | make_vq(PLAIN)
    for call in (ops.linear_vq, torch.ops.nibble.linear_vq):
        with pytest.raises(ValueError, match=words):
            call(**(good | change))


def test_a_rotation_needs_whole_groups_and_gemm_vq_a_matrix():
    case = Case("narrow", 2, 72, 8, R=0)
    with pytest.raises(ValueError, match="K=72 is not a multiple of the group size 64"):
        ops.linear_vq(make_input(case), **make_vq(case), rotation=64)
    p = make_vq(PLAIN)
    with pytest.raises(ValueError, match="linear_vq takes any leading shape"):
        ops.gemm_vq(make_input(PLAIN)[None], p["indices"], p["codebook"])


def test_bad_values_stay_in_their_token():
    x, p = make_input(PLAIN), make_vq(PLAIN)
    clean = ops.linear_vq(x, **p)
    x[5, 17] = float("nan")
    dirty = ops.linear_vq(x, **p)
    others = torch.arange(PLAIN.M) != 5
    assert torch.equal(dirty[others], clean[others]) and dirty[5].isnan().all()


# ---- gradients -----------------------------------------------------------------------------------


def gradients(function, leaves, grad):
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items()}
    found = torch.autograd.grad(
        function(**leaves), list(leaves.values()), grad.to(next(iter(leaves.values())).dtype)
    )
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("case", [PLAIN, SMALL[4], ROTATED, SMALL[6]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_dense_layer(case, dtype):
    p = make_vq(case, dtype=dtype)
    constants = {name: p.pop(name) for name in ("indices", "codebook", "scale")}
    constants |= {name: p.pop(name) for name in list(p) if p[name] is None}
    leaves = {"x": make_input(case, dtype)} | p
    grad = torch.randn(case.M, case.N, generator=torch.Generator().manual_seed(2))
    ours = gradients(
        lambda **leaves: ops.linear_vq(**leaves, **constants, rotation=case.rotation), leaves, grad
    )
    exact = gradients(
        lambda **leaves: model(**leaves, **double(constants), rotation=case.rotation),
        double(leaves),
        grad.to(dtype),
    )
    for name in leaves:
        assert (
            ours[name].dtype == dtype
            and relative_error(ours[name], exact[name]) < 8 * torch.finfo(dtype).eps
        ), name


def test_gemm_vq_has_the_same_gradient():
    x, p = make_input(NO_BIAS).requires_grad_(), make_vq(NO_BIAS)
    bias = torch.zeros(NO_BIAS.N, requires_grad=True)
    ops.gemm_vq(x, p["indices"], p["codebook"], None, bias).sum().backward()
    torch.testing.assert_close(x.grad, dense(p, torch.float32).sum(0).expand_as(x))
    assert torch.equal(bias.grad, torch.full_like(bias, NO_BIAS.M))


# ---- torch's own tools ---------------------------------------------------------------------------


def test_opcheck():
    for case in (NO_BIAS, ROTATED):
        x, p = make_input(case), make_vq(case, dtype=torch.float32)
        torch.library.opcheck(
            torch.ops.nibble.linear_vq.default,
            (x.clone().requires_grad_(), *p.values(), case.rotation),
        )
        some = [p[name] for name in ("indices", "codebook", "scale", "bias")]
        torch.library.opcheck(torch.ops.nibble.gemm_vq.default, (x.requires_grad_(), *some))


@pytest.mark.parametrize("case", [NO_BIAS, ROTATED], ids=str)
def test_it_compiles_whole_with_its_gradient(case):
    x, p = make_input(case), make_vq(case, dtype=torch.float32)
    function = torch.compile(
        lambda x: ops.linear_vq(x, **p, rotation=case.rotation).relu(),
        fullgraph=True,
        backend="aot_eager",
    )
    compiled, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    function(compiled).sum().backward()
    expected = ops.linear_vq(plain, **p, rotation=case.rotation).relu()
    expected.sum().backward()
    assert torch.equal(function(x), expected.detach())
    torch.testing.assert_close(compiled.grad, plain.grad)


def test_fake_tensors_and_inference_mode():
    with FakeTensorMode():
        x = make_input(PLAIN, torch.bfloat16).expand(2, PLAIN.M, PLAIN.K)
        fake = {
            name: torch.empty(t.shape, dtype=t.dtype)
            for name, t in ((n, t) for n, t in SHAPES.items())
        }
        y = ops.linear_vq(x, **fake)
        assert y.shape == (2, PLAIN.M, PLAIN.N) and y.dtype == torch.bfloat16
    with torch.inference_mode():
        x, p = make_input(PLAIN), make_vq(PLAIN)
        y = ops.linear_vq(x, **p)
    assert y.is_inference() and torch.equal(y, ops.linear_vq(x, **p))


SHAPES = make_vq(PLAIN)


def test_layouts_without_a_kernel_go_through_plain_torch():
    cuda = torch.device("cuda", 0)
    half = make_vq(PLAIN)["codebook"]
    assert (
        native_vq.has_layout(cuda, 256, half)
        and not native_vq.has_layout(cuda, 72, half)
        and not native_vq.has_layout(cuda, 256, half.float())
    )
    assert not native_vq.has_layout(
        torch.device("cpu"), 256, torch.empty(64, 3)
    ) and native_vq.has_layout(torch.device("cpu"), 72, half)
    backend, reason = which("linear_vq", "cpu")
    assert (backend, bool(reason)) == (
        choose.choose("gemm_vq", torch.device("cpu"), torch.bfloat16, ()).backend,
        True,
    )
    x, p = make_input(PLAIN, torch.float64), make_vq(PLAIN)
    assert torch.equal(ops.linear_vq(x, **p), reference_vq.linear_vq(x, **p))
