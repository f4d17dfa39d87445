"""Activations of 8 bits through the W4A4 ops: values known by hand, options, gradients, and that no
backend computes 4 bits where 8 were asked for.
"""

import pytest
import torch

from cases import Case, make_input, make_w4a4
from compare import assert_same
from nibble import kernels
from nibble.kernels import SHIFT, hadamard64, ops, reference
from nibble.kernels.backends import choose, kitchen, native, triton
from nibble.quant.weights.packing import pack_int4
from stand_in import StandIn, install

CASE = Case("whole", 9, 192, 64, R=16)
CPU, GPU, BF16 = torch.device("cpu"), torch.device("cuda", 0), torch.bfloat16
OPTIONS = [{}, {"rotation": 64}, {"act_unsigned": True}, {"unsigned_from": 64}]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def forget():
    caches = (choose.choose, choose._say, native.module, native.serving, native._gpu, triton.gpu)
    yield
    for cache in caches:
        cache.cache_clear()


# ---- the formula ---------------------------------------------------------------------------------


def test_codes_known_by_hand():
    x = torch.arange(-63.0, 65.0)[None]  # groups -63..0 and 1..64
    x[0, 0], x[0, 127] = -127, 127
    q, ascales, h = ops.quantize_down(x, torch.ones(128), torch.ones(128, 1), act_bits=8)
    assert_same(q, x.to(torch.int8))
    assert ascales.tolist() == [[1], [1]]
    assert h.item() == x.sum()


def test_unsigned_inputs_only_get_their_shift():
    x = torch.full((1, 64), 1.0)
    q, ascales, _ = ops.quantize_down(
        x, torch.ones(64), torch.ones(64, 0), act_unsigned=True, act_bits=8
    )
    assert (q == 127).all() and ascales.item() == pytest.approx((1 + SHIFT) / 127)


def test_a_product_known_by_hand():
    q = torch.cat((torch.full((1, 64), -127), torch.full((1, 64), 100)), 1).to(torch.int8)
    weight, scales = pack_int4(torch.full((1, 128), -8)), torch.tensor([[1.0], [0.5]])
    empty = torch.zeros(1, 0)
    ascales = torch.tensor([[1.0], [2.0]])
    y = ops.gemm_w4a4_up(q, ascales, empty, weight, scales, empty, act_bits=8)
    assert y.item() == 64 * 127 * 8 - 64 * 100 * 8


@each_option
def test_a_layer_is_its_16_bit_self_but_for_an_eighth_bit(options):
    x, p = make_input(CASE, torch.float64), make_w4a4(CASE, torch.float64)
    shift = torch.zeros(CASE.K, dtype=torch.float64)
    if "act_unsigned" in options or "unsigned_from" in options:
        x = torch.nn.functional.gelu(x)
        shift[options.get("unsigned_from", 0) :] = SHIFT
    smoothed = (x + shift) / p["smooth_factor"]
    smoothed = hadamard64(smoothed) if "rotation" in options else smoothed
    wanted = smoothed @ reference.dequantize_w4(p["weight"], p["weight_scale"], torch.float64).T
    wanted += x @ p["proj_down"] @ p["proj_up"].T + p["bias"]
    four, eight = (ops.linear_w4a4(x, **p, **options, act_bits=bits) for bits in (4, 8))
    error = (eight - wanted).norm() / wanted.norm()
    assert error < 0.012
    assert error < (four - wanted).norm() / wanted.norm() / 6


@each_option
def test_the_halves_make_the_whole(options):
    x, p = make_input(CASE), make_w4a4(CASE)
    quantizer = p["smooth_factor"], p["proj_down"]
    act = ops.quantize_down(x, *quantizer, **options, act_bits=8)
    assert act[0].shape == (CASE.M, CASE.K)
    signs = {name: value for name, value in options.items() if name != "rotation"}
    rest = (p["weight"], p["weight_scale"], p["proj_up"], p["bias"])
    y = ops.gemm_w4a4_up(*act, *rest, **signs, act_bits=8)
    torch.testing.assert_close(y, ops.linear_w4a4(x, **p, **options, act_bits=8))


def test_the_fused_ops_are_their_layers():
    second = Case("second", CASE.M, CASE.N, 40, R=8)
    x, p, p2 = make_input(CASE), make_w4a4(CASE), make_w4a4(second)
    y = ops.linear_w4a4(x, **p, act_bits=8)
    lists = ([p[name]] * 2 for name in ("weight", "weight_scale", "proj_down", "proj_up", "bias"))
    for each in ops.linear_w4a4_grouped(x, p["smooth_factor"], *lists, act_bits=8):
        torch.testing.assert_close(each, y)
    hidden = torch.nn.functional.gelu(y, approximate="tanh")
    layers = tuple(p.values()), tuple(p2.values())
    for bits, bits2 in ((8, 8), (8, 4)):
        out = ops.mlp_w4a4(x, *layers, act_bits=bits, act_bits2=bits2)
        torch.testing.assert_close(out, ops.linear_w4a4(hidden, **p2, act_bits=bits2))
    act = ops.quantize_down(x, p["smooth_factor"], p["proj_down"], act_bits=8)
    rest = (p["weight"], p["weight_scale"], p["proj_up"], p["bias"])
    quantizer = (p2["smooth_factor"], p2["proj_down"])
    q2, ascales2, _ = ops.gemm_w4a4_up_gelu_quantize_down(
        *act, *rest, *quantizer, act_bits=8, act_bits2=8
    )
    assert q2.shape == (CASE.M, CASE.N)
    torch.testing.assert_close(ascales2, ops.quantize_down(hidden, *quantizer, act_bits=8)[1])


