"""Codebook linears beside torch's dense ones and beside decoding first, at FLUX.1's layers on a
CPU: `python -m nibble bench vq_ops`.

Every candidate takes its turn in every round, so what counts are the ratios within one run. How far
from the limit: our op looks products with codewords up (kernels/csrc/cpu/vq.inl), which takes (J +
1) / J vector loads for each sub-vector, output and vector of tokens, J being the tables read
together. A core begins as many vector loads a cycle as multiply-adds (two, on Zen 3 and Golden
Cove), so the ceiling is D J / (J + 1) of the measured peak of multiply-adds; `share_of_lookups` is
what we reach of it, tables and unpacking counted as lost. One token is padded to a vector of them
and is measured in bytes of indices a second instead.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import machine, timer
from cases import VQ_LAYOUTS, Case, make_input, make_vq
from compare import relative_error
from nibble.kernels import ops, which
from nibble.kernels.reference import vq as reference_vq

SHAPES = [(3072, 3072), (3072, 12288), (12288, 3072)]
"""(K, N) of FLUX.1's linears: attention output, the MLP's two layers."""
OURS, BRANCH = "nibble gemm_vq", "nibble linear_vq, rank 32, rotated"
TABLES = {(8, 4): 4, (6, 2): 8, (8, 2): 4}
"""Tables read together, of eight tokens each: J."""
PEAK = "float32 multiply-adds, AVX2"


def candidates(case: Case, layout: tuple[int, int], dtype: torch.dtype) -> dict:
    x, p = make_input(case, dtype), make_vq(case, *layout, dtype)
    some = [p[name] for name in ("indices", "codebook", "scale", "bias")]
    coded, bias = some[:3], p["bias"]
    dense = reference_vq.dequantize_vq(*coded)
    dense16, x32, bias32 = dense.to(dtype), x.float(), bias.float()
    return {
        OURS: lambda: ops.gemm_vq(x, *some),
        BRANCH: lambda: ops.linear_vq(x, **p, rotation=64),
        "torch bfloat16": lambda: linear(x, dense16, bias),
        "torch float32": lambda: linear(x32, dense, bias32),
        "decode, then torch bfloat16": lambda: linear(
            x, reference_vq.dequantize_vq(*coded).to(dtype), bias
        ),
        "decode, then torch float32": lambda: linear(
            x32, reference_vq.dequantize_vq(*coded), bias32
        ),
    }


def row_of(
    case: Case,
    name: str,
    layout: tuple[int, int],
    dtype: torch.dtype,
    ceilings: dict,
    chosen: argparse.Namespace,
) -> dict:
    """One shape, printed as it comes."""
    calls = candidates(case, layout, dtype)
    difference = relative_error(calls[OURS](), calls["torch float32"]())
    timings = timer.side_by_side(calls, "cpu", chosen.rounds, chosen.seconds)
    seconds, (bits, vector) = timings[OURS]["ms"] / 1e3, layout
    work, read = case.M * case.K * case.N, case.N * case.K // vector * bits // 8
    row = {
        "op": "gemm_vq",
        "layout": name,
        "bits": bits,
        "vector": vector,
        "case": case.name,
        "M": case.M,
        "K": case.K,
        "N": case.N,
        "timings": timings,
        "difference": difference,
        "index_bytes": read,
        "gb_s": read / seconds / 1e9,
        "gops": 2e-9 * work / seconds,
        "lookups": -(-case.M // 8) * case.N * case.K // vector,
        "branch_and_rotation": timings[BRANCH]["times_baseline"] - 1,
    }
    if case.M >= 8 and "gops" in ceilings.get(PEAK, {}):
        row["share_of_lookups"] = row["gops"] / (
            ceilings[PEAK]["gops"] * vector * TABLES[layout] / (TABLES[layout] + 1)
        )
    print(
        f"{name} {case.name} M={case.M}: "
        + "; ".join(f"{peer} {t['ms']:.1f} ms" for peer, t in timings.items()),
        flush=True,
    )
    return row


def summary(rows: list[dict]) -> dict:
    """By layout and number of tokens: geometric mean over the shapes of how many times as fast ours
    is.
    """
    found: dict[str, dict] = {}
    for name, m in dict.fromkeys((row["layout"], row["M"]) for row in rows):
        chosen = [row for row in rows if (row["layout"], row["M"]) == (name, m)]
        peers = [peer for peer in chosen[0]["timings"] if peer not in (OURS, BRANCH)]
        found.setdefault(name, {})[str(m)] = {
            "times_as_fast_as": {
                peer: timer.geometric_mean(
                    [row["timings"][peer]["times_baseline"] for row in chosen]
                )
                for peer in peers
            },
            "share_of_lookups": timer.geometric_mean(
                [row["share_of_lookups"] for row in chosen if "share_of_lookups" in row]
            ),
            "branch_and_rotation": sum(row["branch_and_rotation"] for row in chosen) / len(chosen),
            "shapes": len(chosen),
        }
    return found


def print_summary(found: dict) -> None:
    print("\ntimes as fast as the peer, geometric mean over the layers (above 1: nibble is faster)")
    for name, by_tokens in found.items():
        print(f"{name:34}" + "".join(f"{'M=' + m:>10}" for m in by_tokens))
        for peer in next(iter(by_tokens.values()))["times_as_fast_as"]:
            print(
                f"  {peer:32}"
                + "".join(f"{of['times_as_fast_as'][peer]:10.2f}" for of in by_tokens.values())
            )
        print(
            f"  {'share of the lookups ceiling':32}"
            + "".join(
                f"{100 * of['share_of_lookups']:9.0f}%" if of["share_of_lookups"] else f"{'-':>10}"
                for of in by_tokens.values()
            )
        )
        print(
            f"  {'branch and rotation cost':32}"
            + "".join(f"{100 * of['branch_and_rotation']:9.0f}%" for of in by_tokens.values())
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "results" / "vq-ops-cpu.json",
        help="JSON file to write",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny layers and few rounds: a smoke test, not a measurement",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 256, 1024])
    parser.add_argument("--layouts", nargs="+", choices=VQ_LAYOUTS, default=["2 bit", "3 bit"])
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="so many of the layers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds",
        type=float,
        default=3.0,
        help="for one candidate on one layer; a slower one gets fewer rounds, at least one",
    )
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.tokens, chosen.rounds, chosen.shapes = [1, 9], 2, 1
    return chosen


def main(arguments: list[str] | None = None) -> None:
    chosen, start, rows, dtype = parse(arguments), time.perf_counter(), [], torch.bfloat16
    result = {
        "environment": machine.describe_cpu(),
        "dtype": "bfloat16",
        "ceilings": machine.cpu_ceilings(),
        "backend": dict(zip(("backend", "reason"), which("gemm_vq", "cpu", dtype), strict=True)),
    }
    for name in chosen.layouts:
        for m in chosen.tokens:
            for k, n in SHAPES[: chosen.shapes]:
                case = Case(f"{k}x{n}", m, k, n, R=32)
                case = Case("quick", m, 64, 300, R=32) if chosen.quick else case
                rows.append(row_of(case, name, VQ_LAYOUTS[name], dtype, result["ceilings"], chosen))
    result["environment"]["load_average_after"] = (
        os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    )
    result |= {"summary": summary(rows), "rows": rows, "seconds": time.perf_counter() - start}
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print_summary(result["summary"])
    print(f"{result['seconds']:.0f} s; written to {chosen.out}")


if __name__ == "__main__":
    main()
