"""4-bit weights read as int8: values known by hand, the formula in whole numbers, gradients,
refusals.
"""

import pytest
import torch

from compare import assert_same
from nibble import kernels
from nibble.kernels import hadamard64, ops
from nibble.kernels.reference import w4a8
from nibble.quant.weights.packing import pack_int4

M, K, N, R = 7, 192, 40, 8
TABLE = torch.tensor(
    [-115, -95, -78, -62, -48, -33, -19, -5, 10, 24, 38, 53, 69, 86, 104, 127], dtype=torch.int8
)


def layer(group: int = 32, rank: int = R, dtype=torch.float64) -> dict:
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    return {
        "weight": pack_int4(torch.randint(0, 16, (N, K), generator=g)),
        "weight_scale": torch.randint(-127, 128, (K // group, N), generator=g, dtype=torch.int8),
        "weight_channel_scale": normal(N).abs() * 0.01 + 0.001,
        "weight_table": TABLE,
        "smooth_factor": normal(K).exp(),
        "proj_down": normal(K, rank) * 0.1 if rank else None,
        "proj_up": normal(N, rank) * 0.1 if rank else None,
        "bias": normal(N),
    }


def tokens(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(M, K, generator=torch.Generator().manual_seed(1)).to(dtype)


# ---- the formula ---------------------------------------------------------------------------------


def test_weights_known_by_hand():
    codes = torch.tensor([[0, 15, 8, 7] * 16])  # levels -115, 127, 10, -5
    scale = torch.tensor([[127], [-127], [64], [1]], dtype=torch.int8)
    found = w4a8.decode_w4a8(pack_int4(codes), scale, TABLE)
    # (-115 * 127 + 64) >> 7 = -14541 >> 7 = -114, and so on
    by_group = [[-114, 126, 10, -5], [114, -126, -10, 5], [-57, 64, 5, -2], [-1, 1, 0, 0]]
    assert found.view(4, 16)[:, :4].tolist() == by_group
    assert found.dtype == torch.int8


def test_every_weight_is_an_int8():
    levels, scales = torch.arange(-127, 128), torch.arange(-127, 128)
    found = w4a8.decode_groups(levels[:, None], scales)
    assert found.min() >= -126 and found.max() <= 126
    exact = levels[:, None] * scales / 128
    assert ((found - exact).abs() <= 0.5).all()


def test_a_product_known_by_hand():
    x = torch.full((1, 64), 2.0)
    y = ops.linear_w4a8(
        x,
        pack_int4(torch.full((1, 64), 15)),
        torch.full((2, 1), 127, dtype=torch.int8),
        torch.tensor([0.5]),
        TABLE,
        torch.full((64,), 2.0),
        bias=torch.tensor([3.0]),
    )
    # each input is 127 * (1 / 127), each weight 126 * 0.5
    assert y.item() == pytest.approx(64 * 63 + 3)


@pytest.mark.parametrize("group", [16, 32, 64])
@pytest.mark.parametrize("rotation", [0, 64])
def test_it_is_a_product_of_whole_numbers(group, rotation):
    p, x = layer(group), tokens()
    smoothed = x / p["smooth_factor"]
    smoothed = hadamard64(smoothed) if rotation else smoothed
    scale = smoothed.abs().amax(1, keepdim=True) / 127
    whole = (smoothed / scale).round().long() @ w4a8.decode_w4a8(
        p["weight"], p["weight_scale"], TABLE
    ).long().T
    wanted = whole * scale * p["weight_channel_scale"]
    wanted += x @ p["proj_down"] @ p["proj_up"].T + p["bias"]
    y = ops.linear_w4a8(x, **p, rotation=rotation)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    narrow = {n: t.float() if t.is_floating_point() else t for n, t in p.items()}
    y32 = ops.linear_w4a8(x.float(), **narrow, rotation=rotation)
    assert (y32 - wanted).norm() < 1e-5 * wanted.norm()


def test_it_is_near_its_dense_matrix():
    p, x = layer(), tokens()
    dense = w4a8.dequantize_w4a8(
        p["weight"], p["weight_scale"], p["weight_channel_scale"], TABLE, torch.float64
    )
    wanted = (x / p["smooth_factor"]) @ dense.T + x @ p["proj_down"] @ p["proj_up"].T + p["bias"]
    assert (ops.linear_w4a8(x, **p) - wanted).norm() < 0.02 * wanted.norm()


def test_without_a_branch_and_of_any_leading_shape():
    p = layer(rank=0)
    x = tokens().reshape(1, M, K)
    y = ops.linear_w4a8(x, **p)
    assert y.shape == (1, M, N)
    assert_same(y[0], ops.linear_w4a8(x[0], **p))
    assert ops.linear_w4a8(x[:, :0], **p).shape == (1, 0, N)


def test_what_is_not_finite_stays_in_its_token():
    p, x = layer(), tokens()
    wanted = ops.linear_w4a8(x, **p)
    x[2, 5] = float("nan")
    y = ops.linear_w4a8(x, **p)
    assert y[2].isnan().all()
    keep = torch.arange(M) != 2
    assert_same(y[keep], wanted[keep])


def test_tokens_of_zeros():
    p = layer()
    y = ops.linear_w4a8(torch.zeros(2, K, dtype=torch.float64), **p)
    assert_same(y, p["bias"].expand(2, -1))


# ---- as an op ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rotation", [0, 64])
def test_gradients_are_those_of_the_dense_layer(rotation):
    p, x = layer(), tokens().requires_grad_()
    for name in ("proj_down", "proj_up", "bias"):
        p[name].requires_grad_()
    ops.linear_w4a8(x, **p, rotation=rotation).sin().sum().backward()
    found = [t.grad for t in (x, p["proj_down"], p["proj_up"], p["bias"])]
    y = ops.linear_w4a8(x.detach(), **p, rotation=rotation).detach()
    dense = w4a8.dequantize_w4a8(
        p["weight"], p["weight_scale"], p["weight_channel_scale"], TABLE, torch.float64
    )
    plain = tokens().requires_grad_()
    parts = [p[name].detach().clone().requires_grad_() for name in ("proj_down", "proj_up", "bias")]
    smoothed = plain / p["smooth_factor"]
    smoothed = hadamard64(smoothed) if rotation else smoothed
    out = smoothed @ dense.T + plain @ parts[0] @ parts[1].T + parts[2]
    out.backward(y.cos())
    for one, other in zip(found, [plain.grad, *(t.grad for t in parts)], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rank", [0, R])
def test_it_is_traced_and_checked_as_every_op(rank):
    p, x = layer(rank=rank, dtype=torch.float32), tokens(torch.float32)

    def run(x):
        return ops.linear_w4a8(x, **p)

    assert_same(torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x))
    torch.library.opcheck(torch.ops.nibble.linear_w4a8.default, (x, *p.values()))


def test_half_precision_is_as_close_as_it_can_be():
    p, x = layer(dtype=torch.float32), tokens(torch.float32)
    exact = ops.linear_w4a8(x, **p)
    for dtype in (torch.bfloat16, torch.float16):
        half = {
            n: t.to(dtype) if t is not None and t.is_floating_point() else t for n, t in p.items()
        }
        y = ops.linear_w4a8(x.to(dtype), **half)
        assert y.dtype == dtype
        assert (y.float() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_scale": torch.zeros(5, N, dtype=torch.int8)}, "groups of \\(16, 32, 64\\)"),
        ({"weight_scale": torch.zeros(6, N)}, "must be int8"),
        ({"weight_scale": torch.zeros(6, N - 1, dtype=torch.int8)}, "weight_scale is \\(6, 39\\)"),
        ({"weight_table": TABLE[:8]}, "weight_table must be int8 \\(16,\\)"),
        ({"weight_table": TABLE.float()}, "weight_table must be int8"),
        ({"weight_channel_scale": torch.zeros(N + 1)}, "weight_channel_scale is \\(41,\\)"),
        ({"proj_up": None}, "come together"),
        ({"smooth_factor": torch.ones(64)}, "smooth_factor is \\(64,\\)"),
        ({"rotation": 32}, "rotation=32"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        ops.linear_w4a8(tokens(), **(layer() | change))


def test_who_computes_it():
    backend, reason = kernels.which("linear_w4a8", "cpu", torch.float32)
    assert backend in ("native", "reference") and reason
    assert kernels.which("linear_w4a8", "cpu", torch.float64)[0] == "reference"
