"""Our linears beside torch's, comfy-kitchen's and GGUF's on a CPU, at the full size of FLUX.1's
layers: `python -m nibble bench ops`.

Every candidate takes its turn in every round, so what counts are the ratios within one run. For a
GPU: bench_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import machine, peers, timer
from cases import FLUX_MODULATION, Case, make_input, make_w4a4, make_w4a8, make_w4a16, options
from compare import relative_error
from nibble.kernels import ops, reference, which

SHAPES = [(3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (3072, 21504), (15360, 3072)]
"""(K, N) of FLUX.1's linears: attention output, q/k/v, the MLP's two layers, a single block's first
and second.
"""

OURS, PLAIN, LOWRANK_FREE = "nibble", "nibble reference (plain torch)", "nibble at rank 0"
EIGHT, W4A8 = "nibble, activations of 8 bits", "nibble W4A8"
MANY = 10**9
GOALS = [
    ("torch bfloat16", 1.6, 0, MANY),
    ("torch int8 dynamic", 0.9, 0, 255),
    ("torch int8 dynamic", 1.0, 256, MANY),
    ("comfy_kitchen svdquant eager", 10.0, 0, 256),
]
"""(peer, at least so many times as fast, from so many tokens, to so many)."""
ONE_TOKEN_GOAL = ("torch int4 weights, bfloat16", 1.0)


def flux_case(m: int, k: int, n: int, rank: int = 32) -> Case:
    """One of FLUX.1's layers; 12288 inputs come out of a GELU."""
    return Case(f"{k}x{n}", m, k, n, R=rank, act_unsigned=k == 12288)


def w4a4_row(
    case: Case, dtype: torch.dtype, chosen: argparse.Namespace, slow: dict[str, float]
) -> dict:
    """All candidates on one shape. slow: peer -> seconds a billion operations took it at this M, to
    leave out what would take too long.
    """
    x, p, finer = make_input(case, dtype), make_w4a4(case, dtype), make_w4a8(case, dtype)
    no_rank = p | {
        "proj_down": p["proj_down"][:, :0].contiguous(),
        "proj_up": p["proj_up"][:, :0].contiguous(),
    }
    calls = {
        OURS: lambda: ops.linear_w4a4(x, **p, **options(case)),
        LOWRANK_FREE: lambda: ops.linear_w4a4(x, **no_rank, **options(case)),
        PLAIN: lambda: reference.linear_w4a4(x, **p, **options(case)),
        EIGHT: lambda: ops.linear_w4a4(x, **p, **options(case), act_bits=8),
        W4A8: lambda: ops.linear_w4a8(x, **finer),
    }
    work = 2e-9 * case.M * case.K * case.N
    late = {
        name: f"{slow[name] * work:.0f} s a call expected, more than {chosen.longest:g}"
        for name in slow
        if slow[name] * work > chosen.longest
    }
    others, absent = peers.available(
        {name: peers.CPU_PEERS[name] for name in chosen.peers if name not in late}, case, x, p
    )
    timings = timer.side_by_side(calls | others, "cpu", chosen.rounds, chosen.seconds, absent)
    for name, timing in timings.items():
        slow[name] = timing["ms"] / 1e3 / work
    # The difference from plain torch is not the bound of a test; it shows that what was timed
    # computed the layer.
    difference = relative_error(calls[OURS](), calls[PLAIN]())
    return row_of("linear_w4a4", case, timings, absent | late) | {
        "gops": work / timings[OURS]["ms"] * 1e3,
        "difference": difference,
        "steps": step_timings(x, p, case, chosen),
    }


def step_timings(x: torch.Tensor, p: dict, case: Case, chosen: argparse.Namespace) -> dict:
    """The two halves of our linear, each alone."""
    q, ascales, h = ops.quantize_down(x, p["smooth_factor"], p["proj_down"], **options(case))
    product = (p["weight"], p["weight_scale"], p["proj_up"], p["bias"], case.act_unsigned, x.dtype)
    return timer.side_by_side(
        {
            "quantize_down": lambda: ops.quantize_down(
                x, p["smooth_factor"], p["proj_down"], **options(case)
            ),
            "gemm_w4a4_up": lambda: ops.gemm_w4a4_up(q, ascales, h, *product),
        },
        "cpu",
        chosen.rounds,
        chosen.seconds,
    )


