"""Cubins: where they come from, which is found out once, and how they are started."""

from __future__ import annotations

import hashlib
import json
import lzma
import os

import pytest

from fake_driver import FakeDriver
from nibble.kernels.backends.cubins import driver, kernels, library, nvrtc, plans, structs
from nibble.kernels.backends.cubins.module import CubinModule, Unavailable


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))
    monkeypatch.setenv("NIBBLE_COMPILE", "0")


def package_of(folder, *archs, sources=None, damage=False):
    """A package whose cubins are the kernels' names."""
    manifest = {"sources": library.sources_hash() if sources is None else sources}
    manifest |= {"compiler": "NVRTC 12.9", "architectures": {}}
    folder.mkdir(exist_ok=True)
    for arch in archs:
        places, content = {}, b""
        for kernel in kernels.of(arch):
            code = f"{arch}:{kernel.name}".encode()
            places[kernel.name] = {"at": [len(content), len(code)], "symbol": f"_{kernel.name}"}
            content += code
        packed = lzma.compress(content)
        (folder / f"sm_{arch}.xz").write_bytes(packed[:-1] if damage else packed)
        manifest["architectures"][arch] = {
            "file": f"sm_{arch}.xz",
            "sha256": hashlib.sha256(packed).hexdigest(),
            "kernels": places,
        }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return library.Package(folder)


def module_of(fake: FakeDriver, package: library.Package) -> CubinModule:
    return CubinModule(driver.Driver(fake), package)


@pytest.fixture
def ada(tmp_path):
    fake = FakeDriver(89)
    return fake, module_of(fake, package_of(tmp_path / "package", "89", "ptx80"))


def product(**values) -> dict:
    fields = {name: 64 for name, _ in structs.GemmW4A4Up._fields_}
    fields |= {"M": 64, "N": 256, "K": 128, "R": 32, "codes": 0, "param_dtype": 2, "out_dtype": 2}
    return fields | {"act_unsigned": False, "unsigned_from": 0} | values


def start(module: CubinModule, device: int = 0, isa: int = 0, **values) -> None:
    place = {"device": device, "stream": 7, "threads": 1, "isa": isa}
    module.gemm_w4a4_up(**place, workspace_size=0, **product(**values))


def test_a_kernel_of_the_package_is_started_on_the_stream(ada):
    fake, module = ada
    start(module)
    started = fake.started[-1]
    assert started.symbol == "_gemm_w4a4<Int4, bf16, 64, false, Store>"
    assert started[2:] == ((2, 1, 1), 128, 26624, 7, False)
    assert fake.loads[-1][1] == b"89:gemm_w4a4<Int4, bf16, 64, false, Store>\0"
    assert "89 of the package (NVRTC 12.9)" == module.on(0).origin
    assert fake.stack == []


def test_a_kernel_is_loaded_once(ada):
    fake, module = ada
    start(module)
    loads = len(fake.loads)
    start(module)
    assert len(fake.loads) == loads and len(fake.started) == 2


def test_much_shared_memory_is_allowed_once(ada):
    fake, module = ada
    for _ in range(2):
        module.quantize_down(
            device=0, stream=0, threads=1, isa=0, M=3280, K=64, R=32, x=64, x_stride=64,
            x_dtype=2, smooth=64, proj_down=64, param_dtype=2, act_unsigned=False, rotate=False,
            unsigned_from=0, codes=0, q=64, ascales=64, h=64,
        )  # fmt: skip
    wanted = [value for _, which, value in fake.attributes if which == 8]
    assert wanted == [fake.started[-1].shared] and wanted[0] > 48 * 1024


def test_loading_is_allowed_while_a_graph_is_captured(ada):
    fake, module = ada
    module.on(0)
    fake.modes.clear()
    start(module)
    assert fake.modes == [2, 0]  # relaxed while loading, and as it was again


def test_two_gpus_have_modules_of_their_own(tmp_path):
    fake = FakeDriver(86, 120)
    module = module_of(fake, package_of(tmp_path / "package", "86", "120f"))
    start(module, device=0)
    start(module, device=1)
    assert [started.context for started in fake.started] == [1000, 1001]
    assert [started.symbol for started in fake.started] == [
        "_gemm_w4a4<Int4, bf16, 64, false, Store>",
        "_gemm_w4a4<Int8, bf16, 64, false, Store>",
    ]
    assert {context: code[:4] for context, code in fake.loads} == {1000: b"86:g", 1001: b"120f"}


def test_another_context_is_left_as_it_was(ada):
    fake, module = ada
    fake.stack.append(4)
    start(module)
    assert fake.stack == [4] and fake.started[-1].context == 1000


def test_a_cubin_that_the_gpu_refuses_is_found_out_once(tmp_path):
    fake = FakeDriver(89, refuses=(b"89:",))
    module = module_of(fake, package_of(tmp_path / "package", "89"))
    with pytest.raises(Unavailable, match="no kernel image is available.*NIBBLE_COMPILE=0"):
        module.on(0)


