"""Which routes are alive: every op by every route at three shapes, each in a process of its own
with 20 seconds. One that is wrong, crashes or hangs is dead, and nothing else starts it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from bench.gpu import checks, floats, levels
from bench.gpu.isolate import Job, Remote
from bench.gpu.layer import Layer, routes
from cases import SMALL, VQ_LAYOUTS, Case

SECONDS = 20
RAGGED = Case("ragged", 77, 192, 128, R=16, act_unsigned=True)
WIDE = Case("wide", 300, 3072, 9216, R=32)
MODULATION = [Case("one_token", 1, 3072, 9216), Case("text", 77, 3072, 3072)]
BF16 = torch.bfloat16
WGMMA = (3, 3001, 3002, 3003)
"""Hopper's own product: the GPU's choice among its tiles needs all of them."""


def shapes(dry: bool) -> list[Case]:
    return [SMALL[0], RAGGED, replace(WIDE.scaled(0.05), N=128) if dry else WIDE]


def row(facts: dict, check: Callable[[], dict]) -> dict:
    """A check as a row; what it raises is one, too."""
    try:
        return facts | check()
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        return facts | {"ok": False, "error_message": words}


def _try(remote: Remote, facts: dict, check: Callable, cases: list[Case], device: str) -> None:
    for case in cases:
        layer = Layer.random(case, BF16, device)
        sizes = {"case": case.name, "M": case.M, "K": case.K, "N": case.N}
        remote.add(
            row(facts | sizes, lambda layer=layer: check(checks.Exact(layer), facts["route"]))
        )


def _by_route(check: Callable, facts: dict, device: str, dry: bool) -> Callable[[Remote], None]:
    return functools.partial(_try, facts=facts, check=check, cases=shapes(dry), device=device)


def route_jobs(device: str, dry: bool, known: dict[str, dict[int, str]]) -> list[Job]:
    """A job for each op and route that can be forced. known: op -> its routes."""
    jobs = []
    for op, check in (
        ("quantize_down", checks.quantizer),
        ("gemm_w4a4_up", checks.product),
        ("gemm_w4a4_up_gelu_quantize_down", checks.fused),
    ):
        for number, name in known[op].items():
            facts = {"op": op, "route": number, "name": name}
            work = _by_route(check, facts, device, dry)
            jobs.append(Job(f"{op} {number}", work, SECONDS))
    return jobs


def known_routes(device: str) -> dict[str, dict[int, str]]:
    """Op -> number -> name. quantize_down has a form of codes for each path, so the paths are
    its routes.
    """
    product = routes("gemm_w4a4_up", device) or {0: "chosen"}
    fused = routes("gemm_w4a4_up_gelu_quantize_down", device) or {0: "chosen"}
    paths = {3: "8-bit floats", 4: "packed", 2: "packed", 1: "packed"}
    found = [number for number in paths if number in product] or [0]
    forms = {number: paths.get(number, "chosen") for number in found}
    seen = set()
    quantizer = {n: w for n, w in forms.items() if not (w in seen or seen.add(w))}
    op = "gemm_w4a4_up_gelu_quantize_down"
    return {"quantize_down": quantizer, "gemm_w4a4_up": product, op: fused}


def live(states: dict[str, str], rows: list[dict], op: str = "gemm_w4a4_up") -> list[int]:
    """Routes of an op whose job finished with every row right."""
    wrong = {(r["op"], r["route"]) for r in rows if not r["ok"]}
    found = []
    for name, state in states.items():
        of, _, number = name.rpartition(" ")
        if of == op and state == "finished" and (op, int(number)) not in wrong:
            found.append(int(number))
    return found


def dead(states: dict[str, str], rows: list[dict]) -> dict[str, str]:
    """Op and route -> why it is not used: how its process ended, or the first wrong row."""
    found = {name: state for name, state in states.items() if state != "finished"}
    for r in rows:
        if not r["ok"]:
            known = {"op", "route", "name", "ok"}
            words = r.get("error_message") or str({k: v for k, v in r.items() if k not in known})
            found.setdefault(f"{r['op']} {r['route']}", words)
    return found


def default_route(alive: list[int], known: dict[int, str]) -> int:
    """What whole linears use: the GPU's own choice where all that it may choose is alive, else the
    first that is. Raises RuntimeError where none is.
    """
    own = [number for number in WGMMA if number in known]
    if not own:
        own = [max((number for number in known if number < 10), default=0)]
    if set(own) <= set(alive):
        return 0
    order = [*WGMMA[1:], 4, *(4000 + rows for rows in (64, 128, 32)), 2, 1]
    for number in [*order, *alive]:
        if number in alive:
            return number
    raise RuntimeError("no route of the product is alive")


# ---- whole linears and the other families --------------------------------------------------------


def _linears(remote: Remote, name: str, device: str, dry: bool) -> None:
    check = {"linear_w4a4": checks.linear, "mlp_w4a4": checks.mlp}.get(name, checks.grouped)
    _try(remote, {"op": name, "route": 0}, lambda exact, route: check(exact), shapes(dry), device)


def _others(remote: Remote, name: str, device: str, dry: bool) -> None:
    facts = {"op": name, "route": 0}
    for case in MODULATION:
        case = case.scaled(0.05) if dry else case
        sizes = facts | {"case": case.name}
        if name == "linear_w4a16":
            remote.add(row(sizes, lambda case=case: checks.w4a16(case, BF16, device)))
            continue
        for layout in VQ_LAYOUTS.values():
            check = functools.partial(checks.codebook, case, layout, BF16, device)
            remote.add(row(sizes, check))


def _ways(remote: Remote, name: str, device: str, dry: bool) -> None:
    """Each way of an op that has several, at each shape."""
    check = floats.check if name == "linear_nvfp4" else levels.check
    for case in shapes(dry):
        facts = {"op": name, "route": 0, "case": case.name}
        try:
            found = check(case, BF16, device)
        except Exception as error:
            words = f"{type(error).__name__}: {error}".splitlines()[0]
            found = [{"ok": False, "error_message": words}]
        for each in found:
            remote.add(facts | each)


def linear_jobs(device: str, dry: bool) -> list[Job]:
    """A job for each op that has no routes, or takes the default one."""
    found = []
    for name in ("linear_w4a4", "mlp_w4a4", "linear_w4a4_grouped", "linear_w4a16", "linear_vq"):
        how = _others if name in ("linear_w4a16", "linear_vq") else _linears
        work = functools.partial(how, name=name, device=device, dry=dry)
        found.append(Job(name, work, SECONDS))
    for name in (levels.OP, "linear_nvfp4"):
        work = functools.partial(_ways, name=name, device=device, dry=dry)
        found.append(Job(name, work, 2 * SECONDS))
    return found
