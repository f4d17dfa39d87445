"""Every op at shapes with edges and at FLUX.1's, by every route that is alive, against the float64
reference (see `checks`). A failed check is a row, not an end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from bench.gpu import checks, levels
from bench.gpu.isolate import Remote
from bench.gpu.layer import Layer
from bench.gpu.smoke import row
from cases import FLUX, FLUX_MODULATION, SMALL, VQ_LAYOUTS, Case, make_input, make_w4a4

BF16, F16 = torch.bfloat16, torch.float16
EXTRA = [
    Case("tokens_257", 257, 3072, 3072, R=32),
    Case("rank_512", 300, 3072, 3072, R=512),
    Case("ragged_n", 200, 3072, 3000, R=32),
    Case("tokens_16k", 16384, 3072, 3072, R=32),
    Case("rank_zero_large", 4608, 3072, 3072, R=0),
]
VQ_LARGE = [FLUX[0], FLUX[3], *EXTRA[:3], replace(FLUX[1], name="turned", rotation=64)]
TEXT = [replace(FLUX_MODULATION[0], name="text", M=m) for m in (77, 512)]
LINEARS = {
    "linear_w4a4": checks.linear,
    "linear_w4a4, 8 bits": checks.linear8,
    "mlp_w4a4": checks.mlp,
}
Check = tuple[str, int, Callable[[], dict]]


class Plan(NamedTuple):
    """Where to check, the routes that are alive, and those of the fused op."""

    device: str
    dry: bool
    alive: list[int]
    fused: list[int]


def layer_of(case: Case, dtype: torch.dtype, device: str) -> Layer:
    """The very tensors of the CPU's tests."""
    x = make_input(case, dtype, device=device)
    return Layer(case, x, make_w4a4(case, dtype, device=device))


def layer_checks(layer: Layer, plan: Plan, routes: list[int]) -> Iterator[Check]:
    """(op, route, check) of the W4A4 ops on one layer."""
    exact = checks.Exact(layer)
    for route in routes:
        yield "gemm_w4a4_up", route, functools.partial(checks.product, exact, route)
        yield "both steps", route, functools.partial(checks.steps_agree, exact, route)
    small = layer.case.N % 64 == 0 and layer.case.M <= 512
    for route in plan.fused if small and layer.x.dtype == BF16 else ():
        op = "gemm_w4a4_up_gelu_quantize_down"
        yield op, route, functools.partial(checks.fused, exact, route)
    yield "quantize_down", 0, functools.partial(checks.quantizer, exact)
    for op, check in LINEARS.items():
        if op != "mlp_w4a4" or layer.case.N % 64 == 0:
            yield op, 0, functools.partial(check, exact)


def other_checks(case: Case, dtype: torch.dtype, device: str) -> Iterator[Check]:
    for layout in VQ_LAYOUTS.values():
        yield "linear_vq", 0, functools.partial(checks.codebook, case, layout, dtype, device)
    yield levels.OP, 0, functools.partial(levels.worst, case, dtype, device)


def work(plan: Plan) -> Iterator[tuple[Case, torch.dtype, Iterator[Check]]]:
    """FLUX's layers first, by all routes; then edges, by the paths."""
    device, dry = plan.device, plan.dry
    paths = [route for route in plan.alive if route < 10] or plan.alive
    large = [SMALL[8]] if dry else [*FLUX, *EXTRA]
    for case in large:
        layer = Layer.random(case, BF16, device)
        yield case, BF16, layer_checks(layer, plan, plan.alive)
    for case in SMALL[:4] if dry else SMALL:
        for dtype in [BF16] if dry else [BF16, F16]:
            # other GPUs' paths are compiled for bfloat16 alone
            own = paths if dtype == BF16 else [route for route in paths if route not in (1, 2)]
            yield case, dtype, layer_checks(layer_of(case, dtype, device), plan, own)
            yield case, dtype, other_checks(case, dtype, device)
    for case in SMALL[4:6] if dry else [*SMALL, *FLUX_MODULATION, *TEXT]:
        check = functools.partial(checks.w4a16, case, BF16, device)
        yield case, BF16, iter([("linear_w4a16", 0, check)])
    for case in [] if dry else VQ_LARGE:
        yield case, BF16, other_checks(case, BF16, device)


def run(remote: Remote, plan: Plan) -> None:
    wrong = checked = 0
    for case, dtype, found in work(plan):
        sizes = {name: getattr(case, name) for name in "MKNR"} | {"case": case.name}
        sizes["dtype"] = str(dtype).removeprefix("torch.")
        for op, route, check in found:
            if remote.late():
                return
            facts = row({"op": op, "route": route} | sizes, check)
            wrong += not facts["ok"]
            checked += 1
            remote.add(facts)
            remote.set(checks=checked, failed=wrong)
