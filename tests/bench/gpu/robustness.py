"""What must hold on a GPU beside numbers, by every route that is alive: capture in CUDA graphs, the
same bits every time, a NaN that stays in its token; and of the whole linear: many streams at once,
refusals that harm nothing, no memory of its own, torch.compile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bench.gpu.isolate import Remote
from bench.gpu.layer import Layer, Steps
from bench.gpu.smoke import row
from cases import Case, make_w4a16, options
from nibble.kernels import ops

SHAPES = [
    Case("one_token", 1, 3072, 3072, R=32),
    Case("ragged", 77, 3072, 3000, R=16),
    Case("middle", 300, 3072, 3072, R=32),
    Case("unsigned", 256, 12288, 3072, R=32, act_unsigned=True),
    Case("rotated", 512, 3072, 3072, R=32, rotation=64),
    Case("flux", 4608, 3072, 3072, R=32),
]
REPEATS = 50
NO_GPU = {"ok": True, "skipped": "this needs a GPU"}


class Subject(NamedTuple):
    """run: the layer on what is in layer.x now, as a new tensor."""

    layer: Layer
    run: Callable[[], Tensor]


def layers(device: str, dry: bool) -> list[Layer]:
    return [
        Layer.random(case.scaled(0.03) if dry else case, torch.bfloat16, device, seed)
        for seed, case in enumerate(SHAPES[:-1] if dry else SHAPES)
    ]


def by_route(made: list[Layer], route: int) -> list[Subject]:
    steps = [Steps(layer, route) for layer in made]
    return [Subject(one.layer, lambda one=one: one.both().clone()) for one in steps]


# ---- by route ------------------------------------------------------------------------------------


def repeats(subjects: list[Subject], device: str) -> dict:
    """Fifty runs, one result."""
    different = 0
    for subject in subjects:
        first = subject.run()
        different += sum(not torch.equal(first, subject.run()) for _ in range(REPEATS))
    return {"ok": different == 0, "different": different}


def graph(subjects: list[Subject], device: str) -> dict:
    """Captured once, replayed with new inputs: the same bits as without a graph."""
    if device == "cpu":
        return NO_GPU
    wrong = []
    for layer, run in subjects:
        run()
        torch.cuda.synchronize()
        captured, kept = torch.cuda.CUDAGraph(), layer.x.clone()
        with torch.cuda.graph(captured):
            out = run()
        for seed in range(3):
            layer.x.copy_(Layer.random(layer.case, layer.x.dtype, device, 100 + seed).x)
            captured.replay()
            if not torch.equal(out, run()):
                wrong.append(f"{layer.case.name}, input {seed}")
        layer.x.copy_(kept)
    return {"ok": not wrong, "wrong": wrong}


def tokens_apart(subjects: list[Subject], device: str) -> dict:
    """A token's output does not depend on the others: NaN in one changes that one alone."""
    wrong = []
    for layer, run in subjects:
        m = layer.case.M
        if m < 2:
            continue
        whole, kept = run(), layer.x[m // 2].clone()
        layer.x[m // 2, 3] = torch.nan
        spoiled = run()
        layer.x[m // 2] = kept
        others = torch.arange(m, device=layer.x.device) != m // 2
        if not torch.equal(spoiled[others], whole[others]) or not spoiled[m // 2].isnan().any():
            wrong.append(layer.case.name)
    return {"ok": not wrong, "wrong": wrong}


# ---- the whole linear ----------------------------------------------------------------------------


def streams(subjects: list[Subject], device: str) -> dict:
    """Eight streams with every layer in turn, many times: each result as if it had run alone."""
    if device == "cpu":
        return NO_GPU
    alone = [subject.run() for subject in subjects]
    torch.cuda.synchronize()
    side = [torch.cuda.Stream() for _ in range(8)]
    results = []
    for turn in range(10):
        for i, stream in enumerate(side):
            with torch.cuda.stream(stream):
                which = (i + turn) % len(subjects)
                results.append((which, subjects[which].run()))
    torch.cuda.synchronize()
    wrong = sum(not torch.equal(found, alone[i]) for i, found in results)
    return {"ok": wrong == 0, "wrong": wrong, "calls": len(results)}


def refusals(subjects: list[Subject], device: str) -> dict:
    """Wrong arguments raise, and the next right call gives what it gave before."""
    layer, accepted = subjects[0].layer, []
    before, p = layer.linear(), layer.parameters
    spoiled = {
        "short scales": p | {"weight_scale": p["weight_scale"][:-1]},
        "short bias": p | {"bias": p["bias"][:-1]},
        "another K": p | {"weight": p["weight"][:, :-32].contiguous()},
    }
    if device == "cuda":
        spoiled["weight on the CPU"] = p | {"weight": p["weight"].cpu()}
    for name, parameters in spoiled.items():
        try:
            ops.linear_w4a4(layer.x, **parameters)
            accepted.append(name)
        except (ValueError, RuntimeError):
            continue
    same = torch.equal(before, layer.linear())
    return {"ok": same and not accepted, "accepted": accepted, "same_after": same}


def without_memory_of_its_own(subjects: list[Subject], device: str) -> dict:
    """A call takes its memory from torch: what torch counts before and after is the result
    alone.
    """
    if device == "cpu":
        return NO_GPU
    outside = []
    for _, run in subjects:
        run()
        torch.cuda.synchronize()
        free, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()
        out = run()
        torch.cuda.synchronize()
        taken = free - torch.cuda.mem_get_info()[0]
        outside.append(taken - (torch.cuda.memory_reserved() - held))
        del out
    return {"ok": max(outside) == 0, "bytes_outside_torch": max(outside)}


def compiled(subjects: list[Subject], device: str) -> dict:
    """torch.compile sees one opaque node: the whole function is one graph, with the same bits."""
    layer = subjects[2].layer
    run = torch.compile(
        lambda x: ops.linear_w4a4(x, **layer.parameters, **options(layer.case)),
        fullgraph=True,
        backend="aot_eager",
    )
    return {"ok": torch.equal(run(layer.x), layer.linear())}


def modulation(subjects: list[Subject], device: str) -> dict:
    """The weight-only op: the same bits every time."""
    k, n = (256, 256) if device == "cpu" else (3072, 9216)
    p = make_w4a16(Case("modulation", 1, k, n), torch.bfloat16, device=device)
    x = torch.randn(1, k, device=device).bfloat16()
    first = ops.linear_w4a16(x, **p)
    return {"ok": all(torch.equal(first, ops.linear_w4a16(x, **p)) for _ in range(20))}


Check = Callable[[list[Subject], str], dict]
BY_ROUTE: dict[str, Check] = {
    "same bits every time": repeats,
    "CUDA graph": graph,
    "tokens apart": tokens_apart,
}
WHOLE: dict[str, Check] = BY_ROUTE | {
    "many streams": streams,
    "refusals": refusals,
    "no memory of its own": without_memory_of_its_own,
    "modulation": modulation,
    "torch.compile": compiled,
}


def run(remote: Remote, device: str, dry: bool, alive: list[int]) -> None:
    made, failed = layers(device, dry), []
    whole = [Subject(layer, layer.linear) for layer in made]
    todo = [("linear_w4a4", name, check, whole) for name, check in WHOLE.items()]
    for route in alive:
        subjects = by_route(made, route)
        todo += [(f"route {route}", name, check, subjects) for name, check in BY_ROUTE.items()]
    for what, name, check, subjects in todo:
        if remote.late():
            return
        facts = {"what": what, "check": name}
        with torch.inference_mode():
            found = row(facts, lambda check=check, subjects=subjects: check(subjects, device))
        remote.add(found)
        if not found["ok"]:
            failed.append(f"{what}: {name}")
        remote.set(failed=failed)
