"""What must hold on a GPU beside numbers: capture in CUDA graphs, many streams at once, the same
bits every time, refusals that harm nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.gpu.layer import Layer
from bench.gpu.report import Report
from cases import Case, make_w4a16, options
from nibble.kernels import ops

SHAPES = [
    Case("one_token", 1, 3072, 3072, R=32),
    Case("ragged", 77, 3072, 3000, R=16),
    Case("middle", 300, 3072, 3072, R=32),
    Case("unsigned", 256, 12288, 3072, R=32, act_unsigned=True),
    Case("rotated", 512, 3072, 3072, R=32, rotation=64),
]


def layers(device: str, dry: bool) -> list[Layer]:
    return [
        Layer.random(case.scaled(0.03) if dry else case, torch.bfloat16, device, seed)
        for seed, case in enumerate(SHAPES)
    ]


def repeats(made: list[Layer], device: str) -> dict:
    """Fifty runs, one result."""
    different = 0
    for layer in made:
        first = layer.linear()
        different += sum(not torch.equal(first, layer.linear()) for _ in range(50))
    return {"ok": different == 0, "different": different}


def graph(made: list[Layer], device: str) -> dict:
    """Captured once, replayed with new inputs: the same bits as without a graph."""
    if device == "cpu":
        return {"ok": True, "skipped": "graphs need a GPU"}
    wrong = []
    for layer in made:
        layer.linear()
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            out = layer.linear()
        for seed in range(3):
            layer.x.copy_(Layer.random(layer.case, layer.x.dtype, device, 100 + seed).x)
            captured.replay()
            if not torch.equal(out, layer.linear()):
                wrong.append(f"{layer.case.name}, input {seed}")
    return {"ok": not wrong, "wrong": wrong}


def streams(made: list[Layer], device: str) -> dict:
    """Eight streams with every layer in turn, many times: each result as if it had run alone."""
    if device == "cpu":
        return {"ok": True, "skipped": "streams need a GPU"}
    alone = [layer.linear() for layer in made]
    torch.cuda.synchronize()
    side = [torch.cuda.Stream() for _ in range(8)]
    results = []
    for turn in range(10):
        for i, stream in enumerate(side):
            with torch.cuda.stream(stream):
                results.append(((i + turn) % len(made), made[(i + turn) % len(made)].linear()))
    torch.cuda.synchronize()
    wrong = sum(not torch.equal(found, alone[i]) for i, found in results)
    return {"ok": wrong == 0, "wrong": wrong, "calls": len(results)}


def tokens_apart(made: list[Layer], device: str) -> dict:
    """A token's output does not depend on the others: NaN in one changes that one alone, and rows
    of a part are rows of the whole.
    """
    wrong = []
    for layer in made:
        whole, m = layer.linear(), layer.case.M
        if m < 2:
            continue
        x = layer.x.clone()
        x[m // 2, 3] = torch.nan
        spoiled = ops.linear_w4a4(x, **layer.parameters, **options(layer.case))
        others = torch.arange(m, device=x.device) != m // 2
        if not torch.equal(spoiled[others], whole[others]) or not spoiled[m // 2].isnan().any():
            wrong.append(layer.case.name)
    return {"ok": not wrong, "wrong": wrong}


def refusals(made: list[Layer], device: str) -> dict:
    """Wrong arguments raise, and the next right call gives what it gave before."""
    layer, accepted = made[0], []
    before = layer.linear()
    p = layer.parameters
    for name, spoiled in {
        "weight on the CPU" if device == "cuda" else "short scales": (
            p
            | (
                {"weight": p["weight"].cpu()}
                if device == "cuda"
                else {"weight_scale": p["weight_scale"][:-1]}
            )
        ),
        "short bias": p | {"bias": p["bias"][:-1]},
        "another K": p | {"weight": p["weight"][:, :-32].contiguous()},
    }.items():
        try:
            ops.linear_w4a4(layer.x, **spoiled)
            accepted.append(name)
        except (ValueError, RuntimeError):
            continue
    same = torch.equal(before, layer.linear())
    return {"ok": same and not accepted, "accepted": accepted, "same_after": same}


def without_memory_of_its_own(made: list[Layer], device: str) -> dict:
    """A call takes its memory from torch: what torch counts before and after is the result
    alone.
    """
    if device == "cpu":
        return {"ok": True, "skipped": "torch counts memory on a GPU"}
    rows = []
    for layer in made:
        layer.linear()
        torch.cuda.synchronize()
        free, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        out = layer.linear()
        torch.cuda.synchronize()
        rows.append((free - torch.cuda.mem_get_info()[0]) - (torch.cuda.memory_reserved() - held))
        del out
    return {"ok": max(rows) == 0, "bytes_outside_torch": max(rows)}


def compiled(made: list[Layer], device: str) -> dict:
    """torch.compile sees one opaque node: the whole function is one graph, with the same bits."""
    layer = made[2]
    run = torch.compile(
        lambda x: ops.linear_w4a4(x, **layer.parameters, **options(layer.case)),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.inference_mode():
        return {"ok": torch.equal(run(layer.x), layer.linear())}


def modulation(made: list[Layer], device: str) -> dict:
    """The weight-only op: the same bits twice, in a graph as outside."""
    case = Case("modulation", 1, 256 if device == "cpu" else 3072, 256 if device == "cpu" else 9216)
    p, x = (
        make_w4a16(case, torch.bfloat16, device=device),
        torch.randn(1, case.K, device=device).bfloat16(),
    )
    first = ops.linear_w4a16(x, **p)
    return {"ok": all(torch.equal(first, ops.linear_w4a16(x, **p)) for _ in range(20))}


CHECKS: dict[str, Callable[[list[Layer], str], dict]] = {
    "same bits every time": repeats,
    "CUDA graph": graph,
    "many streams": streams,
    "tokens apart": tokens_apart,
    "refusals": refusals,
    "no memory of its own": without_memory_of_its_own,
    "torch.compile": compiled,
    "modulation": modulation,
}


def run(report: Report, device: str, dry: bool) -> None:
    made = layers(device, dry)
    for name, check in CHECKS.items():
        if report.late():
            break
        try:
            with torch.inference_mode():
                report.add({"check": name} | check(made, device))
        except Exception as error:
            report.add(
                {
                    "check": name,
                    "ok": False,
                    "error_message": f"{type(error).__name__}: {error}".splitlines()[0],
                }
            )
    report.set(failed=[row["check"] for row in report.facts["rows"] if not row["ok"]])
