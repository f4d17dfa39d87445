"""The kernels that the GPU run starts, compiled beforehand and side by side; needs no GPU.

They go where all kernels compiled by NVRTC go, so a cache that was filled on another machine with
the same NVRTC saves the minute.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed

from bench.gpu.isolate import Remote
from nibble.kernels.backends.cubins import kernels, library, routes
from nibble.kernels.backends.cubins.kernels import Kernel


def _plain(kernel: Kernel) -> bool:
    """Whether x and the parameters are of one 16-bit type, as in the run."""
    types = re.findall(r"\b(?:float|f16|bf16)\b", kernel.name)
    return "float" not in types and len(set(types)) <= 1


def _other_paths(arch: str, capability: int) -> Iterator[Kernel]:
    """Paths of other GPUs, in bfloat16."""
    own = kernels.MMAS.get(arch, "Int8")
    for path in routes.of("gemm_w4a4_up_gelu_quantize_down", capability):
        mma = routes.MMAS[path]
        if mma == own:
            continue
        yield kernels.add_tiles(mma)
        for sign in kernels.SIGNS:
            yield from (kernels.gemm(mma, "bf16", rows, sign) for rows in kernels.tile_heights(mma))
            tall = 64 if mma == "Int8" else 128
            yield from (kernels.gelu(mma, "bf16", rows, sign) for rows in (32, tall))


def wanted(capability: int) -> list[Kernel]:
    """The longest to compile first."""
    arch = kernels.architecture(capability)
    found = [kernel for kernel in kernels.of(arch) if _plain(kernel)]
    found += _other_paths(arch, capability)
    return sorted(found, key=lambda kernel: "gemm" not in kernel.name)


def compile_all(remote: Remote, capability: int, at_once: int) -> None:
    """A row for each kernel that does not compile."""
    arch, package = kernels.architecture(capability), library.Package()
    missing = [kernel for kernel in wanted(capability) if package.find(kernel, arch) is None]
    start, failed = time.perf_counter(), 0
    with ThreadPoolExecutor(at_once) as pool:
        tasks = {pool.submit(library.cached, kernel, arch): kernel for kernel in missing}
        for done, task in enumerate(as_completed(tasks), 1):
            error = task.exception()
            if error is not None:
                failed += 1
                remote.add({"kernel": tasks[task].name, "ok": False, "error_message": str(error)})
            took = round(time.perf_counter() - start, 1)
            remote.set(arch=arch, kernels=len(missing), done=done, failed=failed, took=took)
