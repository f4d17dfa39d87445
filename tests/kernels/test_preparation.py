"""GPU kernels made ready for a model: which they are, and when there is anything to do. CUDA's
driver and NVRTC are stood in for.
"""

import time

import pytest
import torch

from fake_driver import FakeDriver
from nibble.kernels import CompileError, prepare
from nibble.kernels.backends import native
from nibble.kernels.backends.cubins import driver, kernels, library, nvrtc, plans, structs, wanted
from nibble.kernels.backends.cubins.module import CubinModule
from nibble.kernels.backends.cubins.plans import Gpu
from nibble.kernels.preparation import Layer

CUDA, BF16 = torch.device("cuda", 0), torch.bfloat16
HALVES = frozenset({BF16})
FLUX = [
    Layer("linear_w4a4", (9216, 3072), HALVES, 32),
    Layer("linear_w4a4", (3072, 12288), HALVES, 32, act_unsigned=True),
    Layer("mlp_w4a4", (12288, 3072), HALVES, 32),
    Layer("linear_w4a16", (18432, 3072), HALVES),
]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A GPU of a capability that cubins serve, compiled by a compiler that notes what it is asked
    for.
    """
    compiled = []

    def compile_kernel(kernel, arch):
        compiled.append(kernel)
        return nvrtc.Compiled(b"\x7fELF", f"_{kernel.name}", 32)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "compile_kernel", compile_kernel)
    monkeypatch.setattr(library, "why_not_compile", lambda arch: "")
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 9))
    native._gpu.cache_clear()

    def made(capability: int) -> list:
        package = library.Package(tmp_path / "none")
        module = CubinModule(driver.Driver(FakeDriver(capability)), package)
        monkeypatch.setattr(native, "serving", lambda device: (module, "cubins"))
        module.on(0)
        compiled.clear()
        return compiled

    yield made
    native._gpu.cache_clear()


def test_what_a_flux_asks_for_is_compiled_once(machine):
    compiled, said = machine(89), []
    count = prepare(CUDA, BF16, FLUX, lambda *line: said.append(line))
    assert count == len(compiled) == len(set(compiled)) == 19
    assert any(kernel.name.endswith("5, 8, 1, 3>") for kernel in compiled)  # for a LoRA beside it
    assert {kernel.name.partition("<")[0] for kernel in compiled} == {
        "quantize_down_kernel",
        "gemm_w4a4",
        "gemv_kernel",
        "w4a16_gemm_kernel",
    }
    assert said[0][:2] == (0, count) and said[-1][:2] == (count, count)
    assert prepare(CUDA, BF16, FLUX) == 0 and len(compiled) == count


def test_hopper_gets_its_own_product_and_no_fused_mlp(machine):
    compiled = machine(90)
    prepare(CUDA, BF16, FLUX)
    names = [kernel.name for kernel in compiled]
    assert not any(name.startswith("gemm_w4a4<") for name in names)
    assert any(name.startswith("sm90::gemm_kernel<Codes::e4m3, bf16") for name in names)
    assert all("Codes::e4m3" in name for name in names if name.startswith("quantize"))
    native._gpu.cache_clear()
    compiled = machine(90)
    prepare(CUDA, BF16, [FLUX[0]._replace(act_bits=8)])
    names = [kernel.name for kernel in compiled]
    assert any(name.startswith("sm90::gemm_kernel<Codes::int8, bf16") for name in names)
    assert all("Codes::int8" in name for name in names)


def test_codebooks(machine):
    compiled = machine(86)
    layers = [Layer("linear_vq", (3072, 3072), HALVES, bits=6, vector=2)]
    assert prepare(CUDA, BF16, layers) == len(compiled) > 2
    assert all("Layout<6, 2>" in kernel.name for kernel in compiled)
    assert prepare(CUDA, BF16, [layers[0]._replace(bits=5)]) == 0


@pytest.mark.parametrize("parameters", [{torch.float32}, {BF16, torch.float64}], ids=str)
def test_layers_that_run_in_plain_torch_need_none(machine, parameters):
    machine(89)
    assert prepare(CUDA, BF16, [FLUX[0]._replace(parameters=frozenset(parameters))]) == 0


W4A8 = Layer("linear_w4a8", (9216, 3072), HALVES, 32)


def test_weights_that_are_read_as_int8(machine):
    compiled = machine(86)
    assert prepare(CUDA, BF16, [W4A8]) == len(compiled)
    names = {kernel.name.split("<")[0] for kernel in compiled}
    assert names == {"w4a8::w4a8_gemm_kernel", "w4a8::quantize_tokens_kernel"}
    assert prepare(CUDA, BF16, [W4A8._replace(parameters=frozenset({torch.float32}))]) == 0
    native._gpu.cache_clear()
    compiled = machine(75)
    assert prepare(CUDA, torch.float16, [W4A8._replace(rank=0)]) == len(compiled)
    # the projection of a LoRA beside it
    assert any(kernel.name.startswith("down_kernel<f16, bf16>") for kernel in compiled)


@pytest.mark.parametrize("capability", [75, 86, 90, 120])
def test_what_is_prepared_of_w4a8_is_what_a_layer_then_starts(capability):
    gpu = Gpu(capability, 82)
    kind = wanted.LayerKind("linear_w4a8", 3072, 3072, 32, 2, rotated=True)
    ready = set(wanted.of_model([kind], 2, gpu))
    assert ready <= set(kernels.of(kernels.architecture(capability)))
    for m in range(256, 9217, 64):
        started = wanted._w4a8(kind, m, 2, gpu)
        assert {launch.kernel for launch in started} <= ready, m


def test_where_no_cubins_serve_there_is_nothing_to_do(monkeypatch):
    assert prepare(torch.device("cpu"), BF16, FLUX) == 0
    monkeypatch.setattr(native, "serving", lambda device: (None, "no driver"))
    assert prepare(CUDA, BF16, FLUX) == 0


def test_where_nothing_can_be_compiled_nothing_is_tried(machine, monkeypatch):
    compiled = machine(89)
    monkeypatch.setattr(library, "why_not_compile", lambda arch: "NIBBLE_COMPILE=0")
    assert prepare(CUDA, BF16, FLUX) == 0 and not compiled


def test_the_stop_button_ends_it(machine, monkeypatch):
    class Stopped(Exception):
        pass

    def said(done, total, name):
        if done:
            raise Stopped

    compiled, compile_kernel = machine(89), library.compile_kernel

    def slowly(kernel, arch):
        time.sleep(0.1)
        return compile_kernel(kernel, arch)

    monkeypatch.setattr(library, "compile_kernel", slowly)
    with pytest.raises(Stopped):
        prepare(CUDA, BF16, FLUX, said)
    assert len(compiled) < 14


def test_a_kernel_that_does_not_compile_is_told(machine, monkeypatch):
    machine(89)

    def broken(kernel, arch):
        raise CompileError(f"{kernel.name} does not compile")

    monkeypatch.setattr(library, "compile_kernel", broken)
    with pytest.raises(CompileError, match="does not compile"):
        prepare(CUDA, BF16, FLUX)


@pytest.mark.parametrize("capability", [75, 86, 90, 100, 120])
@pytest.mark.parametrize("multiprocessors", [20, 132])
def test_what_is_prepared_is_what_a_layer_then_starts(capability, multiprocessors):
    """Whatever the tokens are, as long as a picture or a prompt has so many."""
    gpu = Gpu(capability, multiprocessors)
    kind = wanted.LayerKind("linear_w4a4", 3072, 3072, 32, 2)
    ready = set(wanted.of_model([kind], 2, gpu))
    assert ready <= set(kernels.of(kernels.architecture(capability)))
    for m in range(256, 9217, 64):
        quantizer, product = wanted._w4a4(kind, m, 2, gpu)
        assert isinstance(quantizer, structs.QuantizeDown)
        started = plans.quantize_down(quantizer, gpu) + plans.gemm_w4a4_up(product, gpu)
        assert {launch.kernel for launch in started} <= ready, m


def test_linears_of_4_bit_floats_ask_for_their_quantizer_and_products(machine):
    layer = Layer("linear_nvfp4", (9216, 3072), HALVES, 32)
    compiled = machine(120)
    assert prepare(CUDA, BF16, [layer]) == len(compiled)
    names = {kernel.name.split("<")[0] for kernel in compiled}
    assert names == {"nvfp4::gemm_kernel", "quantize_nvfp4_kernel"}
    native._gpu.cache_clear()
    machine(90)
    assert prepare(CUDA, BF16, [layer]) == 0
