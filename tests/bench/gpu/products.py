"""The product and the quantizer alone, by every route that is alive, on FLUX.1's six layers: 4608
tokens first, then 512 and 256, and a rank of 160 (a LoRA attached).

What ptxas makes of int4 products on a GPU without them takes milliseconds: such routes are timed at
256 tokens only.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from bench.gpu import timing
from bench.gpu.isolate import Remote
from bench.gpu.layer import Layer, Steps
from bench.gpu.smoke import row
from bench.timer import geometric_mean
from cases import Case
from nibble.kernels.backends.cubins.kernels import CODES

SHAPES = [(3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (3072, 21504), (15360, 3072)]
SIZES = [(4608, 32), (512, 32), (256, 32), (4608, 160)]
"""(tokens, rank)."""
EMULATED_TOKENS = 256
LAPS, MOST_SETS = 5, 4
IN_8_BITS = (3, 4)
"""Routes that are timed with activations of 8 bits as well: `wgmma` and `mma.sync` on bytes."""
DENSE = "torch bfloat16"


class Plan(NamedTuple):
    """emulated: routes whose instructions this GPU does not have."""

    device: str
    dry: bool
    routes: dict[int, str]
    emulated: list[int]
    ceilings: dict


def flux_case(m: int, k: int, n: int, rank: int = 32) -> Case:
    return Case(f"{k}x{n}", m, k, n, R=rank, act_unsigned=k == 12288)


def emulated(routes: dict[int, str], capability: int) -> list[int]:
    """Routes that a GPU has no instructions for: int4 from compute capability 9.0 on."""
    return [number for number in routes if capability >= 90 and str(number)[0] in "12"]


def sets_of(case: Case, device: str) -> list[Layer]:
    count = timing.copies(case.K * case.N // 2 + case.M * case.K * 2, device, MOST_SETS)
    return [Layer.random(case, torch.bfloat16, device, seed) for seed in range(count)]


def _wanted(routes: dict[int, str]) -> Iterator[tuple[int, int, str]]:
    """(route, bits of the activations, name) of what is timed."""
    for number, name in routes.items():
        yield number, 4, name
        if number in IN_8_BITS:
            yield number, 8, f"{name}, activations of 8 bits"


def calls_of(sets: list[Layer], routes: dict[int, str]) -> tuple[dict, dict, dict]:
    """({name: calls}, {route's name: why not}, {quantizer's name: bytes that it moves})."""
    dense = [torch.randn_like(sets[0].x[:1].expand(one.case.N, -1)) for one in sets]
    pairs = zip(sets, dense, strict=True)
    calls = {DENSE: [functools.partial(torch.mm, one.x, w.t()) for one, w in pairs]}
    refused, moved = {}, {}
    for number, bits, name in _wanted(routes):
        try:
            steps = [Steps(one, number, bits) for one in sets]
            for one in steps:
                one.both()
        # a route that is not made for this shape says so
        except (ValueError, RuntimeError) as error:
            refused[name] = str(error).splitlines()[0]
            continue
        calls[name] = [one.product for one in steps]
        quantizer = f"quantize_down, {CODES[steps[0].codes]}"
        if quantizer not in calls:
            calls[quantizer] = [one.quantize for one in steps]
            moved[quantizer] = steps[0].quantize_bytes
    return calls, refused, moved


def _ceiling(name: str, ceilings: dict) -> float:
    """TOP/s that the unit of a route was measured to reach; 0 where it was not."""
    unit = "fp8 e4m3" if name.startswith("sm90") else "mma.sync s8"
    return ceilings.get("tops", {}).get(unit, 0.0)


def measure(case: Case, plan: Plan) -> dict:
    """One layer: TOP/s of each route, GB/s of each quantizer, and torch's own product."""
    small = case.M <= EMULATED_TOKENS
    routes = {n: w for n, w in plan.routes.items() if small or n not in plan.emulated}
    calls, refused, moved = calls_of(sets_of(case, plan.device), routes)
    timings, failed = timing.take_turns(calls, plan.device, LAPS)
    work = 2e-9 * case.M * case.N * case.K
    names = [name for _, _, name in _wanted(routes) if name in timings]
    tops = {name: work / timings[name]["ms"] for name in names}
    found = {
        "tops": tops,
        "gb_s": {name: b / timings[name]["ms"] / 1e6 for name, b in moved.items()},
        "timings": timings,
        "refused": refused | failed,
        "of_ceiling": {
            name: rate / _ceiling(name, plan.ceilings)
            for name, rate in tops.items()
            if _ceiling(name, plan.ceilings)
        },
    }
    if of_4_bits := [name for name in routes.values() if name in tops]:
        fastest = max(of_4_bits, key=lambda name: tops[name])
        dense = timings[DENSE]["ms"] / timings[fastest]["ms"]
        found |= {"fastest": fastest, "product_times_torch": dense}
    return found


def summary(rows: list[dict]) -> dict:
    """By tokens and rank: the geometric mean over the layers of each route's TOP/s and each
    quantizer's GB/s.
    """
    found: dict[str, dict] = {}
    for r in rows:
        if "tops" in r:
            size = found.setdefault(f"M={r['M']}, R={r['R']}", {})
            for name, value in (r["tops"] | r["gb_s"]).items():
                size.setdefault(name, []).append(value)
    return {
        size: {name: geometric_mean(values) for name, values in of.items()}
        for size, of in found.items()
    }


def cases(dry: bool) -> Iterator[Case]:
    for m, rank in SIZES[2:3] if dry else SIZES:
        for k, n in SHAPES[2:4] if dry else SHAPES:
            case = flux_case(m, k, n, rank)
            yield case.scaled(0.02) if dry else case


def run(remote: Remote, plan: Plan) -> None:
    for case in cases(plan.dry):
        if remote.late():
            return
        sizes = {"case": case.name} | {name: getattr(case, name) for name in "MKNR"}
        remote.add(row(sizes | {"ok": True}, lambda case=case: measure(case, plan)))
        remote.set(summary=summary(remote.rows))
        if plan.device == "cuda":
            torch.cuda.empty_cache()
