"""Which way a GPU goes that is not here: native -> Triton -> comfy-kitchen -> plain torch, with
stand-ins for devices and modules.
"""

import logging
import sys
import types

import pytest
import torch

from cases import Case, make_input, make_w4a4
from nibble.kernels import ops, reference
from nibble.kernels.backends import choose, kitchen, native, triton
from nibble.kernels.backends.triton import Gpu
from stand_in import StandIn, install, install_nothing

GPU, XPU, CPU = torch.device("cuda", 0), torch.device("xpu", 0), torch.device("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASE, SECOND = Case("", 5, 64, 128, R=4), Case("", 5, 128, 24, R=3)


@pytest.fixture(autouse=True)
def forget():
    """Clears what is remembered about modules and devices, before and after."""
    caches = (choose.choose, choose._say, native.module, native.serving, native._gpu)
    caches += (triton.module, triton.serving, triton._serving_w4a8, triton._serving_vq)
    caches += (triton.gpu, kitchen.module)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def there(monkeypatch):
    """Makes a device look like a GPU, with Triton for all makes, whose trial differs from the
    reference by `off`.
    """
    install_nothing(monkeypatch)

    def make(gpu: Gpu, off: float = 0.004, back_ends=("nvidia", "amd", "intel")):
        package = types.SimpleNamespace(__version__="3.9", __path__=[])
        back_ends = types.SimpleNamespace(backends=dict.fromkeys(back_ends))
        monkeypatch.setitem(sys.modules, "triton", package)
        monkeypatch.setitem(sys.modules, "triton.backends", back_ends)
        monkeypatch.setattr(triton, "gpu", lambda device: gpu)
        monkeypatch.setattr(triton, "trial", lambda device: off)
        monkeypatch.setattr(triton, "trial_w4a8", lambda device: off)
        monkeypatch.setattr(triton, "trial_vq", lambda device: off)

    return make


# ---- Triton --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpu", "use", "words"),
    [
        (Gpu("cuda", "80", 108), True, "compute capability 8.0, products of codes in int8"),
        (Gpu("cuda", "103", 148), True, "10.3, products of codes in bfloat16"),
        (Gpu("cuda", "75", 40), False, "needs compute capability 8.0, and this GPU has 7.5"),
        (Gpu("hip", "gfx1100", 48), True, "gfx1100"),
        (Gpu("hip", "gfx1201", 32), True, "gfx1201"),
        (Gpu("hip", "gfx942", 304), True, "gfx942"),
        (Gpu("hip", "gfx1030", 40), False, "need RDNA3, RDNA4 or CDNA, and this GPU is gfx1030"),
        (Gpu("hip", "gfx906", 60), False, "gfx906"),
    ],
    ids=lambda value: getattr(value, "arch", ""),
)
def test_triton_is_for_some_gpus(gpu, use, words, there):
    there(gpu)
    chosen, reason = triton.serves("linear_w4a4", GPU, BF16, (BF16, None))
    assert chosen == use and words in reason


def test_an_intel_gpu_runs_triton_where_torchs_triton_knows_it(there):
    there(Gpu("xpu", "Arc B580", 160))
    choice = choose.choose("linear_w4a4", XPU, BF16, (BF16,))
    assert choice.backend == "triton" and "Arc B580" in choice.reason
    choose.choose.cache_clear()
    triton.serving.cache_clear()
    there(Gpu("xpu", "Arc B580", 160), back_ends=("nvidia", "amd"))
    assert triton.serves("linear_w4a4", XPU, BF16, ()) == (
        False,
        "this Triton was built for amd and nvidia, not for intel",
    )


def test_weights_that_are_read_as_int8_have_a_trial_of_their_own(there, monkeypatch):
    there(Gpu("cuda", "120", 170))
    choice = choose.choose("linear_w4a8", GPU, BF16, (BF16, None))
    assert choice.backend == "triton" and "products of codes in int8" in choice.reason
    choose.choose.cache_clear()
    triton._serving_w4a8.cache_clear()
    monkeypatch.setattr(triton, "trial_w4a8", lambda device: 0.5)
    choice = choose.choose("linear_w4a8", GPU, BF16, (BF16, None))
    assert choice.backend == "reference" and "0.5 off the reference's" in choice.reason
    assert triton.serves("linear_w4a4", GPU, BF16, (BF16,))[0]


