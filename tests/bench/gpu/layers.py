"""FLUX.1's layers on a GPU: our linear with and without its branch, its two steps, and everybody
else's, in turns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench import peers
from bench.gpu import floats, levels, timing
from bench.gpu.isolate import Remote
from bench.gpu.layer import Layer, Steps, in_order
from bench.gpu.products import SHAPES, flux_case
from bench.timer import geometric_mean
from cases import FLUX_MODULATION, VQ_LAYOUTS, Case, make_input, make_vq, make_w4a16
from nibble.kernels import ops
from nibble.kernels.reference import vq as reference_vq

TOKENS = [4608, 1024, 256]
"""4096 of a megapixel picture and 512 of its text first: if time runs out, what matters most has
been measured.
"""
OURS = "nibble"
WIDE = "nibble, 8-bit activations"
"""The same layer and file, its activations in codes of 8 bits; beside int8 and W4A8 peers."""
STEPS = ("quantize_down", "gemm_w4a4_up", "steps, rank 0")


def candidates(
    case: Case, dtype: torch.dtype, device: str
) -> tuple[dict[str, list], dict[str, str], Steps | None]:
    """({name: one call a set of buffers}, {peer: why not}, steps of the first set or None)."""
    count = timing.copies(case.K * case.N // 2 + case.M * case.K * 2, device)
    layers = [Layer.random(case, dtype, device, seed) for seed in range(count)]
    calls, absent = (
        {
            OURS: [layer.linear for layer in layers],
            WIDE: [layer.linear8 for layer in layers],
            "nibble, rank 0": [layer.rank_free().linear for layer in layers],
        },
        {},
    )
    steps = None
    try:
        steps = [Steps(layer) for layer in layers]
        calls |= {
            "quantize_down": [s.quantize for s in steps],
            "gemm_w4a4_up": [s.product for s in steps],
            "steps": [s.both for s in steps],
            "steps, rank 0": [Steps(layer.rank_free()).both for layer in layers],
        }
    except ValueError as why:
        absent["steps"] = str(why)
    for name, make in peers.GPU_PEERS.items():
        made = []
        for layer in layers:
            found, reasons = peers.available({name: make}, case, layer.x, layer.parameters)
            absent |= reasons
            if reasons:
                break
            made.append(found[name])
        else:
            calls[name] = made
    return calls, absent, steps[0] if steps else None


def row_of(case: Case, dtype: torch.dtype, device: str, ceilings: dict) -> dict:
    """Times of all candidates on one shape, and what they say about ours."""
    calls, absent, steps = candidates(case, dtype, device)
    timings, failed = timing.take_turns(calls, device)
    row = {
        "op": "linear_w4a4",
        "case": case.name,
        "M": case.M,
        "K": case.K,
        "N": case.N,
        "R": case.R,
        "act_unsigned": case.act_unsigned,
        "timings": timings,
        "absent": absent | failed,
    }
    work = 2e-9 * case.M * case.N * case.K
    if OURS in timings:
        row["ms"], row["tops"] = timings[OURS]["ms"], work / timings[OURS]["ms"]
        row["times_as_fast_as"] = {
            name: t["ms"] / timings[OURS]["ms"]
            for name, t in timings.items()
            if name in peers.GPU_PEERS
        }
    if (
        steps is not None
        and {"quantize_down", "gemm_w4a4_up", "steps", "steps, rank 0"} <= timings.keys()
    ):
        gbs = steps.quantize_bytes / timings["quantize_down"]["ms"] / 1e6
        tops = work / timings["gemm_w4a4_up"]["ms"]
        ceiling = max(
            (ceilings.get("tops", {}).get(name, 0.0) for name in ("int8", "fp8 e4m3")), default=0.0
        )
        row["steps"] = {
            "quantize_gb_s": gbs,
            "quantize_of_copy": gbs / ceilings["copy_gb_s"] if "copy_gb_s" in ceilings else None,
            "gemm_tops": tops,
            "gemm_of_ceiling": tops / ceiling if ceiling else None,
            "branch_share": timings["steps"]["ms"] / timings["steps, rank 0"]["ms"] - 1,
        }
    return row


def fused_rows(m: int, dtype: torch.dtype, device: str, hidden: int) -> Iterator[dict]:
    """The ops that join several: a whole MLP, and q/k/v of one quantized input, each beside the
    same linears one by one.
    """
    count = timing.copies(hidden * hidden * 4, device)
    first, second = (
        Case("first", m, hidden, 4 * hidden, R=32),
        Case("second", m, 4 * hidden, hidden, R=32, act_unsigned=True),
    )
    pairs = [
        (
            Layer.random(first, dtype, device, seed),
            in_order(Layer.random(second, dtype, device, seed + 1).parameters),
        )
        for seed in range(count)
    ]

    def apart(layer: Layer, after: list) -> torch.Tensor:
        return ops.linear_w4a4(
            torch.nn.functional.gelu(layer.linear(), approximate="tanh"), *after, act_unsigned=True
        )

    yield joined(
        "mlp_w4a4",
        m,
        {
            "joined": [
                lambda a=a, b=b: ops.mlp_w4a4(a.x, in_order(a.parameters), b, act_unsigned2=True)
                for a, b in pairs
            ],
            "one by one": [lambda a=a, b=b: apart(a, b) for a, b in pairs],
        },
        device,
    )
    case = Case("q, k, v", m, hidden, hidden, R=32)
    threes = [
        [Layer.random(case, dtype, device, 3 * seed + i) for i in range(3)] for seed in range(count)
    ]

    def grouped(three: list[Layer]) -> list[torch.Tensor]:
        of = {
            name: [layer.parameters[name] for layer in three]
            for name in ("weight", "weight_scale", "proj_down", "proj_up", "bias")
        }
        return ops.linear_w4a4_grouped(
            three[0].x, three[0].parameters["smooth_factor"], *of.values()
        )

    yield joined(
        "linear_w4a4_grouped",
        m,
        {
            "joined": [lambda three=three: grouped(three) for three in threes],
            "one by one": [
                lambda three=three: [layer.linear() for layer in three] for three in threes
            ],
        },
        device,
    )


def joined(op: str, m: int, calls: dict[str, list], device: str) -> dict:
    timings, failed = timing.take_turns(calls, device)
    gain = timings["one by one"]["times_baseline"] if len(timings) == 2 else None
    return {
        "op": op,
        "M": m,
        "times_as_fast_as_one_by_one": gain,
        "timings": timings,
        "absent": failed,
    }


def modulation_row(case: Case, dtype: torch.dtype, device: str) -> dict:
    """linear_w4a16 of a few tokens: bound by reading the weight."""
    count = timing.copies(case.K * case.N // 2, device)
    sets = [
        (make_input(case, dtype, device=device), make_w4a16(case, dtype, seed, device))
        for seed in range(min(count, 4))
    ]
    calls = {OURS: [lambda x=x, p=p: ops.linear_w4a16(x, **p) for x, p in sets]}
    wanted = {
        "torch bfloat16": peers.torch_dense(torch.bfloat16),
        "comfy_kitchen gemv": peers.kitchen_gemv("cuda"),
    }
    made = [peers.available(wanted, case, x, p) for x, p in sets]
    calls |= {name: [calls_of[name] for calls_of, _ in made] for name in made[0][0]}
    timings, failed = timing.take_turns(calls, device)
    weight_bytes = case.K * case.N // 2 + 2 * 2 * case.K // 64 * case.N
    return {
        "op": "linear_w4a16",
        "case": case.name,
        "M": case.M,
        "K": case.K,
        "N": case.N,
        "timings": timings,
        "absent": made[0][1] | failed,
        "gb_s": weight_bytes / timings[OURS]["ms"] / 1e6 if OURS in timings else None,
    }


def vq_row(case: Case, layout: tuple[int, int], dtype: torch.dtype, device: str) -> dict:
    """linear_vq with its branch, beside torch's own product of 16-bit weights and decoding followed
    by that product.
    """
    count = min(timing.copies(case.K * case.N // 4, device), 4)
    sets = [
        (make_input(case, dtype, device=device), make_vq(case, *layout, dtype, seed, device))
        for seed in range(count)
    ]
    dense = [
        reference_vq.dequantize_vq(p["indices"], p["codebook"], p["scale"]).to(dtype)
        for _, p in sets
    ]
    timings, failed = timing.take_turns(
        {
            OURS: [lambda x=x, p=p: ops.linear_vq(x, **p) for x, p in sets],
            "nibble, rank 0": [
                lambda x=x, p=p: ops.gemm_vq(x, p["indices"], p["codebook"], p["scale"], p["bias"])
                for x, p in sets
            ],
            "torch": [
                lambda x=x, w=w, p=p: torch.nn.functional.linear(x, w, p["bias"])
                for (x, p), w in zip(sets, dense, strict=True)
            ],
            "decode, then torch": [
                lambda x=x, p=p: torch.nn.functional.linear(
                    x,
                    reference_vq.dequantize_vq(p["indices"], p["codebook"], p["scale"], dtype),
                    p["bias"],
                )
                for x, p in sets
            ],
        },
        device,
    )
    row = {
        "op": "linear_vq",
        "case": case.name,
        "bits": layout[0],
        "vector": layout[1],
        "M": case.M,
        "K": case.K,
        "N": case.N,
        "timings": timings,
        "absent": failed,
    }
    if OURS in timings:
        row["tflops"] = 2e-9 * case.M * case.N * case.K / timings[OURS]["ms"]
        row["gb_s"] = case.K * case.N * layout[0] / layout[1] / 8 / timings[OURS]["ms"] / 1e6
    return row


def summary(rows: list[dict]) -> dict:
    """By number of tokens: geometric means over the layers."""
    found = {}
    for m in sorted({row["M"] for row in rows if "times_as_fast_as" in row}):
        chosen = [row for row in rows if row["M"] == m and "times_as_fast_as" in row]
        names = dict.fromkeys(name for row in chosen for name in row["times_as_fast_as"])
        steps = [row["steps"] for row in chosen if "steps" in row]
        found[str(m)] = (
            {"shapes": len(chosen)}
            | {
                "times_as_fast_as": {
                    name: geometric_mean(
                        [
                            row["times_as_fast_as"][name]
                            for row in chosen
                            if name in row["times_as_fast_as"]
                        ]
                    )
                    for name in names
                }
            }
            | {
                key: geometric_mean([step[key] for step in steps if step[key]])
                for key in ("quantize_of_copy", "gemm_of_ceiling")
                if steps
            }
        )
        if steps:
            found[str(m)]["branch_share"] = sum(step["branch_share"] for step in steps) / len(steps)
    return found


def run(report: Remote, device: str, dry: bool, ceilings: dict) -> None:
    dtype = torch.bfloat16
    for m in [256] if dry else TOKENS:
        for k, n in SHAPES[2:4] if dry else SHAPES:
            if report.late():
                break
            case = flux_case(m, k, n)
            add(
                report,
                lambda case=case: row_of(
                    case.scaled(0.02) if dry else case, dtype, device, ceilings
                ),
                {"op": "linear_w4a4", "case": case.name, "M": m},
            )
            report.set(summary=summary(report.rows))
    for m in [5] if dry else TOKENS:
        if not report.late():
            rows = fused_rows(m, dtype, device, 64 if dry else 3072)
            for op in ("mlp_w4a4", "linear_w4a4_grouped"):
                add(report, lambda rows=rows: next(rows), {"op": op, "M": m})
    for case in FLUX_MODULATION:
        if not report.late():
            add(
                report,
                lambda case=case: modulation_row(case.scaled(0.02) if dry else case, dtype, device),
                {"op": "linear_w4a16", "case": case.name},
            )
    for m in [5] if dry else [4608, 256]:
        for k, n in SHAPES[2:3] if dry else ((3072, 12288), (12288, 3072)):
            case = flux_case(m, k, n)
            for op, make in ((levels.OP, levels.row), ("linear_nvfp4", floats.row)):
                if not report.late():
                    add(
                        report,
                        lambda case=case, make=make: make(
                            case.scaled(0.02) if dry else case, dtype, device
                        ),
                        {"op": op, "case": case.name, "M": m},
                    )
    for m in [5] if dry else [1, 256, 4608]:
        for layout in VQ_LAYOUTS.values():
            if not report.late():
                case = flux_case(m, 3072, 12288)
                add(
                    report,
                    lambda case=case, layout=layout: vq_row(
                        case.scaled(0.02) if dry else case, layout, dtype, device
                    ),
                    {"op": "linear_vq", "case": case.name, "M": m},
                )


def add(report: Remote, make, facts: dict) -> None:
    """A row, or the row's failure: one layer's error must not cost the others their figures."""
    try:
        report.add(make())
    except Exception as error:
        report.add(facts | {"error_message": f"{type(error).__name__}: {error}".splitlines()[0]})
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
