"""Builds kernels/csrc/cuda for the CPU, with emulator.h in the GPU's place, into one library that
ctypes loads.

Every source is compiled by itself and kept by the hash of all that it includes, so a test run
compiles only what changed.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[2] / "kernels" / "csrc" / "cuda"
SANITIZE = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)


def unavailable() -> str:
    """Why the emulator cannot run here, in words; empty where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "the emulator runs on x86-64 Linux only"
    if not shutil.which("g++"):
        return "the emulator needs g++, which is not installed"
    version = subprocess.run(
        ["g++", "-dumpversion"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # 12 is the first with _Float16 in C++.
    return (
        ""
        if int(version.split(".")[0]) >= 12
        else f"the emulator needs g++ 12 and this is {version}"
    )


@functools.cache
def _text(source: Path) -> str:
    return source.read_text()


def _with_includes(source: Path, seen: dict[Path, str]) -> dict[Path, str]:
    """`source` and every file of ours that it includes, each with its text."""
    if source in seen:
        return seen
    seen[source] = _text(source)
    for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', seen[source], re.MULTILINE):
        for folder in (source.parent, HERE, CUDA.parent, CUDA):
            if (folder / name).exists():
                _with_includes((folder / name).resolve(), seen)
                break
    return seen


def _flags(sanitize: bool) -> list[str]:
    # Compiling takes longer than the tests do. No contraction and no aliasing rules: nvcc's device
    # code knows neither of g++'s.
    flags = [
        "-std=c++17",
        "-O0" if sanitize else "-O1",
        "-fPIC",
        "-Wall",
        "-Wno-unknown-pragmas",
        "-ffp-contract=off",
        "-fno-strict-aliasing",
    ]
    flags += ["-DNIBBLE_EMULATE", "-DNIBBLE_CUDA", f"-I{HERE}", f"-I{CUDA.parent}"]
    features = set(
        Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
    )
    if {"avx2", "fma", "f16c"} <= features:  # fmaf and float16 as instructions, not as calls
        flags += ["-mavx2", "-mfma", "-mf16c"]
    return flags + (list(SANITIZE) if sanitize else [])


def _run(command: list[str], result: Path) -> Path:
    """Runs a compiler whose output `result` appears at once or not at all: two test runs may build
    side by side.
    """
    part = result.with_name(f"{result.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    os.replace(part, result)
    return result


def _object(source: Path, flags: list[str], folder: Path) -> Path:
    key = hashlib.sha256(repr(flags).encode())
    for path, text in sorted(_with_includes(source, {}).items()):
        key.update(f"{path}\0{text}\0".encode())
    result = folder / f"{source.stem}-{key.hexdigest()[:20]}.o"
    return (
        result if result.exists() else _run(["g++", "-x", "c++", *flags, "-c", str(source)], result)
    )


def sources(only: Sequence[str] = ()) -> list[Path]:
    """What the library is made of: every kernel, or those of the named files (gemm_w4a4/sm75)."""
    kernels = sorted(CUDA.rglob("*.cu"))
    return [
        HERE / "emulator.cpp",
        HERE / "entry.cpp",
        *(
            kernel
            for kernel in kernels
            if not only or str(kernel.relative_to(CUDA).with_suffix("")) in only
        ),
    ]


def library(sanitized: Sequence[str] = ()) -> Path:
    """Path of the built library, building what is not built yet; with names, of those files alone
    and with sanitizers.

    Raises RuntimeError with the compiler's own words.
    """
    folder = Path(tempfile.gettempdir()) / f"nibble-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    _text.cache_clear()
    flags = _flags(bool(sanitized))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _object(source, flags, folder), sources(sanitized)))
    key = hashlib.sha256(" ".join(o.name for o in objects).encode()).hexdigest()[:20]
    result = folder / f"libemulated-{key}.so"
    if result.exists():
        return result
    return _run(["g++", "-shared", *(SANITIZE if sanitized else ()), *map(str, objects)], result)


def load(sanitized: Sequence[str] = ()) -> ctypes.CDLL:
    """The library, loaded. A sanitized one loads only where libasan was preloaded."""
    return ctypes.CDLL(str(library(sanitized)))


def asan() -> str:
    """What a process that runs the sanitized library must preload: libasan, and the C++ library,
    whose exceptions it would not find where Python loads that later.
    """
    commands = (["g++", f"-print-file-name={name}"] for name in ("libasan.so", "libstdc++.so.6"))
    found = (subprocess.run(c, capture_output=True, text=True, check=True) for c in commands)
    return " ".join(done.stdout.strip() for done in found)


if __name__ == "__main__":
    print(library(sys.argv[1:]))
