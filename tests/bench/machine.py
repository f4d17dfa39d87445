"""What a measurement was made on: versions, names, and the ceilings of this CPU, measured in the
same run as everything else.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.timer import once

PEAK_SOURCE = Path(__file__).with_name("peak_cpu.cpp")
PACKAGES = (
    "torch",
    "nibble-kernels",
    "comfy-kitchen",
    "bitsandbytes",
    "torchao",
    "diffusers",
    "numpy",
)


def versions() -> dict[str, str | None]:
    """Installed versions, None where a package is absent."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_name() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


WIDE_SETS = ("avx2", "f16c", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


def instruction_sets() -> list[str]:
    """Those of WIDE_SETS that this processor has; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [name for name in WIDE_SETS if name in flags]


def command() -> str:
    """How this run was started, as one would type it."""
    return " ".join(
        ["python", *(Path(part).name if part == sys.argv[0] else part for part in sys.argv)]
    )


def describe_cpu() -> dict:
    """CPU, threads, versions, load: enough to know whether two files may be compared."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "device": "cpu",
        "name": cpu_name(),
        "instruction_sets": instruction_sets(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch_uses": capability,
        "system": platform.platform(),
        "load_average": load,
        "command": command(),
        "versions": versions(),
    }


# ---- ceilings ------------------------------------------------------------------------------------


def cpu_ceilings() -> dict:
    """Billions of operations a second (two a multiply-add) with torch's number of threads: torch's
    own float32 product, and the units' peaks from `peak_cpu.cpp` where a compiler is at hand;
    absent ones say why.
    """
    a, b = torch.randn(1024, 4096), torch.randn(4096, 1024)
    torch.mm(a, b)
    seconds = min(once(lambda: torch.mm(a, b), "cpu") for _ in range(5))
    return {
        "torch float32 product": {"gops": 2 * 1024 * 4096 * 1024 / seconds / 1e9}
    } | _unit_peaks()


def _unit_peaks() -> dict:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None or platform.machine().lower() not in ("x86_64", "amd64"):
        return {
            "8-bit products": {
                "absent": (
                    "no C++ compiler on PATH" if compiler is None else "not an x86-64 processor"
                )
            }
        }
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        built = subprocess.run(
            [
                compiler,
                "-O2",
                "-std=c++17",
                "-march=native",
                "-shared",
                "-fPIC",
                "-o",
                str(library),
                str(PEAK_SOURCE),
            ],
            capture_output=True,
            text=True,
        )
        if built.returncode:
            return {"8-bit products": {"absent": built.stderr.strip().splitlines()[0]}}
        functions = ctypes.CDLL(str(library))
        names = {
            "8-bit products, AVX2": "maddubs_rate",
            "8-bit products, AVX-512 VNNI": "vnni_rate",
            "float32 multiply-adds, AVX2": "fma_rate",
        }
        return {
            label: {"gops": _together(getattr(functions, name)) / 1e9}
            for label, name in names.items()
            if hasattr(functions, name)
        }


def _together(rate) -> float:
    """Operations a second of all threads at once, the best of five: whoever else uses the machine
    only takes away.
    """
    rate.restype, threads = ctypes.c_double, torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(lambda _: 2 * rate(), range(threads))) for _ in range(5))
