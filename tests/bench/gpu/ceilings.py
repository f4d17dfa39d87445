"""What this GPU can do at most, measured: copy bandwidth, reads from its second-level cache, and
products of large matrices in bf16, fp8 and int8, through torch's libraries and by mma.sync alone.

On random data: a product of zeros draws less power, and runs faster than any real one.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu import timing
from bench.gpu.isolate import Remote

HEADER = str(Path(__file__).with_suffix(".cuh"))
THREADS = 512
CACHED_MEGABYTES = 16
"""Fits any GPU's second-level cache that is not of the smallest, and exceeds every first level."""


def copy_gbs(device: str, megabytes: int) -> float:
    """GB/s of a copy within the GPU's memory, bytes read and bytes written."""
    source = torch.randint(0, 255, (megabytes << 20,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / timing.one([lambda: target.copy_(source)], device) / 1e6


def _bf16(n: int, device: str):
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    return lambda: a @ b


def _fp8(n: int, device: str):
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)


def _int8(n: int, device: str):
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device=device) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


PRODUCTS = {"bf16": _bf16, "fp8 e4m3": _fp8, "int8": _int8}


# ---- kernels of our own --------------------------------------------------------------------------


def _own() -> tuple[object, int]:
    """(starts kernels of ours, multiprocessors). Raises CompileError, DriverError."""
    from probe import on_gpu

    gpu = on_gpu.Gpu()
    return gpu, gpu.cuda.multiprocessors(0)


def _kernel(name: str) -> object:
    from probe import on_gpu

    return on_gpu.kernel(f"{name}<{THREADS}>", HEADER, "ceilings")


def cache_read_gbs(megabytes: int, rounds: int) -> float:
    """GB/s of reads that the second-level cache serves."""
    gpu, multiprocessors = _own()
    data = torch.randint(0, 255, (megabytes << 20,), dtype=torch.uint8, device=gpu.device)
    out = torch.zeros(1, dtype=torch.int32, device=gpu.device)
    sizes = ctypes.c_longlong(data.numel() // 16), ctypes.c_int(rounds)
    addresses = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(out.data_ptr())
    arguments = (addresses[0], *sizes, addresses[1])
    kernel = _kernel("read")

    def read() -> None:
        gpu.launch(kernel, 4 * multiprocessors, THREADS, 0, arguments)

    return rounds * data.numel() / timing.one([read], "cuda") / 1e6


def mma_tops(rounds: int) -> float:
    """TOP/s of int8 m16n8k32 by mma.sync, from registers alone."""
    gpu, multiprocessors = _own()
    out = torch.zeros(1, dtype=torch.int32, device=gpu.device)
    arguments = ctypes.c_int(rounds), ctypes.c_void_p(out.data_ptr())
    kernel, blocks = _kernel("multiply"), 2 * multiprocessors

    def multiply() -> None:
        gpu.launch(kernel, blocks, THREADS, 0, arguments)

    work = blocks * THREADS // 32 * rounds * 8 * 2 * 16 * 8 * 32
    return work / timing.one([multiply], "cuda") / 1e9


# ---- the section ---------------------------------------------------------------------------------


def _measured(remote: Remote, what: str, unit: str, measure: Callable[[], float]) -> float:
    """A row; 0 where it cannot be measured (fp8 needs compute capability 8.9)."""
    try:
        value = measure()
    except Exception as error:
        remote.add({"what": what, "absent": str(error).splitlines()[0]})
        return 0.0
    remote.add({"what": what, unit: value})
    return value


def run(remote: Remote, device: str, dry: bool) -> None:
    """Rows of what was measured; the best size of each product is its ceiling."""
    best: dict[str, float] = {}
    remote.set(tops=best)
    gbs = _measured(remote, "copy", "gb_s", lambda: copy_gbs(device, 1 if dry else 1024))
    remote.set(copy_gb_s=gbs)
    for name, make in PRODUCTS.items():
        for n in [128] if dry else [4096, 8192]:

            def rate(make=make, n=n) -> float:
                return 2e-9 * n**3 / timing.one([make(n, device)], device)

            tops = _measured(remote, f"product {name}, {n}", "tops", rate)
            best[name] = max(tops, best.get(name, 0.0))
            remote.set(tops=best)
    if device == "cuda":
        best["mma.sync s8"] = _measured(remote, "mma.sync s8", "tops", lambda: mma_tops(20000))
        read = _measured(remote, "L2", "gb_s", lambda: cache_read_gbs(CACHED_MEGABYTES, 50))
        remote.set(tops=best, cache_gb_s=read)
