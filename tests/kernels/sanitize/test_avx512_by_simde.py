"""The tests of the CPU ops, on AVX-512, on any x86 processor: `nibble_kernels` built from the
sources with SIMDe in the place of the intrinsics, and the tests run on it in their own process.

Skips with its reason where there is no compiler, no pybind11 or no SIMDe (Debian: libsimde-dev).
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "kernels" / "csrc"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-DNIBBLE_X86", "-DNIBBLE_SIMDE"]
OWN_FLAGS = {
    "ops_avx2": AVX2,
    "ops_avx512": [*AVX2, "-Wno-psabi"],
    "module": ['-DNIBBLE_VERSION="simde"'],
}
TESTS = ("test_native_cpu.py", "test_native_cpu_bits.py", "test_native_8_bit.py")


def run(*command, **how) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **how
    )


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    """The compiler's command, with every folder of headers."""
    pybind11 = pytest.importorskip("pybind11")
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("no C++ compiler, or not an x86-64 processor")
    folders = [SOURCES, HERE, pybind11.get_include(), sysconfig.get_path("include")]
    command = [found, *FLAGS, *(f"-I{folder}" for folder in folders)]
    for header in ("simde/x86/avx512.h", "Python.h"):
        if run(*command, "-E", "-include", header, "-x", "c++", "/dev/null").returncode:
            pytest.skip(f"{found} finds no {header}")
    return command


@pytest.fixture(scope="module")
def site(compiler, tmp_path_factory) -> Path:
    """A folder with the module in it."""
    folder = tmp_path_factory.mktemp("simde")
    objects = []
    for source in [SOURCES / "module.cpp", *sorted((SOURCES / "cpu").glob("*.cpp"))]:
        objects.append(folder / f"{source.stem}.o")
        flags = OWN_FLAGS.get(source.stem, [])
        built = run(*compiler, *flags, "-c", source, "-o", objects[-1])
        assert built.returncode == 0, built.stderr[-4000:]
    name = "nibble_kernels" + sysconfig.get_config_var("EXT_SUFFIX")
    linked = run(compiler[0], "-shared", *objects, "-o", folder / name, "-lpthread", "-ldl")
    assert linked.returncode == 0, linked.stderr[-4000:]
    return folder


@pytest.mark.parametrize("test", TESTS)
def test_avx512_passes_the_cpu_ops_own_tests(site, test):
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    chosen = ["-q", "-x", "-k", "avx512_vnni", "-p", "no:cacheprovider"]
    result = run(
        *[sys.executable, "-m", "pytest", *chosen, ROOT / "tests" / "kernels" / test],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
