"""The CPU ops under AddressSanitizer and UBSan, on random shapes with buffers of exactly the right
size (fuzz.cpp).

Built from the sources, so that it needs no installed extension. AVX-512 runs through SIMDe where
the processor has none: slow, but the same code. Skips with its reason where there is no compiler,
no sanitizer or no SIMDe.
"""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "kernels" / "csrc"
# Without optimization: the sanitizers' checks make an optimizing build ten times as long, and the
# shapes are small.
FLAGS = [
    "-std=c++17",
    "-O0",
    "-ffp-contract=off",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    f"-I{SOURCES}",
    f"-I{HERE}",
]
X86 = platform.machine() in ("x86_64", "AMD64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
ROUNDS, SEED = 25, 1


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def compiler(tmp_path_factory) -> str:
    found = shutil.which("g++") or shutil.which("clang++")
    if not found:
        pytest.skip("no C++ compiler")
    probe = tmp_path_factory.mktemp("probe") / "probe.cpp"
    probe.write_text("int main() { return 0; }")
    built = run(found, *FLAGS, probe, "-o", probe.with_suffix(""))
    if built.returncode or run(probe.with_suffix("")).returncode:
        pytest.skip(f"{found} builds nothing with sanitizers here: {built.stderr.strip()[-300:]}")
    return found


def build(compiler: str, folder: Path, extra: dict[str, list[str]]) -> Path:
    """The fuzzer linked with every CPU source; `extra` holds a source's own flags."""
    objects = []
    for source in [*sorted((SOURCES / "cpu").glob("*.cpp")), HERE / "fuzz.cpp"]:
        objects.append(folder / f"{source.stem}.o")
        built = run(compiler, *FLAGS, *extra.get(source.stem, []), "-c", source, "-o", objects[-1])
        assert built.returncode == 0, built.stderr[-4000:]
    linked = run(
        compiler,
        *FLAGS,
        *objects,
        "-o",
        folder / "fuzz",
        "-lpthread",
        *(["-ldl"] if platform.system() == "Linux" else []),
    )
    assert linked.returncode == 0, linked.stderr[-4000:]
    return folder / "fuzz"


@pytest.fixture(scope="module")
def fuzzer(compiler, tmp_path_factory) -> Path:
    simde = (
        run(compiler, "-E", "-include", "simde/x86/avx512.h", "-x", "c++", "/dev/null").returncode
        == 0
        if X86
        else False
    )
    wide = (
        [*AVX2, "-DNIBBLE_SIMDE", "-Wno-psabi"]
        if simde
        else [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))]
    )
    return build(
        compiler,
        tmp_path_factory.mktemp("fuzz"),
        (
            {"ops_avx2": AVX2, "ops_avx512": wide, "cpuid": ["-DNIBBLE_SIMDE"] if simde else []}
            if X86
            else {}
        ),
    )


@pytest.mark.parametrize(("isa", "number"), [("portable", 1), ("avx2", 2), ("avx512_vnni", 3)])
def test_random_shapes_agree_and_no_byte_outside_is_touched(fuzzer, isa, number):
    result = run(fuzzer, number, ROUNDS, SEED)
    if "this CPU has no" in result.stderr:
        pytest.skip(f"neither this processor nor SIMDe (libsimde-dev) has {isa}")
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert f"{ROUNDS} rounds agree" in result.stdout