def test_codebooks_run_through_triton_where_nothing_is_compiled(there, monkeypatch):
    there(Gpu("hip", "gfx1201", 32))
    for op in ("gemm_vq", "linear_vq"):
        assert choose.choose(op, GPU, BF16, ()).backend == "triton"
    choose.choose.cache_clear()
    triton._serving_vq.cache_clear()
    monkeypatch.setattr(triton, "trial_vq", lambda device: 0.5)
    choice = choose.choose("linear_vq", GPU, BF16, ())
    assert choice.backend == "reference" and "0.5 off the reference's" in choice.reason


TRIALS = [triton.trial, triton.trial_w4a8, triton.trial_vq]


@pytest.mark.parametrize("trial", TRIALS, ids=lambda each: each.__name__)
def test_a_trial_compares_with_the_reference(trial, monkeypatch):
    """The reference stands for Triton's kernels."""
    from nibble.kernels.reference import vq, w4a8

    by_reference = {"linear_w4a4": lambda x, p: reference.linear_w4a4(x, *p)}
    by_reference["linear_w4a8"] = lambda x, p: w4a8.linear_w4a8(x, *p)
    by_reference["linear_vq"] = lambda x, p: vq.linear_vq(x, *p)
    module = types.SimpleNamespace(**by_reference)
    monkeypatch.setattr(triton, "w4a4", lambda: module)
    monkeypatch.setattr(triton, "w4a8", lambda: module)
    monkeypatch.setattr(triton, "vq", lambda: module)
    assert trial(CPU) < triton.DIFFERENCE


@pytest.mark.parametrize("off", [0.5, float("nan")])
def test_a_gpu_whose_trial_is_wrong_goes_another_way(off, there):
    there(Gpu("cuda", "89", 128), off)
    use, reason = triton.serves("linear_w4a4", GPU, BF16, (BF16,))
    assert not use and "off the reference's" in reason


def test_a_gpu_whose_trial_fails_goes_another_way_with_the_compilers_words(there, monkeypatch):
    def fail(device):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    there(Gpu("cuda", "89", 128))
    monkeypatch.setattr(triton, "trial", fail)
    assert triton.serves("linear_w4a4", GPU, BF16, (BF16,)) == (
        False,
        "Triton fails on cuda:0: RuntimeError: Failed to find C compiler.",
    )


@pytest.mark.parametrize(
    ("op", "device", "dtype", "parameters", "words"),
    [
        ("linear_w4a16", GPU, BF16, (), "no linear_w4a16 in Triton"),
        ("linear_w4a4", CPU, BF16, (), "on GPUs only, and this is cpu"),
        ("linear_w4a4", torch.device("mps"), BF16, (), "on GPUs only, and this is mps"),
        ("linear_w4a4", GPU, torch.float64, (), "not torch.float64"),
        ("linear_w4a4", GPU, BF16, (BF16, F32), "float16 or bfloat16, not torch.float32"),
    ],
)
def test_what_triton_does_not_take_is_refused_unasked(
    op, device, dtype, parameters, words, monkeypatch
):
    monkeypatch.setattr(triton, "module", None)
    use, reason = triton.serves(op, device, dtype, parameters)
    assert not use and words in reason


def test_without_triton_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    use, reason = triton.serves("linear_w4a4", GPU, BF16, ())
    assert not use and "triton-windows" in reason


def test_the_way_is_logged_once_with_all_reasons(there, caplog):
    there(Gpu("cuda", "89", 128))
    with caplog.at_level(logging.INFO, "nibble"):
        for dtype in (BF16, F16):
            choose.choose("linear_w4a4", GPU, dtype, (dtype,))
    lines = [line for line in caplog.messages if "4-bit layers on cuda:0" in line]
    assert len(lines) == 1
    assert lines[0].startswith("4-bit layers on cuda:0: Triton (Triton 3.9 for")
    assert "not native:" in lines[0]


