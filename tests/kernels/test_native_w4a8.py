"""Linears of weights that are read as int8 through compiled code: tensors into pointers, with the
reference behind them, and what a GPU is given beside them.
"""

import pytest
import torch

from cases import Case, make_input, make_w4a8
from every_kernel import EveryKernel
from fake_driver import FakeDriver
from nibble.kernels import ops
from nibble.kernels.backends import choose, native, native_w4a8
from nibble.kernels.backends.cubins import driver
from nibble.kernels.backends.cubins.module import CubinModule
from nibble.kernels.params import W4A8Params
from nibble.kernels.reference import w4a8 as reference
from stand_in import NAMES, StandIn, at, install, rows_at

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASE = Case("linear", 5, 128, 72, R=8)
GPU = torch.device("cuda", 0)


class WithW4A8(StandIn):
    """`linear_w4a8` in plain torch, from bare pointers; `scratch`: what it was given."""

    def linear_w4a8(self, *, scratch=0, scratch_size=0, **a):
        self.calls.append("linear_w4a8")
        self.scratch = scratch, scratch_size
        m, n, k, r = (a[name] for name in "MNKR")
        kind = NAMES[a["param_dtype"]]
        branch = (
            (at(a["proj_down"], kind, k, r), at(a["proj_up"], kind, n, r)) if r else (None,) * 2
        )
        y = reference.linear_w4a8(
            rows_at(a["x"], NAMES[a["x_dtype"]], m, k, a["x_stride"]),
            at(a["weight"], torch.int8, n, k // 2),
            at(a["weight_scale"], torch.int8, k // a["group"], n),
            at(a["channel_scale"], torch.float32, n),
            at(a["table"], torch.int8, 16),
            at(a["smooth"], kind, k),
            *branch,
            at(a["bias"], kind, n) if a["bias"] else None,
            64 * a["rotate"],
        )
        at(a["out"], NAMES[a["x_dtype"]], m, n).copy_(y)


@pytest.fixture
def compiled(monkeypatch):
    caches = (choose.choose, native.module, native.serving, native._gpu)
    for cache in caches:
        cache.cache_clear()
    module = WithW4A8()
    install(monkeypatch, module)
    yield module
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("rotation", [0, 64])
@pytest.mark.parametrize("rank", [0, 8])
def test_a_linear_reaches_the_kernel(compiled, rank, rotation):
    """Columns of a wider x, in another dtype than the parameters."""
    case = Case("linear", 5, 128, 72, R=rank, bias=rank > 0, rotation=rotation)
    x, p = torch.randn(5, 256)[:, 64:192], make_w4a8(case, BF16)
    y = ops.linear_w4a8(x, **p, rotation=rotation)
    torch.testing.assert_close(y, reference.linear_w4a8(x, **p, rotation=rotation))
    assert compiled.calls == ["linear_w4a8"] and compiled.scratch == (0, 0)


@pytest.mark.parametrize("capability", [75, 86, 90, 120])
def test_a_layer_as_files_have_it_is_served_by_gpus(compiled, monkeypatch, capability):
    """Its channels' scales are float32, its other floats are not."""
    monkeypatch.setattr(compiled, "DEVICES", ("cpu", "cuda"), raising=False)
    monkeypatch.setattr(compiled, "capability", lambda device: capability, raising=False)
    asked = []
    monkeypatch.setattr(
        native_w4a8, "linear_w4a8", lambda dtype, x, p: asked.append(dtype) or x.new_empty(5, 72)
    )
    choice = choose.choose(
        "linear_w4a8", GPU, BF16, ops.w4a8._dtypes(W4A8Params(**make_w4a8(CASE)))
    )
    assert (choice.backend, choice.parameters) == ("native", BF16)


def test_a_gpu_with_few_products_of_8_bit_integers_goes_another_way(compiled, monkeypatch):
    monkeypatch.setattr(compiled, "DEVICES", ("cpu", "cuda"), raising=False)
    monkeypatch.setattr(compiled, "capability", lambda device: 103, raising=False)
    brought_to, why = native.serves(("linear_w4a8",), GPU, BF16, (BF16,))
    assert brought_to is None and "10.3, with few 8-bit integer products" in why


def test_scales_of_channels_stay_in_32_bits(compiled):
    p = W4A8Params(**make_w4a8(CASE, BF16))
    kept = native_w4a8.layer_operands(p, BF16)
    assert all(ours is theirs for ours, theirs in zip(kept, p, strict=True))
    narrow = p._replace(weight_channel_scale=p.weight_channel_scale.bfloat16())
    assert native_w4a8.layer_operands(narrow, BF16).weight_channel_scale.dtype == F32


@pytest.fixture
def gpu(monkeypatch):
    """(driver, module): a Hopper whose launches are noted."""
    fake = FakeDriver(90)
    module = CubinModule(driver.Driver(fake), EveryKernel())
    monkeypatch.setattr(native, "on", lambda device: module)
    monkeypatch.setattr(native, "capability", lambda device: 90)
    place = {"device": 0, "stream": 7, "threads": 1}
    monkeypatch.setattr(native, "place", lambda device, isa=0: place | {"isa": isa})
    return fake, module


def test_a_gpu_gets_scratch_of_its_size_and_two_kernels(gpu, monkeypatch):
    fake, module = gpu
    x, p = make_input(CASE, BF16), W4A8Params(**make_w4a8(CASE, BF16))
    call = native_w4a8.LinearCall(p, GPU)
    sizes = []
    new = call._scratch
    monkeypatch.setattr(call, "_scratch", lambda *a: sizes.append(new(*a).numel()) or new(*a))
    for _ in range(2):
        assert call(x).shape == (5, 72)
    # codes, a scale a token and h, each rounded up to 256 bytes
    assert sizes == [768 + 256 + 256] * 2
    names = ["quantize_tokens_kernel", "w4a8_gemm_kernel"] * 2
    assert [each.symbol.split("<")[0].split("::")[1] for each in fake.started] == names
    assert [each.early for each in fake.started] == [False, True] * 2
    assert {each.stream for each in fake.started} == {7}


@pytest.mark.parametrize("rows", [32, 64, 128])
def test_a_tile_may_be_asked_for(gpu, rows):
    fake, _ = gpu
    x, p = make_input(CASE, BF16), W4A8Params(**make_w4a8(CASE, BF16))
    native_w4a8.LinearCall(p, GPU, rows)(x)
    assert fake.started[-1].symbol == f"w4a8::w4a8_gemm_kernel<false, bf16, {rows}>"


def test_a_path_of_w4a4_set_for_the_process_changes_nothing(gpu):
    fake, module = gpu
    module.default_route = 4064
    p = W4A8Params(**make_w4a8(CASE, BF16))
    native_w4a8.LinearCall(p, GPU)(make_input(CASE, BF16))
    assert fake.started[-1].symbol == "w4a8::w4a8_gemm_kernel<false, bf16, 32>"
    with pytest.raises(ValueError, match="route 48 is none of 32, 64, 128"):
        native_w4a8.LinearCall(p, GPU, 48)(make_input(CASE, BF16))
