"""Flattening tensors into pointers, over a stand-in for the compiled module: what arrives there,
and what is asked of the reference instead.
"""

import pytest
import torch

from cases import SMALL, Case, make_input, make_vq, make_w4a4, make_w4a16, options
from compare import assert_same
from nibble.kernels import ops, reference, which
from nibble.kernels.backends import choose, native
from nibble.kernels.reference import vq as reference_vq
from stand_in import StandIn, install

PLAIN, UNSIGNED, ROTATED = SMALL[0], SMALL[-2], SMALL[-1]
MIDDLE = Case("middle", 6, 128, 192, R=5)
CPU = torch.device("cpu")
ON_GPUS = tuple(op for op in native.OPS if op != "linear_w4a8")
"""Those that the stand-in has."""


@pytest.fixture
def forget():
    """Clears what is remembered about installed modules, before and after."""
    caches = (choose.choose, native.module, native.serving, native._gpu)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture(params=[False, True], ids=["packed", "wide"])
def compiled(request, forget, monkeypatch):
    module = StandIn(request.param)
    install(monkeypatch, module)
    if request.param:  # a GPU's form of codes, on the CPU
        monkeypatch.setattr(native, "gpu", lambda device: (0, native.E4M3))
    return module


def parts(case, dtype=torch.float32):
    parameters = make_w4a4(case, dtype)
    q, ascales, h = reference.quantize_down(
        make_input(case, dtype),
        parameters["smooth_factor"],
        parameters["proj_down"],
        **options(case),
    )
    return (q, ascales, h), {
        name: parameters[name] for name in ("weight", "weight_scale", "proj_up", "bias")
    }


