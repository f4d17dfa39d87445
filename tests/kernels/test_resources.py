"""The compiler's report on every GPU kernel: how it is read, and its bounds where it can be had."""

import json
import os
import shutil
from pathlib import Path

import pytest

import check_resources
from check_resources import (
    BOUNDS,
    CSRC,
    Kernel,
    base_name,
    broken,
    count_matrix,
    jobs,
    main,
    read_module,
    read_ptxas,
    tool,
)
from nibble.kernels.backends import native
from nibble.kernels.backends.cubins import kernels as instances
from nibble.kernels.backends.cubins import library, nvrtc

MANGLED = "_ZN6nibble4cuda4gemmILi128ELi64ELb1EEEvNS0_4ArgsE"
PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_80'
ptxas info    : Function properties for {MANGLED}
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes stack, 2048 bytes smem
ptxas info    : Compiling entry function '_Z5otherPf' for 'sm_90a'
ptxas info    : Function properties for _Z5otherPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""


def test_ptxas_is_read():
    first, second = read_ptxas(PTXAS, "gemm.cu")
    assert (first.name, first.arch, first.registers, first.shared, first.stack, first.spills) == (
        "gemm<128,64,1>",
        "80",
        168,
        2048,
        16,
        12,
    )
    assert (second.arch, second.registers, second.spills) == ("90a", 8, 0)


def test_cuobjdump_and_its_machine_code_are_read():
    text = (
        "Fatbin elf code:\n================\narch = sm_90a\n\nResource usage:\n Function"
        f" {MANGLED}:\n  REG:90 STACK:0 SHARED:1024 LOCAL:8 TEXTURE:0\n"
    )
    kernels = read_module(text)
    count_matrix(
        f"arch = sm_90a\n\t\tFunction : {MANGLED}\n  /*0*/ QGMMA.64x128x32.F32.E4M3.E4M3 R24 ;\n "
        " HMMA.16816.F32 R0 ;\n  QGMMA R1 ;\n",
        kernels,
    )
    (kernel,) = kernels
    assert (kernel.registers, kernel.shared, kernel.spills, kernel.matrix) == (
        90,
        1024,
        8,
        {"QGMMA": 2, "HMMA": 1},
    )


def test_names_are_short():
    assert (
        base_name("_ZN6nibble4cuda12_GLOBAL__N_111gemm_kernelINS_3FooELin5EEEvv")
        == "gemm_kernel<-5>"
    )
    assert base_name("plain_c") == "plain_c"


def test_spills_too_many_registers_and_unknown_kernels_are_reported():
    kernels = [
        Kernel("a", "80", "a", registers=100),
        Kernel("b", "80", "b", registers=10, spills=4),
        Kernel("c", "90a", "c", registers=1),
    ]
    lines = broken(kernels, {"a": {"80": 99}, "b": {"80": 20}})
    assert [
        "a on sm_80 uses 100 registers and may use 99" in lines[0],
        "b on sm_80 has 4 bytes" in lines[1],
        "c on sm_90a" in lines[2],
    ] == [True] * 3
    assert len(broken(kernels, None)) == 1


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The manifest of three kernels, compiled by NVRTC as a release compiles all."""
    try:
        nvrtc.architectures()
    except nvrtc.CompileError as error:
        pytest.skip(str(error))
    few = [
        instances.add_tiles("Int4"),
        instances.w4a16_gemv("bf16", "bf16", 1),
        instances.quantize("bf16", "bf16", "Form::signed_codes", "packed", (2, 12, 1, 1)),
    ]
    monkeypatch.setattr(instances, "of", lambda arch: iter(few))
    library.write_package(tmp_path, ["89", "ptx80"])
    return tmp_path / "manifest.json"


def test_a_package_of_cubins_keeps_the_bounds(package, capsys):
    assert main(["--manifest", str(package)]) == 0
    said = capsys.readouterr().out
    assert "3 kernels, all within their bounds" in said, "PTX has no registers"
    for name in ("add_tiles", "gemv_kernel<1>", "quantize_down_kernel<0,0,2,12,1,1>"):
        assert name in said


@pytest.mark.parametrize(
    "changed, said",
    [
        ({"registers": 41}, "add_tiles on sm_89 uses 41 registers and may use 40"),
        ({"spills": 8}, "add_tiles on sm_89 has 8 bytes of spills"),
        ({"stack": 16}, "and a stack of 16 bytes; none are allowed"),
        ({"symbol": "_Z5otherv"}, "_Z5otherv on sm_89 uses"),
    ],
    ids=["registers", "spills", "stack", "unknown"],
)
def test_a_package_that_breaks_a_bound_is_reported(package, capsys, changed, said):
    """36 registers are the bound of add_tiles, and 40 are given out for them."""
    manifest = json.loads(package.read_text())
    manifest["architectures"]["89"]["kernels"]["add_tiles<Int4>"] |= changed
    package.write_text(json.dumps(manifest))
    assert main(["--manifest", str(package)]) == 1
    assert said in capsys.readouterr().err


def test_nvrtcs_own_bounds_come_before_nvccs():
    kernel = Kernel("a", "89", "a", registers=101, compiler="nvrtc")
    assert broken([kernel], {"a": {"89": 97}}) == []
    assert "may use 96" in broken([kernel], {"a": {"89": 95}})[0]
    assert broken([kernel], {"a": {"89": 95, "89 nvrtc": 101}}) == []
    assert "may use 100" in broken([kernel], {"a": {"89": 97, "89 nvrtc": 100}})[0]


def test_file_names_decide_architectures():
    """The same rule as kernels/cmake/cuda.cmake."""
    found = jobs(list(check_resources.ARCHS), "")
    for ending, archs in {
        "sm75": {"75"},
        "sm80": {"80", "86", "89"},
        "sm90": {"90a"},
        "sm100": {"90a", "100f", "120f"},
        "sm120": {"120f"},
    }.items():
        assert {arch for path, arch in found if ending in path.with_suffix("").parts} <= archs
    assert {path for path, _ in found} == set((CSRC / "cuda").rglob("*.cu"))


def test_every_bound_is_a_possible_one():
    for name, archs in json.loads(BOUNDS.read_text()).items():
        assert (
            name
            and {arch.removesuffix(" nvrtc") for arch in archs} <= set(check_resources.ARCHS)
            and all(0 < registers <= 255 for registers in archs.values())
        )


def test_no_kernel_breaks_its_bounds():
    """Compiling everything takes minutes: done where a module with CUDA is at hand to look into, or
    where asked for.
    """
    module = native.module()[0]
    if module is not None and "cuda" in module.DEVICES and tool("cuobjdump"):
        # the compiler that the bounds come from
        same = module.build_info()["cuda"].split(".")[0] == "13"
        assert (
            main(["--module", str(Path(module.__file__)), *([] if same else ["--spills-only"])])
            == 0
        )
    elif os.environ.get("NIBBLE_RESOURCES") and shutil.which("nvcc"):
        assert main([]) == 0
    else:
        pytest.skip(
            "no module with CUDA beside cuobjdump; NIBBLE_RESOURCES=1 compiles every kernel with"
            " nvcc (minutes)"
        )
