"""The router's choices, and every alternative to them measured: a reason that it gives in words is
checked by a number here.
"""

from __future__ import annotations

import torch

from bench.gpu import layer, layers, timing
from bench.gpu.report import Report
from compare import relative_error
from nibble.kernels.backends import native

OPS = (
    "quantize_down",
    "gemm_w4a4_up",
    "gemm_w4a4_up_gelu_quantize_down",
    "gemv_w4a16",
    "gemm_w4a16",
)


def choices(capability: int, dry: bool) -> list[dict]:
    """What the router says, for every op, shape and number of tokens."""
    module, _ = native.module()
    found = []
    for m in [1, 77, 256, 1024, 4608, 16384]:
        for k, n in layers.SHAPES[:1] if dry else layers.SHAPES:
            for op in OPS:
                path, reason = module.route(op, capability, m, n, k)
                found.append({"op": op, "M": m, "N": n, "K": k, "path": path, "reason": reason})
    return found


def forced(case, dtype: torch.dtype, device: str, numbered: list[tuple[int, str]]) -> dict:
    """Times of one product by every path, and each one's difference from the router's own."""
    count = timing.copies(case.K * case.N // 2, device)
    sets = [layer.Layer.random(case, dtype, device, seed) for seed in range(count)]
    own = [layer.Steps(one) for one in sets]
    for steps in own:
        steps.both()
    expected = own[0].product().clone()
    calls, difference, refused = {"router": [s.product for s in own]}, {}, {}
    for number, name in numbered:
        try:
            steps = [layer.Steps(one, number) for one in sets]
            for s in steps:
                s.both()
            difference[name] = relative_error(steps[0].product(), expected)
            calls[name] = [s.product for s in steps]
        # a path that is not made for this shape says so
        except (ValueError, RuntimeError) as error:
            refused[name] = str(error).splitlines()[0]
    timings, failed = timing.take_turns(calls, device)
    fastest = min(timings, key=lambda name: timings[name]["ms"])
    return {
        "case": case.name,
        "M": case.M,
        "K": case.K,
        "N": case.N,
        "fastest": fastest,
        "router_over_fastest": timings["router"]["ms"] / timings[fastest]["ms"],
        "timings": timings,
        "difference": difference,
        "refused": refused | failed,
    }


def run(report: Report, device: str, dry: bool) -> None:
    module, why = native.module()
    if module is None or torch.device(device).type not in module.DEVICES:
        report.set(absent=why)
        return
    capability = 0 if device == "cpu" else module.capability(torch.cuda.current_device())
    report.set(choices=choices(capability, dry))
    numbered = layer.routes("gemm_w4a4_up", capability)
    if not numbered:
        report.set(absent="this nibble_kernels offers no choice of paths, so none can be forced")
        return
    for m in [256] if dry else layers.TOKENS:
        for k, n in layers.SHAPES[2:4] if dry else layers.SHAPES:
            if report.late():
                return
            case = layers.flux_case(m, k, n)
            layers.add(
                report,
                lambda case=case: forced(
                    case.scaled(0.02) if dry else case, torch.bfloat16, device, numbered
                ),
                {"case": case.name, "M": m},
            )
