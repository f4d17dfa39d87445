"""Linears of 4-bit floats: answers known by hand, gradients, torch's views of the op, and the ways
that run them, with stand-ins for a GPU.
"""

import types

import pytest
import torch

from nibble.kernels import ops
from nibble.kernels.backends import choose, native, native_nvfp4, nvfp4, triton
from nibble.kernels.params import NVFP4Params
from nibble.kernels.reference import nvfp4 as reference

M, N, K, R = 5, 136, 192, 16


def parameters(dtype=torch.float32, rounded=False) -> NVFP4Params:
    draw = torch.Generator().manual_seed(0)
    return NVFP4Params(
        torch.randint(-128, 128, (N, K // 2), generator=draw, dtype=torch.int8),
        (torch.rand(N, K // 16, generator=draw) * 20 + 1).to(torch.float8_e4m3fn),
        torch.rand(N, generator=draw) * 0.01 + 0.001,
        (torch.rand(K, generator=draw) + 0.5).to(dtype),
        (torch.randn(K, R, generator=draw) * 0.1).to(dtype),
        (torch.randn(N, R, generator=draw) * 0.1).to(dtype),
        torch.randn(N, generator=draw).to(dtype),
        rounded,
    )


def inputs(*shape, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize(
    ("value", "code"),
    # ties go to the even code: .25 to 0, .75 to 1, 1.25 to 1, 1.75 to 2, 2.5 to 2, 3.5 to 4, 5 to 4
    [
        (0.25, 0),
        (0.75, 2),
        (1.25, 2),
        (1.75, 4),
        (2.5, 4),
        (3.5, 6),
        (5.0, 6),
        (9.0, 7),
        (-3.4, 13),
    ],
)
def test_codes_known_by_hand(value, code):
    assert reference.e2m1_codes(torch.tensor([value])).item() == code


def test_a_linear_known_by_hand():
    """16 ones: scale e4m3(1/6) = .171875, code of 1 / (1/6) = 6; weights of 1 (code 2), scale 2."""
    x = torch.ones(1, 64)
    p = NVFP4Params(
        torch.full((1, 32), 0x22, dtype=torch.int8),
        torch.full((1, 4), 2.0).to(torch.float8_e4m3fn),
        torch.tensor([0.5]),
        torch.ones(64),
        torch.zeros(64, 16),
        torch.zeros(1, 16),
        torch.tensor([3.0]),
    )
    assert ops.linear_nvfp4(x, p).item() == 64 * 6 * 0.171875 * 2 * 0.5 + 3


def test_the_rounded_scale_loses_less():
    v = torch.randn(256, 1024, generator=torch.Generator().manual_seed(2))
    exact, rounded = (
        (reference.dequantize_nvfp4(*reference.quantize_nvfp4(v, way), v.dtype) - v).norm()
        for way in (False, True)
    )
    assert rounded < exact


def test_groups_of_nothing_stay_nothing():
    codes, scale = reference.quantize_nvfp4(torch.zeros(2, 32))
    assert not codes.any() and not scale.float().any()
    p = parameters()
    assert ops.linear_nvfp4(torch.zeros(2, K), p).allclose(p.bias.expand(2, N))


@pytest.mark.parametrize("shape", [(M,), (2, 3), (0,)])
def test_any_leading_shape(shape):
    p = parameters()
    y = ops.linear_nvfp4(inputs(*shape), p)
    assert y.shape == (*shape, N)
    assert torch.equal(y, reference.linear_nvfp4(inputs(*shape), *p))


def test_gradients_go_straight_through():
    p = parameters(torch.float64)
    leaves = [inputs(M, dtype=torch.float64), p.proj_down, p.proj_up, p.bias]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    x, down, up, bias = leaves
    ops.linear_nvfp4(x, p._replace(proj_down=down, proj_up=up, bias=bias)).sin().sum().backward()
    twins = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    x, down, up, bias = twins
    dense = reference.decoded_weight(p.weight, p.weight_scale, torch.float64)
    main = (x / p.smooth_factor) @ dense.t() * p.weight_scale_2.double()
    model = main + (x @ down) @ up.t() + bias
    straight = ops.linear_nvfp4(leaves[0].detach(), p)
    (model * straight.cos()).sum().backward()
    for leaf, twin in zip(leaves, twins, strict=True):
        assert torch.allclose(leaf.grad, twin.grad, rtol=1e-6, atol=1e-9)


def test_torch_s_own_checks():
    p = parameters()
    # test_schema multiplies its operands, which torch cannot do with 8-bit floats
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    op = torch.ops.nibble.linear_nvfp4.default
    torch.library.opcheck(op, (inputs(M), *p), test_utils=checks)
    compiled = torch.compile(lambda x: ops.linear_nvfp4(x, p), fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs(M)), ops.linear_nvfp4(inputs(M), p))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_scale": torch.ones(N, K // 16)}, "weight_scale must be float8_e4m3fn"),
        ({"weight_scale_2": torch.ones(3)}, r"weight_scale_2 is \(3,\)"),
        ({"smooth_factor": torch.ones(3)}, r"smooth_factor is \(3,\)"),
        ({"proj_up": torch.ones(N, 3)}, r"proj_up is \(136, 3\)"),
    ],
)
def test_wrong_operands_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        ops.linear_nvfp4(inputs(M), parameters()._replace(**change))


# ---- what runs it --------------------------------------------------------------------------------


def scaled_mm(a, b, scale_a, scale_b, out_dtype):
    """Stands in for torch._scaled_mm: reads packed codes and tiled scales place by place."""

    def numbers(packed, tiles):
        raw = packed.view(torch.uint8)
        codes = torch.stack([raw & 15, raw >> 4], -1).flatten(-2).long()
        rows, groups = codes.shape[0], codes.shape[1] // 16
        columns = -(-groups // 4)
        row, group = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
        tile = row // 128 * columns + group // 4
        place = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + group % 4
        scale = tiles.float()[place]
        return reference.e2m1_values(codes, torch.float64) * scale.repeat_interleave(16, 1)

    return (numbers(a, scale_a) @ numbers(b.t(), scale_b).t()).to(out_dtype)


@pytest.fixture
def blackwell(monkeypatch):
    """torch as it is on a GPU with 4-bit floats."""
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    nvfp4._tried.cache_clear()
    yield
    nvfp4._tried.cache_clear()


def test_the_scaled_product_gets_its_operands_in_order(blackwell):
    p = parameters(torch.bfloat16, rounded=True)
    x = inputs(150, dtype=torch.bfloat16)
    found = nvfp4.linear_nvfp4(x, p).float()
    wanted = reference.linear_nvfp4(x, *p).float()
    assert (found - wanted).norm() < 0.01 * wanted.norm()


def test_the_trial_accepts_a_right_product_and_refuses_others(blackwell, monkeypatch):
    cpu = torch.device("cpu")
    assert nvfp4._tried(cpu) == (True, "torch's scaled product of 4-bit floats")
    nvfp4._tried.cache_clear()
    monkeypatch.setattr(torch, "_scaled_mm", lambda *a, **k: 1.2 * scaled_mm(*a, **k))
    served, why = nvfp4._tried(cpu)
    assert not served and "is wrong on cpu" in why
    nvfp4._tried.cache_clear()

    def fails(*_, **__):
        raise RuntimeError("not on this GPU\nand more")

    monkeypatch.setattr(torch, "_scaled_mm", fails)
    words = "torch's scaled product fails on cpu: RuntimeError: not on this GPU"
    assert nvfp4._tried(cpu) == (False, words)


@pytest.fixture
def ways(monkeypatch):
    """A GPU whose ways work as told: name -> (whether, why)."""

    def make(**ways) -> tuple[str, str]:
        brought = torch.bfloat16 if ways["native"][0] else None
        serves = (brought, ways["native"][1])
        monkeypatch.setattr(native, "serves", lambda *asked: serves)
        monkeypatch.setattr(native_nvfp4, "tried", lambda device: ways["trial"])
        monkeypatch.setattr(triton, "serves", lambda *asked: ways["triton"])
        monkeypatch.setattr(nvfp4, "serves", lambda *asked: ways["scaled_mm"])
        choose.choose.cache_clear()
        found = choose.choose("linear_nvfp4", torch.device("cuda", 0), torch.bfloat16, ())
        choose.choose.cache_clear()
        return found

    return make


YES, NO = (True, "serves"), (False, "cannot")


@pytest.mark.parametrize(
    ("native_serves", "trial", "triton_serves", "scaled", "backend", "words"),
    [
        (YES, (True, "right"), YES, YES, "native", "right"),
        (YES, (False, "wrong numbers"), YES, YES, "triton", "serves; not native: wrong numbers"),
        (NO, NO, (False, "no Triton"), YES, "scaled_mm", "not native: cannot; no Triton"),
        (NO, NO, NO, (False, "none"), "decoded", "none; 4-bit memory at 16-bit speed; not native"),
    ],
)
def test_a_gpu_s_way_and_its_reason(
    native_serves, trial, triton_serves, scaled, backend, words, ways
):
    given = {"native": native_serves, "trial": trial, "triton": triton_serves, "scaled_mm": scaled}
    choice = ways(**given)
    assert choice.backend == backend and words in choice.reason
    assert (choice.parameters is torch.bfloat16) == (backend == "native")


@pytest.mark.parametrize(("capability", "serves"), [(120, True), (121, True), (100, False)])
def test_compiled_kernels_are_for_two_gpus(monkeypatch, capability, serves):
    module = types.SimpleNamespace(quantize_nvfp4_down=None, gemm_nvfp4_up=None)
    monkeypatch.setattr(native, "serving", lambda device: (module, "stand-in"))
    monkeypatch.setattr(native, "capability", lambda device: capability)
    kinds = (torch.bfloat16,)
    given = native.NVFP4_OPS, torch.device("cuda", 0), torch.bfloat16, kinds
    brought_to, why = native.serves(*given)
    assert (brought_to is not None) == serves
    assert serves or "12.0 and 12.1" in why


def test_triton_is_asked_from_blackwell_on(monkeypatch):
    gpu = triton.Gpu("cuda", "90", 132)
    monkeypatch.setattr(triton, "module", lambda: (object(), "Triton"))
    monkeypatch.setattr(triton, "gpu", lambda device: gpu)
    triton._serving_nvfp4.cache_clear()
    given = "linear_nvfp4", torch.device("cuda", 0), torch.bfloat16, (torch.bfloat16,)
    assert triton.serves(*given) == (False, "Triton multiplies no 4-bit floats on cuda:0")
    triton._serving_nvfp4.cache_clear()


def test_decoded_weights_leave_inputs_alone():
    p = parameters()
    dense = reference.decoded_weight(p.weight, p.weight_scale, torch.float32)
    dense = dense * p.weight_scale_2[:, None] / p.smooth_factor + p.proj_up @ p.proj_down.t()
    wanted = torch.nn.functional.linear(inputs(M), dense, p.bias)
    assert torch.allclose(reference.linear_nvfp4_decoded(inputs(M), *p), wanted, atol=1e-4)