def test_what_is_not_finite_stays_in_its_group():
    x, p = make_input(CASE), make_w4a4(CASE)
    x[0, 3], x[1, 70] = float("nan"), float("inf")
    q, ascales, _ = ops.quantize_down(x, p["smooth_factor"], p["proj_down"], act_bits=8)
    assert ascales[0, 0].isnan() and ascales[1, 1].isinf()
    assert ascales[1:, 0].isfinite().all() and q.dtype == torch.int8


# ---- as an op ------------------------------------------------------------------------------------


def test_gradients_are_those_of_4_bits():
    found = []
    for bits in (4, 8):
        p = {
            n: t if n == "weight" else t.clone().requires_grad_()
            for n, t in make_w4a4(CASE).items()
        }
        x = make_input(CASE).requires_grad_()
        y = ops.linear_w4a4(x, **p, act_bits=bits)
        y.backward(torch.ones_like(y))
        found.append([x.grad, p["proj_down"].grad, p["proj_up"].grad, p["bias"].grad])
    for one, other in zip(*found, strict=True):
        assert_same(one, other)


def test_it_is_traced_and_checked_as_every_op():
    x, p = make_input(CASE), make_w4a4(CASE)

    def layer(x):
        return ops.linear_w4a4(x, **p, act_bits=8)

    assert_same(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    options = {"act_bits": 8}
    torch.library.opcheck(torch.ops.nibble.linear_w4a4.default, (x, *p.values()), options)
    quantizer = (x, p["smooth_factor"], p["proj_down"])
    torch.library.opcheck(torch.ops.nibble.quantize_down.default, quantizer, options)


@pytest.mark.parametrize("bits", [2, 16])
def test_other_widths_are_refused(bits):
    x, p = make_input(CASE), make_w4a4(CASE)
    with pytest.raises(ValueError, match=f"act_bits={bits}: activations have 4 bits or 8"):
        ops.linear_w4a4(x, **p, act_bits=bits)
    with pytest.raises(ValueError, match=f"act_bits={bits}"):
        ops.quantize_down(x, p["smooth_factor"], p["proj_down"], act_bits=bits)


def test_codes_of_the_other_width_are_refused():
    x, p = make_input(CASE), make_w4a4(CASE)
    act = ops.quantize_down(x, p["smooth_factor"], p["proj_down"])
    rest = (p["weight"], p["weight_scale"], p["proj_up"], p["bias"])
    with pytest.raises(ValueError, match="K=96 is not a multiple|K=192 columns and x has K=96"):
        ops.gemm_w4a4_up(*act, *rest, act_bits=8)


# ---- who computes it -----------------------------------------------------------------------------


def test_a_backend_without_8_bits_is_passed_over(monkeypatch):
    """Never 4 instead: the calls of a stand-in for compiled kernels are counted."""
    install(monkeypatch, StandIn())
    monkeypatch.setattr(native, "ACT_BITS", (4,))
    x, p = make_input(CASE), make_w4a4(CASE)
    assert choose.choose("linear_w4a4", CPU, torch.float32, (torch.float32,)).backend == "native"
    choice = choose.choose("linear_w4a4", CPU, torch.float32, (torch.float32,), 8)
    assert choice.backend == "reference"
    assert "compiled kernels have no activations of 8 bits" in choice.reason
    for _ in range(2):  # the second call is the remembered one
        assert_same(ops.linear_w4a4(x, **p, act_bits=8), reference.linear_w4a4(x, **p, act_bits=8))


def test_triton_and_kitchen_say_no(monkeypatch):
    monkeypatch.setattr(triton, "ACT_BITS", (4,))
    use, why = triton.serves("linear_w4a4", GPU, BF16, (BF16,), 8)
    assert not use and why == "Triton's kernels have no activations of 8 bits"
    use, why = kitchen.decide("linear_w4a4", GPU, BF16, 8)
    assert not use and why == "comfy_kitchen's svdquant_w4a4 has no activations of 8 bits"


def test_the_choice_is_told():
    backend, reason = kernels.which("linear_w4a4", "cpu", torch.float32, act_bits=8)
    assert backend in choose.NAMES and reason


# ---- which width costs nothing -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "bits"),
    [(75, 4), (80, 4), (86, 4), (89, 4), (90, 8), (100, 8), (103, 8), (110, 8), (120, 8)],
)
def test_8_bits_are_free_where_there_are_no_int4_products(capability, bits, monkeypatch):
    monkeypatch.setattr(triton, "gpu", lambda device: triton.Gpu("cuda", str(capability), 100))
    there = ("triton", "stand-in", None)
    monkeypatch.setattr("nibble.kernels.activations.choose", lambda *asked: choose.Choice(*there))
    found = kernels.act_bits(GPU)
    assert found.bits == bits and found.why


@pytest.mark.parametrize(
    ("slow", "fitted", "bits", "why"),
    [
        ((8,), 8, 4, "8 bits would run in plain torch here, 4 faster"),
        ((4, 8), 4, 4, "either width runs in plain torch here"),
        ((4, 8), 8, 8, "either width runs in plain torch here"),
        ((), 4, 8, "codes of 4 bits are multiplied as 8-bit ones here anyway"),
    ],
)
def test_nobody_loses_compiled_kernels_to_8_bits(slow, fitted, bits, why, monkeypatch):
    def stand_in(op, device, dtype, parameters, act_bits):
        backend = "reference" if act_bits in slow else "native"
        return choose.Choice(backend, "stand-in", None)

    monkeypatch.setattr("nibble.kernels.activations.choose", stand_in)
    assert kernels.act_bits("cpu", torch.float32, fitted) == (bits, why)
