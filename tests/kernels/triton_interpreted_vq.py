"""Codebook linears through Triton's interpreter, on the CPU: see `triton_interpreted`.

TRITON_INTERPRET=1 python tests/kernels/triton_interpreted_vq.py RESULTS.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import checkout  # noqa: E402, F401
from cases import VQ_LAYOUTS, Case, make_input, make_vq  # noqa: E402
from nibble.kernels.params import VQParams  # noqa: E402
from nibble.quant.weights.packing import pack_indices  # noqa: E402

CASES = [
    Case("one_token", 1, 64, 40, R=0),
    Case("ragged", 70, 320, 131, R=5, bias=False),
    Case("rotated", 17, 192, 66, R=8, rotation=64),
]
DTYPES = (torch.float16, torch.float32)
LAYOUTS = (*VQ_LAYOUTS.values(), (4, 4), (7, 2))


def layer(case: Case, bits: int, vector: int, dtype: torch.dtype) -> VQParams:
    """Scales of both signs."""
    p = VQParams(**make_vq(case, bits, vector, dtype), rotation=case.rotation)
    if p.scale is not None:
        p.scale[::3] *= -1
    return p


def columns(dtype: torch.dtype) -> Tensor:
    """Columns of a wider matrix: their rows lie apart."""
    return make_input(Case("", CASES[1].M, CASES[1].K + 64, 1), dtype)[:, : CASES[1].K]


def places(bits: int, vector: int) -> tuple[VQParams, Tensor]:
    """(a layer of whole numbers, the matrix that it stands for): every codeword, in every place of
    a row.
    """
    n, k = 67, 128
    index = (torch.arange(n)[:, None] * 61 + torch.arange(k // vector) * 5) % (1 << bits)
    draw = torch.Generator().manual_seed(0)
    book = torch.randint(-128, 129, (1 << bits, vector), generator=draw).half()
    return VQParams(pack_indices(index, bits), book), book[index].flatten(1)


def extremes() -> tuple[Tensor, VQParams]:
    """NaN and infinity, each in a token of its own; and a codeword that nobody asks for."""
    p, _ = places(6, 4)
    p.indices[:] = 0
    p.codebook[1:] = torch.nan
    x = make_input(Case("", 20, 128, 1), torch.float16)
    x[1, 70], x[2, 1] = torch.nan, -torch.inf
    return x, p


def main(path: str) -> None:
    from nibble.kernels.backends import triton_vq

    results = {}
    for bits, vector in LAYOUTS:
        for dtype in DTYPES:
            for case in CASES:
                given = make_input(case, dtype), layer(case, bits, vector, dtype)
                results[case.name, dtype, bits, vector] = triton_vq.linear_vq(*given)
        eye = torch.eye(128, dtype=torch.float16)
        results["places", bits, vector] = triton_vq.gemm_vq(eye, places(bits, vector)[0])
    for dtype in DTYPES:
        p = layer(CASES[1], 6, 4, torch.float32)
        results["columns", dtype] = triton_vq.linear_vq(columns(dtype), p)
    results["extremes"] = triton_vq.gemm_vq(*extremes())
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