def w4a16_row(case: Case, dtype: torch.dtype, chosen: argparse.Namespace) -> dict:
    """Modulation: one token."""
    x, p = make_input(case, dtype), make_w4a16(case, dtype)
    calls = {OURS: lambda: ops.linear_w4a16(x, **p), PLAIN: lambda: reference.gemv_w4a16(x, **p)}
    wanted = {
        name: peers.CPU_PEERS[name]
        for name in (
            "torch bfloat16",
            "torch float32",
            "torch int4 weights, bfloat16",
            "decode Q4_K, then bfloat16 (as GGUF)",
        )
    }
    others, absent = peers.available(
        wanted | {"comfy_kitchen gemv eager": peers.kitchen_gemv("eager")}, case, x, p
    )
    return row_of(
        "linear_w4a16",
        case,
        timer.side_by_side(calls | others, "cpu", chosen.rounds, chosen.seconds, absent),
        absent,
    )


def row_of(op: str, case: Case, timings: dict, absent: dict[str, str]) -> dict:
    """One row of the result, printed as it comes: fastest first."""
    ranking = sorted(timings, key=lambda name: timings[name]["ms"])
    print(
        f"{op} {case.name} M={case.M}: "
        + "; ".join(f"{name} {timings[name]['ms']:.1f} ms" for name in ranking),
        flush=True,
    )
    return {
        "op": op,
        "case": case.name,
        **{letter: getattr(case, letter) for letter in "MKNR"},
        **options(case),
        "fastest": ranking[0],
        "timings": timings,
        "absent": absent,
    }


# ---- what the rows say ---------------------------------------------------------------------------


def times_as_fast(rows: list[dict]) -> dict:
    """By peer: geometric mean over the rows of how many times as fast ours is, and the least."""
    names = dict.fromkeys(name for row in rows for name in row["timings"] if name != OURS)
    times = {
        name: [row["timings"][name]["times_baseline"] for row in rows if name in row["timings"]]
        for name in names
    }
    return {
        name: {"mean": timer.geometric_mean(values), "least": min(values), "shapes": len(values)}
        for name, values in times.items()
    }


def summary(rows: list[dict], ceilings: dict) -> dict:
    """By number of tokens: geometric mean over the shapes of how many times as fast ours is, and
    the share of the CPU's ceilings.
    """
    found = {}
    for m in sorted({row["M"] for row in rows if row["op"] == "linear_w4a4"}):
        chosen = [row for row in rows if row["M"] == m and row["op"] == "linear_w4a4"]
        gops = timer.geometric_mean([row["gops"] for row in chosen])
        found[str(m)] = {
            "times_as_fast_as": times_as_fast(chosen),
            "ours_fastest_in": sum(row["fastest"] in (OURS, LOWRANK_FREE) for row in chosen),
            "shapes": len(chosen),
            "gops": gops,
            "share_of": {
                name: gops / ceiling["gops"]
                for name, ceiling in ceilings.items()
                if "gops" in ceiling
            },
        }
    return found


def goal(peer: str, tokens: int, least: float, measured: float) -> dict:
    return {
        "peer": peer,
        "tokens": tokens,
        "goal": least,
        "measured": measured,
        "met": measured >= least,
    }


def goals(by_tokens: dict, one_token: dict) -> list[dict]:
    """Each goal at each number of tokens, met or not."""
    found = [
        goal(peer, int(m), least, found["times_as_fast_as"][peer]["mean"])
        for peer, least, first, last in GOALS
        for m, found in by_tokens.items()
        if first <= int(m) <= last and peer in found["times_as_fast_as"]
    ]
    peer, least = ONE_TOKEN_GOAL
    if peer in one_token:
        found.append(goal(peer, 1, least, one_token[peer]["mean"]))
    return found


