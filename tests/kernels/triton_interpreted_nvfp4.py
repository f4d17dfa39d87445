"""Linears of 4-bit floats through Triton's interpreter, on the CPU: see `triton_interpreted`.

TRITON_INTERPRET=1 python tests/kernels/triton_interpreted_nvfp4.py RESULTS.pt
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import checkout  # noqa: E402, F401
from nibble.kernels.params import NVFP4Params  # noqa: E402

SHAPES = {"small": (5, 24, 64, 16), "ragged": (70, 131, 192, 37), "no rank": (3, 8, 128, 0)}
"""M, N, K, R."""
DTYPES = (torch.float16, torch.float32)


def layer(name: str, dtype: torch.dtype, rounded: bool) -> tuple[Tensor, NVFP4Params]:
    """x, whose rows are of many sizes, and a layer."""
    m, n, k, r = SHAPES[name]
    draw = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    x = (normal(m, k) * torch.logspace(-3, 1.5, m)[:, None]).to(dtype)
    x[0, :20] = torch.tensor([0.25, -0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.0, -0.0] * 2)
    p = NVFP4Params(
        torch.randint(-128, 128, (n, k // 2), generator=draw, dtype=torch.int8),
        (torch.rand(n, k // 16, generator=draw) * 30 + 0.01).to(torch.float8_e4m3fn),
        torch.rand(n, generator=draw) * 0.01 + 0.001,
        (torch.rand(k, generator=draw) + 0.5).to(dtype),
        (normal(k, r) * 0.1).to(dtype),
        (normal(n, r) * 0.1).to(dtype),
        normal(n).to(dtype) if r else None,
        rounded,
    )
    return x, p


def extremes() -> tuple[Tensor, NVFP4Params]:
    """Infinities, NaN, and numbers beyond every scale, each in a group of its own."""
    x, p = layer("no rank", torch.float32, False)
    x[0, 3], x[1, 20], x[1, 40], x[2, 70] = torch.inf, -torch.inf, torch.nan, 1e30
    x[2, :16] = 1e-42
    return x, p


def main(path: str) -> None:
    from nibble.kernels.backends import triton_nvfp4

    results = {}
    for name in SHAPES:
        for dtype in DTYPES:
            for rounded in (False, True):
                x, p = layer(name, dtype, rounded)
                key = name, dtype, rounded
                results[key] = triton_nvfp4.quantize(x, p), triton_nvfp4.linear_nvfp4(x, p)
    results["extremes"] = triton_nvfp4.quantize(*extremes())
    torch.save(results, path)


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN and infinity
    main(sys.argv[1])
