"""Linears of weights that are read as int8 through Triton's interpreter, on the CPU: see
`triton_interpreted`.

TRITON_INTERPRET=1 python tests/kernels/triton_interpreted_w4a8.py RESULTS.pt
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import checkout  # noqa: E402, F401
from cases import Case, make_input, make_w4a8  # noqa: E402
from nibble.kernels.params import W4A8Params  # noqa: E402

CASES = [
    Case("small", 5, 64, 24, R=16),
    Case("ragged", 70, 192, 131, R=37, bias=False),
    Case("no_rank", 3, 128, 8, R=0),
    Case("rotated", 33, 128, 66, R=33, rotation=64),
    Case("rank_160", 18, 128, 70, R=160),
]
DTYPES = (torch.float16, torch.float32)
GROUPS = (16, 32, 64)
MIDDLE = CASES[1]


def layer(case: Case, dtype: torch.dtype, group: int = 32) -> W4A8Params:
    return W4A8Params(**make_w4a8(case, dtype, group), rotation=case.rotation)


def mixed(dtype: torch.dtype) -> tuple[Tensor, W4A8Params]:
    """Columns of a wider x in one dtype, parameters in the other."""
    wide = make_input(Case("", MIDDLE.M, MIDDLE.K + 64, 1), dtype)
    return wide[:, : MIDDLE.K], layer(MIDDLE, DTYPES[dtype == DTYPES[0]])


def extremes() -> tuple[Tensor, W4A8Params]:
    """NaN, infinity, subnormal numbers and zeros, each in a token of its own."""
    case = Case("", 6, 128, 40, R=8)
    x = make_input(case, torch.float32)
    x[1, 70], x[2, 1], x[3], x[4] = torch.nan, -torch.inf, 0, 1e-42
    return x, layer(case, torch.float32)


def main(path: str) -> None:
    import triton.language as tl

    from nibble.kernels.backends import triton_w4a8

    results = {}

    def keep(key, x, p):
        results[key] = triton_w4a8.quantize(x, p), triton_w4a8.linear_w4a8(x, p)

    for dtype in DTYPES:
        for case in CASES:
            keep((case.name, dtype), make_input(case, dtype), layer(case, dtype))
        keep(("mixed", dtype), *mixed(dtype))
    for group in GROUPS:
        keep(("group", group), make_input(MIDDLE, DTYPES[0]), layer(MIDDLE, DTYPES[0], group))
    keep("extremes", *extremes())
    floats = triton_w4a8.way(None)._replace(floats=tl.float32)
    triton_w4a8.way = lambda there: floats
    keep("floats", make_input(MIDDLE, torch.float32), layer(MIDDLE, torch.float32))
    torch.save(results, path)


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN and infinity
    main(sys.argv[1])