def test_every_w4a4_op_goes_to_triton_where_it_is_chosen(monkeypatch):
    """The CPU stands for a GPU, and the reference for Triton's kernels."""
    calls = []

    def stand_in(name, function):
        def call(*arguments):
            calls.append(name)
            return function(*arguments)

        return call

    def gemm(act, p, dtype):
        return reference.gemm_w4a4_up(*act[:3], *p, act.act_unsigned).to(dtype)

    functions = {
        "quantize_down": lambda x, p: reference.quantize_down(x, *p),
        "gemm_w4a4_up": gemm,
        "gemm_w4a4_up_gelu_quantize_down": (
            lambda a: reference.gemm_w4a4_up_gelu_quantize_down(*a)
        ),
        "linear_w4a4": lambda x, p: reference.linear_w4a4(x, *p),
        "linear_w4a4_grouped": lambda x, p: reference.linear_w4a4_grouped(x, *p),
    }
    module = types.SimpleNamespace(**{name: stand_in(name, f) for name, f in functions.items()})
    install_nothing(monkeypatch)
    monkeypatch.setattr(triton, "serves", lambda op, *others: (op in triton.OPS, "stand-in"))
    monkeypatch.setattr(triton, "w4a4", lambda: module)
    x, p, second = make_input(CASE), make_w4a4(CASE, F32), make_w4a4(SECOND, F32)
    wanted = reference.linear_w4a4(x, **p)
    assert torch.equal(ops.linear_w4a4(x, **p), wanted)
    lists = ([p[name]] * 2 for name in ("weight", "weight_scale", "proj_down", "proj_up", "bias"))
    ys = ops.linear_w4a4_grouped(x, p["smooth_factor"], *lists)
    assert torch.equal(ys[1], wanted)
    ops.mlp_w4a4(x, tuple(p.values()), tuple(second.values()))
    act = ops.quantize_down(x, p["smooth_factor"], p["proj_down"])
    rest = (p["weight"], p["weight_scale"], p["proj_up"], p["bias"])
    ops.gemm_w4a4_up(*act, *rest)
    ops.gemm_w4a4_up_gelu_quantize_down(*act, *rest, second["smooth_factor"], second["proj_down"])
    assert set(calls) == set(functions)
    assert calls.count("linear_w4a4") == 3  # two of them an MLP's


# ---- GPUs without 8-bit integer products ---------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "ops_asked", "serves"),
    [
        (100, ("gemm_w4a4_up",), True),
        (103, ("quantize_down", "gemm_w4a4_up"), False),
        (103, ("gemm_w4a16", "gemv_w4a16"), True),
        (103, ("gemm_vq",), True),
        (120, ("gemm_w4a4_up",), True),
    ],
)
def test_a_b300_does_not_multiply_codes_as_8_bit_integers(
    capability, ops_asked, serves, monkeypatch
):
    module = StandIn()
    module.DEVICES, module.capability = ("cpu", "cuda"), lambda device: capability
    install(monkeypatch, module)
    brought_to, reason = native.serves(ops_asked, GPU, BF16, (BF16,))
    assert (brought_to is not None) == serves
    assert serves or "few 8-bit integer products" in reason


# ---- comfy-kitchen -------------------------------------------------------------------------------

GEMV = ["gemv_awq_w4a16"]
W4A4 = ["quantize_svdquant_w4a4", "scaled_mm_svdquant_w4a4"]


def backend(capabilities, available=True):
    return {
        "available": available,
        "disabled": False,
        "unavailable_reason": None if available else "no HIP device available",
        "capabilities": capabilities,
    }


@pytest.mark.parametrize(
    ("op", "hip", "use", "words"),
    [
        ("linear_w4a4", backend(GEMV + W4A4), True, "HIP backend has quantize_svdquant_w4a4"),
        ("linear_w4a4", backend(GEMV + W4A4[:1]), False, "has no scaled_mm_svdquant_w4a4 for this"),
        ("gemv_w4a16", backend(GEMV + W4A4[:1]), True, "HIP backend has gemv_awq_w4a16"),
        ("linear_w4a4", backend([], False), False, "no HIP device available"),
        ("linear_w4a4", None, False, "this version has none"),
    ],
    ids=["RDNA4", "RDNA2", "RDNA2 modulation", "CDNA", "old"],
)
def test_an_amd_gpu_asks_comfy_kitchens_hip_backend(op, hip, use, words, monkeypatch):
    known = {"cuda": backend([], False)} | ({} if hip is None else {"hip": hip})
    module = types.SimpleNamespace(list_backends=lambda: known)
    monkeypatch.setattr(kitchen, "module", lambda: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    chosen, reason = kitchen.decide(op, GPU, BF16)
    assert chosen == use and words in reason


def test_an_intel_gpu_is_told_that_comfy_kitchen_has_no_such_op(monkeypatch):
    module = types.SimpleNamespace(list_backends=lambda: {"triton": backend(["apply_rope"])})
    monkeypatch.setattr(kitchen, "module", lambda: module)
    use, reason = kitchen.decide("linear_w4a4", XPU, F16)
    assert not use and "Triton backend has no quantize_svdquant_w4a4" in reason


def test_comfy_kitchen_comes_after_triton(there, monkeypatch):
    there(Gpu("cuda", "89", 128), off=1.0)
    monkeypatch.setattr(kitchen, "decide", lambda *asked: (True, "kitchen can"))
    choice = choose.choose("linear_w4a4", GPU, BF16, (BF16,))
    assert choice.backend == "comfy_kitchen"
    assert choice.reason.startswith("kitchen can; ") and "off the reference's" in choice.reason
