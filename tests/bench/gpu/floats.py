"""Linears of 4-bit floats on a GPU: the way that is chosen and every other that serves it, checked
against the reference and timed beside torch's 16-bit product. Where a GPU has no such floats, that
is decoded weights alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu import timing
from cases import Case, make_input
from compare import sqnr_db
from nibble.kernels import ops, which
from nibble.kernels.backends import choose, native, native_nvfp4, nvfp4, triton
from nibble.kernels.backends.cubins import CubinModule, kernels
from nibble.kernels.params import NVFP4Params
from nibble.kernels.reference import nvfp4 as reference

MULTIPLIED_SQNR, DECODED_SQNR = 40.0, 40.0
"""Of a 16-bit result to that of the same arithmetic in float32; every way makes the same codes but
where a value is a tie once it is computed in another order.
"""
OURS = "nibble"
Linear = Callable[[Tensor, NVFP4Params], Tensor]


def make(case: Case, dtype: torch.dtype, seed: int, device: str) -> NVFP4Params:
    """A layer whose codes, scales and branch are drawn."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(device, dtype)

    n, k, r = case.N, case.K, case.R
    codes = torch.randint(-128, 128, (n, k // 2), generator=draw, dtype=torch.int8)
    scale = (torch.rand(n, k // 16, generator=draw) * 200 + 1).to(torch.float8_e4m3fn)
    column = torch.rand(n, generator=draw) * 1e-4 + 1e-5
    smooth = (torch.rand(k, generator=draw) + 0.5).to(device, dtype)
    branch = normal(k, r) * 0.02, normal(n, r) * 0.02
    there = (tensor.to(device) for tensor in (codes, scale, column))
    return NVFP4Params(*there, smooth, *branch, normal(n), True)


def ways(device: str, dtype: torch.dtype) -> dict[str, Linear]:
    """The one that is chosen, and each that serves the device."""
    found: dict[str, Linear] = {OURS: ops.linear_nvfp4}
    there = torch.device(device, 0) if device == "cuda" else torch.device(device)
    given = there, dtype, (dtype,)
    if there.type == "cuda" and native.serves(choose.PARTS["linear_nvfp4"], *given)[0] is dtype:
        compiled = native_nvfp4.linear_nvfp4
        found["compiled"] = functools.partial(compiled, dtype)
        if isinstance(native.on(there), CubinModule):
            for rows in kernels.NVFP4_ROWS:
                found[f"compiled, {rows} tokens"] = functools.partial(compiled, dtype, rows=rows)
    if triton.serves("linear_nvfp4", *given)[0]:
        found["triton"] = triton.nvfp4().linear_nvfp4
    if nvfp4.serves(there, dtype)[0]:
        found["scaled_mm"] = nvfp4.linear_nvfp4
    found["decoded"] = lambda x, p: reference.linear_nvfp4_decoded(x, *p)
    return found


def check(case: Case, dtype: torch.dtype, device: str) -> list[dict]:
    """A row for each way: decibels against the reference in float32."""
    x, p = make_input(case, dtype, device=device), make(case, dtype, 0, device)
    some = slice(max(0, case.M // 2 - 32), case.M // 2 + 32)
    wide = x[some].float()
    multiplied = reference.linear_nvfp4(wide, *p)
    decoded = reference.linear_nvfp4_decoded(wide, *p)
    chosen = which("linear_nvfp4", device, dtype)[0]
    rows = []
    for name, linear in ways(device, dtype).items():
        is_decoded = "decoded" in (name, chosen if name == OURS else "")
        wanted, floor = (decoded, DECODED_SQNR) if is_decoded else (multiplied, MULTIPLIED_SQNR)
        sqnr = sqnr_db(linear(x, p)[some].float(), wanted)
        rows.append({"way": name, "sqnr_db": sqnr, "ok": sqnr >= floor})
    return rows


def row(case: Case, dtype: torch.dtype, device: str) -> dict:
    """Times of every way, and of torch's product of 16-bit weights."""
    count = min(timing.copies(case.K * case.N // 2, device), 4)
    sets = [
        (make_input(case, dtype, device=device), make(case, dtype, seed, device))
        for seed in range(count)
    ]
    dense = [(reference.decoded_weight(p.weight, p.weight_scale, dtype), p.bias) for _, p in sets]
    return beside_torch("linear_nvfp4", case, ways(device, dtype), sets, dense)


def beside_torch(
    op: str,
    case: Case,
    ways: dict[str, Callable],
    sets: list[tuple],
    dense: list[tuple[Tensor, Tensor | None]],
) -> dict:
    """A row: each way's time for an op, and that of torch's product with 16-bit weights. sets: x
    and parameters, of which there are several; dense: their weight and bias.
    """
    x = sets[0][0]
    device = x.device.type
    calls = {
        name: [functools.partial(linear, x, p) for x, p in sets] for name, linear in ways.items()
    }
    calls["torch"] = [
        functools.partial(torch.nn.functional.linear, x, *weights)
        for (x, _), weights in zip(sets, dense, strict=True)
    ]
    timings, failed = timing.take_turns(calls, device)
    found = {"op": op, "case": case.name, "M": case.M, "K": case.K, "N": case.N}
    found |= {"way": " ".join(which(op, device, x.dtype)), "timings": timings}
    found["absent"] = failed
    if OURS in timings:
        found["tflops"] = 2e-9 * case.M * case.N * case.K / timings[OURS]["ms"]
    return found