def print_summary(result: dict) -> None:
    """The honest table: who is faster, and by how much."""
    print("\ntimes as fast as the peer, geometric mean over the layers (above 1: nibble is faster)")
    by_tokens = result["summary"]
    names = dict.fromkeys(
        name for found in by_tokens.values() for name in found["times_as_fast_as"]
    )
    print(f"{'':40}" + "".join(f"{'M=' + m:>10}" for m in by_tokens))
    for name in names:
        values = (found["times_as_fast_as"].get(name) for found in by_tokens.values())
        print(
            f"{name:40}"
            + "".join(f"{value['mean']:10.2f}" if value else f"{'-':>10}" for value in values)
        )
    for name in next(iter(by_tokens.values()))["share_of"] if by_tokens else ():
        print(
            f"{'share of: ' + name:40}"
            + "".join(f"{100 * found['share_of'][name]:9.0f}%" for found in by_tokens.values())
        )
    for name, value in result["one_token"].items():
        print(f"{'one token, 4-bit weights: ' + name:63}{value['mean']:7.2f}")
    for wanted in result["goals"]:
        print(
            f"goal: {wanted['goal']:g} x {wanted['peer']} at M={wanted['tokens']}:"
            f" {wanted['measured']:.2f}, {'met' if wanted['met'] else 'NOT met'}"
        )


def save(result: dict, rows: list[dict], start: float, out: Path) -> None:
    """Everything so far: a run that is ended early keeps its rows."""
    result["environment"]["load_average_after"] = (
        os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    )
    result["summary"] = summary(rows, result["ceilings"])
    result["one_token"] = times_as_fast([row for row in rows if row["op"] == "linear_w4a16"])
    result |= {
        "goals": goals(result["summary"], result["one_token"]),
        "rows": rows,
        "seconds": time.perf_counter() - start,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "results" / "ops-cpu.json",
        help="JSON file to write",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny layers and few rounds: a smoke test, not a measurement",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--seconds",
        type=float,
        default=2.5,
        help="for one candidate on one layer; a slower one gets fewer rounds, at least one",
    )
    parser.add_argument(
        "--longest",
        type=float,
        default=20.0,
        help="leave out a candidate whose one call would take more seconds",
    )
    parser.add_argument("--peers", nargs="*", default=list(peers.CPU_PEERS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.tokens, chosen.rounds = [5], 2
    return chosen


def main(arguments: list[str] | None = None) -> None:
    chosen, start = parse(arguments), time.perf_counter()
    # said explicitly, torch 2.13 computes batched solves wrongly: `bench all` quantizes after this
    if chosen.threads != torch.get_num_threads():
        torch.set_num_threads(chosen.threads)
    dtype, rows = getattr(torch, chosen.dtype), []
    backends = {
        op: dict(zip(("backend", "reason"), which(op, "cpu", dtype, (m, 3072, 3072)), strict=True))
        for op, m in (("linear_w4a4", 256), ("linear_w4a8", 256), ("linear_w4a16", 1))
    }
    result = {
        "environment": machine.describe_cpu(),
        "dtype": chosen.dtype,
        "backends": backends,
        "ceilings": machine.cpu_ceilings(),
    }
    for m in chosen.tokens:
        slow: dict[str, float] = {}
        for k, n in SHAPES:
            case = flux_case(m, k, n)
            rows.append(w4a4_row(case.scaled(0.02) if chosen.quick else case, dtype, chosen, slow))
            save(result, rows, start, chosen.out)
    for case in FLUX_MODULATION:
        rows.append(w4a16_row(case.scaled(0.02) if chosen.quick else case, dtype, chosen))
    save(result, rows, start, chosen.out)
    print_summary(result)
    print(f"{result['seconds']:.0f} s; written to {chosen.out}")


if __name__ == "__main__":
    main()
