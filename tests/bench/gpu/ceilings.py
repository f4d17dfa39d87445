"""What this GPU can do at most, measured: copy bandwidth, and products of large matrices in bf16,
fp8 and int8 through torch's libraries.

On random data: a product of zeros draws less power, and runs faster than any real one.
"""

from __future__ import annotations

import torch

from bench.gpu import timing
from bench.gpu.report import Report


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


def run(report: Report, device: str, dry: bool) -> None:
    """Rows of what was measured; the best size of each product is its ceiling."""
    gbs = copy_gbs(device, 1 if dry else 1024)
    report.add({"what": "copy", "gb_s": gbs})
    best: dict[str, float] = {}
    for name, make in PRODUCTS.items():
        for n in [128] if dry else [4096, 8192]:
            try:
                tops = 2e-9 * n**3 / timing.one([make(n, device)], device)
            except Exception as error:  # fp8 needs compute capability 8.9
                report.add(
                    {"what": f"product {name}", "size": n, "absent": str(error).splitlines()[0]}
                )
                continue
            best[name] = max(tops, best.get(name, 0.0))
            report.add({"what": f"product {name}", "size": n, "tops": tops})
    report.set(copy_gb_s=gbs, tops=best)