@pytest.mark.parametrize("case", SMALL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pointer_arrives(case, dtype, compiled):
    x, parameters = make_input(case, dtype), make_w4a4(case, dtype)
    y = ops.linear_w4a4(x, **parameters, **options(case))
    torch.testing.assert_close(y, reference.linear_w4a4(x, **parameters, **options(case)))
    found = ops.quantize_down(
        x, parameters["smooth_factor"], parameters["proj_down"], **options(case)
    )
    for ours, theirs in zip(
        found,
        reference.quantize_down(
            x, parameters["smooth_factor"], parameters["proj_down"], **options(case)
        ),
        strict=True,
    ):
        assert_same(ours, theirs)
    activations, rest = parts(case, dtype)
    product = ops.gemm_w4a4_up(
        *activations, **rest, act_unsigned=case.act_unsigned, out_dtype=dtype
    )
    assert_same(
        product,
        reference.gemm_w4a4_up(*activations, **rest, act_unsigned=case.act_unsigned).to(dtype),
    )
    w4a16 = make_w4a16(case, dtype)
    assert_same(ops.linear_w4a16(x, **w4a16), reference.gemv_w4a16(x, **w4a16))
    gem = "gemv_w4a16" if case.M <= choose.GEMV_TOKENS else "gemm_w4a16"
    assert compiled.calls == ["quantize_down", "gemm_w4a4_up", "quantize_down", "gemm_w4a4_up", gem]


@pytest.mark.parametrize("case", [SMALL[0], SMALL[3], SMALL[5], SMALL[6], ROTATED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_codebooks_arrive(case, dtype, compiled):
    x, p = make_input(case, dtype), make_vq(case, 6, 2, dtype)
    if p["bias"] is not None:
        p["bias"] = p["bias"].half()  # another dtype than the scale's: both become float32
    y = ops.linear_vq(x, **p, rotation=case.rotation)
    torch.testing.assert_close(y, reference_vq.linear_vq(x, **p, rotation=case.rotation))
    some = {name: p[name] for name in ("indices", "codebook", "scale", "bias")}
    torch.testing.assert_close(ops.gemm_vq(x, **some), reference_vq.gemm_vq(x, **some))
    assert compiled.calls == ["gemm_vq", "gemm_vq"]


def test_the_fused_layers_arrive(compiled):
    first, second = (
        make_w4a4(MIDDLE, torch.float32),
        make_w4a4(Case("second", 6, 192, 40, R=3, act_unsigned=True), torch.float32),
    )
    x = make_input(MIDDLE)
    order = ("weight", "weight_scale", "smooth_factor", "proj_down", "proj_up", "bias")
    layers = [first[name] for name in order], [second[name] for name in order]
    y = ops.mlp_w4a4(x[None], *layers, act_unsigned2=True)
    torch.testing.assert_close(
        y, reference.mlp_w4a4(x, *layers, flags2=(True, 0))[None], rtol=1e-4, atol=1e-4
    )
    product = (
        ["gemm_w4a4_up", "quantize_down"] if compiled.wide else ["gemm_w4a4_up_gelu_quantize_down"]
    )
    assert compiled.calls == ["quantize_down", *product, "gemm_w4a4_up"]
    q, ascales, h = ops.quantize_down(x, first["smooth_factor"], first["proj_down"])
    arguments = (
        q,
        ascales,
        h,
        first["weight"],
        first["weight_scale"],
        first["proj_up"],
        first["bias"],
        second["smooth_factor"],
        second["proj_down"],
    )
    found = ops.gemm_w4a4_up_gelu_quantize_down(*arguments, act_unsigned2=True)
    for ours, theirs in zip(
        found,
        reference.gemm_w4a4_up_gelu_quantize_down(*arguments, act_unsigned2=True),
        strict=True,
    ):
        assert_same(ours, theirs)


@pytest.mark.parametrize("ranks", [(8, 8, 8), (3, 0, 5)], ids=str)
def test_a_group_quantizes_once_and_shares_one_h(ranks, compiled):
    """Ranks that are no multiple of four would leave the next layer's part of h unaligned."""
    layers = [
        make_w4a4(Case("", 6, 128, n, R=rank, bias=rank != 3), torch.float32, seed=n)
        for n, rank in zip((40, 64, 5), ranks, strict=True)
    ]
    smooth = layers[0]["smooth_factor"]
    lists = [
        [layer[name] for layer in layers]
        for name in ("weight", "weight_scale", "proj_down", "proj_up", "bias")
    ]
    x = make_input(MIDDLE)
    found = ops.linear_w4a4_grouped(x, smooth, *lists)
    for y, layer in zip(found, layers, strict=True):
        torch.testing.assert_close(
            y, reference.linear_w4a4(x, **(layer | {"smooth_factor": smooth}))
        )
    assert compiled.calls == ["quantize_down", *["gemm_w4a4_up"] * 3]


def test_operands_that_are_not_dense_or_aligned_are_copied(compiled):
    x, parameters = make_input(PLAIN), make_w4a4(PLAIN, torch.float32)
    expected = ops.linear_w4a4(x, **parameters)
    assert torch.equal(ops.linear_w4a4(x.t().contiguous().t(), **parameters), expected)
    shifted = torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert shifted.data_ptr() % 16 and torch.equal(ops.linear_w4a4(shifted, **parameters), expected)
    transposed = {
        name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor
        for name, tensor in parameters.items()
    }
    assert torch.equal(ops.linear_w4a4(x, **transposed), expected)


@pytest.mark.parametrize(("m", "n", "rank"), [(0, 40, 4), (3, 40, 0), (0, 0, 0), (2, 0, 4)])
def test_nothing_is_fine(m, n, rank, compiled):
    case = Case("", m, 64, n, R=rank)
    assert ops.linear_w4a4(make_input(case), **make_w4a4(case, torch.float32)).shape == (m, n)
    assert ops.linear_w4a16(make_input(case), **make_w4a16(case, torch.float32)).shape == (m, n)


def test_mixed_parameters_become_float32_on_the_cpu(compiled):
    x, parameters = make_input(PLAIN), make_w4a4(PLAIN, torch.bfloat16)
    parameters["bias"] = parameters["bias"].float() + 1e-4
    torch.testing.assert_close(
        ops.linear_w4a4(x, **parameters), reference.linear_w4a4(x, **parameters)
    )
    assert compiled.calls


def test_float64_stays_with_the_reference(compiled):
    x, parameters = make_input(PLAIN, torch.float64), make_w4a4(PLAIN)
    assert torch.equal(ops.linear_w4a4(x, **parameters), reference.linear_w4a4(x, **parameters))
    assert (
        not compiled.calls and "not torch.float64" in which("linear_w4a4", "cpu", torch.float64)[1]
    )


def test_gradients_pass_beside_the_compiled_forward(compiled):
    x, parameters = make_input(PLAIN).requires_grad_(), make_w4a4(PLAIN, torch.float32)
    ops.linear_w4a4(x, **parameters).sum().backward()
    assert compiled.calls and x.grad.abs().sum() > 0


def test_which_tells_the_path_and_its_reason(compiled):
    backend, reason = which("linear_w4a16", "cpu", shape=(4, 64, 64))
    assert (
        backend == "native"
        and "nibble_kernels 0-stand-in is installed" in reason
        and "gemv_w4a16: plain torch (M=4)" in reason
    )
    assert "gemm_w4a16" in which("linear_w4a16", "cpu")[1]
    for op in ops.SCHEMAS.keys() - {"linear_w4a8", "linear_nvfp4"}:  # the stand-in has none
        assert which(op, "cpu")[0] == "native"


BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("capability", "dtype", "parameters", "found", "words"),
    [
        (90, BF16, (BF16, BF16, None), BF16, "is installed"),
        (90, F32, (BF16,), BF16, "is installed"),
        (75, F16, (BF16, F16), F16, "is installed"),
        (90, BF16, (BF16, F32), None, "not torch.float32"),
        (90, F32, (BF16, F16), None, "mixed"),
        (70, F16, (F16,), None, "need compute capability 7.5, and cuda:0 has 7.0"),
    ],
)
def test_a_gpu_takes_16_bit_parameters_of_one_dtype(
    capability, dtype, parameters, found, words, forget, monkeypatch
):
    module = StandIn()
    module.DEVICES, module.capability = ("cpu", "cuda"), lambda device: capability
    install(monkeypatch, module)
    brought_to, reason = native.serves(ON_GPUS, torch.device("cuda", 0), dtype, parameters)
    assert brought_to == found and words in reason


def test_a_driver_that_is_too_old_leaves_the_gpu_to_others(forget, monkeypatch):
    module = StandIn()

    def refuse(device):
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    module.DEVICES, module.capability = ("cpu", "cuda"), refuse
    install(monkeypatch, module)
    brought_to, reason = native.serves(ON_GPUS, torch.device("cuda", 0), BF16, (BF16,))
    assert brought_to is None
    assert reason.startswith(
        "nibble_kernels cannot use cuda:0: CUDA driver version is insufficient for CUDA runtime"
        " version; cuda:0 is not there"
    )


def test_a_module_without_cuda_or_without_an_op_is_passed_by(compiled):
    assert native.serves(("gemm_w8a16",), CPU, F32, (F32,)) == (
        None,
        "this nibble_kernels lacks gemm_w8a16",
    )
    assert (
        "built for cpu, not for cuda"
        in native.serves(native.OPS, torch.device("cuda", 0), F32, (F32,))[1]
    )