def test_a_gpu_that_is_newer_than_the_cubins_runs_the_ptx(tmp_path):
    fake = FakeDriver(130)
    module = module_of(fake, package_of(tmp_path / "package", "89", "ptx80"))
    start(module)
    assert fake.loads[-1][1].startswith(b"ptx80:")


def test_an_older_gpu_is_refused_in_words(tmp_path):
    module = module_of(FakeDriver(70), package_of(tmp_path / "package", "89"))
    with pytest.raises(Unavailable, match="need compute capability 7.5, and cuda:0 has 7.0"):
        module.on(0)


def test_a_driver_that_does_not_start_says_so():
    fake = FakeDriver(89)
    fake.status["cuInit"] = 3
    with pytest.raises(driver.DriverError, match="starting CUDA: an error of the driver"):
        driver.Driver(fake)


def test_a_forked_process_is_told(ada, monkeypatch):
    fake, module = ada
    module.on(0)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    fake.status["cuLaunchKernel"] = 3
    with pytest.raises(driver.DriverError, match="forked.*'spawn'"):
        start(module)


def test_damaged_and_stale_packages_are_not_used(tmp_path):
    fake = FakeDriver(89)
    damaged = module_of(fake, package_of(tmp_path / "a", "89", damage=True))
    with pytest.raises(Unavailable, match="sm_89.xz is damaged; install Nibble again"):
        damaged.on(0)
    stale = module_of(fake, package_of(tmp_path / "b", "89", sources="0" * 64))
    with pytest.raises(Unavailable, match="of other sources"):
        stale.on(0)
    none = module_of(fake, library.Package(tmp_path / "c"))
    with pytest.raises(Unavailable, match="carries no cubins; NIBBLE_COMPILE=0"):
        none.on(0)


def test_routes_are_paths_and_their_tiles(ada):
    fake, module = ada
    heights = [32, 64, 128]
    expected = [
        1,
        *(1000 + rows for rows in heights),
        2,
        *(2000 + rows for rows in (*heights, 256)),
    ]
    assert list(module.routes("gemm_w4a4_up", 89)) == expected
    assert module.routes("gemm_w4a4_up_gelu_quantize_down", 89) == {1: "sm75", 2: "sm80"}
    assert module.routes("quantize_down", 89) == {0: "cuda"}
    hopper = module.routes("gemm_w4a4_up", 90)
    assert {hopper[number] for number in (3, 3001, 3002, 3003, 2064)} == {
        "sm90", "sm90, 256 x 128", "sm90, 128 x 128", "sm90, 128 x 64", "sm80, 64 tokens",
    }  # fmt: skip
    assert 3 not in module.routes("gemm_w4a4_up_gelu_quantize_down", 90)
    assert not {3, 3001} & set(module.routes("gemm_w4a4_up", 100))


@pytest.mark.parametrize("route", [4, 3001, 2512, 5])
def test_a_route_that_the_gpu_does_not_have_is_refused(ada, route):
    fake, module = ada
    with pytest.raises(ValueError, match=f"route {route} is none of 1 .sm75., 1032"):
        start(module, isa=route)
    assert fake.started == []


@pytest.fixture
def hopper(tmp_path):
    """Every kernel of every path, as if it had been compiled for Hopper."""
    folder = tmp_path / "hopper"
    package_of(folder, "90a", "89", "75")
    manifest = json.loads((folder / "manifest.json").read_text())
    whole, places = b"", {}
    for arch, listed in manifest["architectures"].items():
        content = lzma.decompress((folder / f"sm_{arch}.xz").read_bytes())
        for name, place in listed["kernels"].items():
            places.setdefault(name, place | {"at": [len(whole) + place["at"][0], place["at"][1]]})
        whole += content
    packed = lzma.compress(whole)
    (folder / "sm_90a.xz").write_bytes(packed)
    own = {"file": "sm_90a.xz", "sha256": hashlib.sha256(packed).hexdigest(), "kernels": places}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"architectures": {"90a": own}}))
    fake = FakeDriver(90)
    return fake, module_of(fake, library.Package(folder))


@pytest.mark.parametrize(
    "route, symbol",
    [
        (0, "_sm90::gemm_kernel<Codes::e4m3, bf16, 1, 64>"),
        (1, "_gemm_w4a4<Turing, bf16, 64, false, Store>"),
        (1128, "_gemm_w4a4<Turing, bf16, 128, false, Store>"),
        (2032, "_gemm_w4a4<Int4, bf16, 32, false, Store>"),
        (3001, "_sm90::gemm_kernel<Codes::e4m3, bf16, 2, 128>"),
        (3002, "_sm90::gemm_kernel<Codes::e4m3, bf16, 1, 128>"),
        (3003, "_sm90::gemm_kernel<Codes::e4m3, bf16, 1, 64>"),
        (4064, "_gemm_w4a4<Int8, bf16, 64, false, Store>"),
    ],
)
def test_a_route_chooses_the_kernel(hopper, route, symbol):
    fake, module = hopper
    start(module, isa=route)
    assert fake.started[-1].symbol == symbol
    assert [started.symbol for started in fake.started[:-1]] == (
        ["_sm90::widen_kernel<false>"] if "sm90" in symbol else []
    )


