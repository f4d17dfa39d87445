"""Linears of weights that are read as int8 (W4A8) on a GPU: the way that is chosen and every other
that serves it, checked against the reference and timed beside torch's 16-bit product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu import floats, timing
from bench.gpu.floats import OURS
from cases import Case, make_input, make_w4a8
from compare import sqnr_db
from nibble.kernels import ops
from nibble.kernels.backends import native, native_w4a8, triton
from nibble.kernels.backends.cubins import CubinModule, kernels
from nibble.kernels.params import W4A8Params
from nibble.kernels.reference import w4a8 as reference

OP = "linear_w4a8"
SQNR = 40.0
"""Of a 16-bit result to that of the same arithmetic in float32; a value between two codes may take
either once it is computed in another order.
"""
Linear = Callable[[Tensor, W4A8Params], Tensor]


def make(case: Case, dtype: torch.dtype, seed: int, device: str) -> W4A8Params:
    return W4A8Params(**make_w4a8(case, dtype, 32, seed, device), rotation=case.rotation)


def ways(device: str, dtype: torch.dtype) -> dict[str, Linear]:
    """The one that is chosen, and each that serves the device."""
    found: dict[str, Linear] = {OURS: lambda x, p: ops.linear_w4a8(x, *p)}
    there = torch.device(device, 0) if device == "cuda" else torch.device(device)
    given = there, dtype, (dtype,)
    if there.type == "cuda" and native.serves((OP,), *given)[0] is dtype:
        compiled = native_w4a8.linear_w4a8
        found["compiled"] = functools.partial(compiled, dtype)
        if isinstance(native.on(there), CubinModule):
            for rows in kernels.W4A8_ROWS:
                found[f"compiled, {rows} tokens"] = functools.partial(compiled, dtype, isa=rows)
    if triton.serves(OP, *given)[0]:
        found["triton"] = triton.w4a8().linear_w4a8
    found["plain torch"] = lambda x, p: reference.linear_w4a8(x, *p)
    return found


def check(case: Case, dtype: torch.dtype, device: str) -> list[dict]:
    """A row for each way: decibels against the reference in float32."""
    x, p = make_input(case, dtype, device=device), make(case, dtype, 0, device)
    some = slice(max(0, case.M // 2 - 32), case.M // 2 + 32)
    wanted = reference.linear_w4a8(x[some].float(), *p)
    rows = []
    for name, linear in ways(device, dtype).items():
        sqnr = sqnr_db(linear(x, p)[some].float(), wanted)
        rows.append({"way": name, "sqnr_db": sqnr, "ok": sqnr >= SQNR})
    return rows


def worst(case: Case, dtype: torch.dtype, device: str) -> dict:
    """The row that is furthest from the reference."""
    return min(check(case, dtype, device), key=lambda row: row["sqnr_db"])


def row(case: Case, dtype: torch.dtype, device: str) -> dict:
    """Times of every way, and of torch's product of 16-bit weights."""
    count = min(timing.copies(case.K * case.N // 2, device), 4)
    sets = [
        (make_input(case, dtype, device=device), make(case, dtype, seed, device))
        for seed in range(count)
    ]
    dense = [(reference.dequantize_w4a8(*p[:4], dtype), p.bias) for _, p in sets]
    return floats.beside_torch(OP, case, ways(device, dtype), sets, dense)