def test_without_wgmma_a_hopper_gets_packed_codes(hopper):
    fake, module = hopper
    assert module.codes(90) == structs.E4M3 and module.codes(90, 4) == structs.PACKED
    module.default_route = 4
    assert module.codes(90) == structs.PACKED
    start(module)
    assert "Int8" in fake.started[-1].symbol
    assert module.route("gemm_w4a4_up", 90, 1, 1, 1) == ("sm100, asked for", "route 4")


def test_activations_of_8_bits_go_through_wgmma_as_they_are(hopper):
    fake, module = hopper
    for route, symbol in (
        (0, "_sm90::gemm_kernel<Codes::int8, bf16, 1, 64>"),
        (3001, "_sm90::gemm_kernel<Codes::int8, bf16, 2, 128>"),
        (4064, "_gemm_w4a4<Act8, bf16, 64, false, Store>"),
    ):
        fake.started.clear()
        start(module, isa=route, codes=structs.INT8)
        assert [started.symbol for started in fake.started] == [symbol]


def whole_linear(module: CubinModule, codes: int = 0) -> None:
    module.linear_w4a4(
        device=0, stream=0, threads=1, isa=0, M=33, N=128, K=128, R=32, x=64, x_stride=128,
        x_dtype=2, smooth=64, proj_down=64, weight=64, weight_scale=64, proj_up=64, bias=0,
        param_dtype=2, act_unsigned=False, rotate=False, unsigned_from=0, codes=codes, out=64,
        scratch=4096, scratch_size=7168,
    )  # fmt: skip


def test_a_whole_linear_shares_its_scratch(ada):
    fake, module = ada
    size = module.linear_w4a4_bytes(capability=89, M=33, N=128, K=128, R=32, codes=0)
    assert size == 2304 + 512 + 4352  # codes, scales and h, each rounded up to 256 bytes
    whole_linear(module)
    assert [started.symbol.partition("<")[0] for started in fake.started] == [
        "_quantize_down_kernel",
        "_gemm_w4a4",
    ]
    assert not any(started.early for started in fake.started)


def test_from_hopper_on_a_whole_linears_product_may_start_early(hopper, tmp_path):
    fake, module = hopper
    whole_linear(module, structs.E4M3)
    assert [started.early for started in fake.started] == [False, True]
    start(module)
    assert not fake.started[-1].early
    jetson = FakeDriver(110)  # what the driver makes of the PTX does not wait
    whole_linear(module_of(jetson, package_of(tmp_path / "text", "ptx80")))
    assert [started.early for started in jetson.started] == [False, False]


# ---- NVRTC ---------------------------------------------------------------------------------------

try:
    KNOWN = nvrtc.architectures()
except nvrtc.CompileError as error:
    KNOWN = ()
    WHY = str(error)
needs_nvrtc = pytest.mark.skipif(not KNOWN, reason="no NVRTC: pip install nvidia-cuda-nvrtc")


@needs_nvrtc
def test_what_is_missing_is_compiled_once_and_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("NIBBLE_COMPILE", "1")
    fake = FakeDriver(89)
    module = module_of(fake, library.Package(tmp_path / "none"))
    assert module.on(0).origin.startswith("89, compiled here by NVRTC ")
    assert module.on(0).way.endswith("; the package carries no cubins")
    kept = list(library.cache_folder().iterdir())
    assert len(kept) == 1 and fake.loads[0][1].startswith(b"\x7fELF")

    monkeypatch.setattr(nvrtc, "compile_kernel", None)  # the next one needs no compiler
    module_of(fake, library.Package(tmp_path / "none")).on(0)
    assert fake.loads[1] == fake.loads[0]


@needs_nvrtc
def test_a_damaged_cache_is_made_anew(monkeypatch):
    monkeypatch.setenv("NIBBLE_COMPILE", "1")
    kernel = kernels.add_tiles("Int4")
    made = library.cached(kernel, "89")
    (kept,) = library.cache_folder().iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-1])
    again = library.cached(kernel, "89")
    assert again.symbol == made.symbol and len(kept.read_bytes()) == len(whole)
    assert library.cached(kernel, "89") == again


@needs_nvrtc
@pytest.mark.parametrize("arch", kernels.ARCHITECTURES)
def test_every_architecture_compiles(arch):
    compiled = library.compile_kernel(kernels.w4a16_gemv("bf16", "bf16", 1), arch)
    assert compiled.code.startswith(b"\x7fELF" if arch != kernels.PTX else b"//")
    assert "gemv_kernel" in compiled.symbol


@needs_nvrtc
def test_a_kernel_that_does_not_compile_says_why():
    with pytest.raises(nvrtc.CompileError, match=r"gemv_kernel<half.*does not compile for sm_89"):
        nvrtc.compile_kernel(kernels.Kernel("cuda/w4a16/gemv.cuh", "gemv_kernel<half>"), "89")


def test_plans_know_hoppers_shared_memory():
    """As `static_assert` has it: below 227 KB, and the large tile the most."""
    sizes = [plans._hopper_shared(*tile) for tile in kernels.HOPPER_TILES]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] <= 227 * 1024
