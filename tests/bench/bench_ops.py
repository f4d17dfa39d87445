"""Our linears beside torch's and comfy-kitchen's, on the layers of FLUX: `python tests/bench/bench_ops.py --out FILE [--quick]`.

Layers are scaled down by --scale (in M, K and N) where there is no GPU; what counts are ratios within one run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import linear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "nibble" not in sys.modules:
    import conftest  # noqa: F401  loads the checkout as `nibble`

from bench.timer import side_by_side  # noqa: E402
from nibble.kernels import ops, reference, which  # noqa: E402

from cases import FLUX, FLUX_MODULATION, Case, make_input, make_w4a4, make_w4a16, options  # noqa: E402

try:
    import comfy_kitchen
except ImportError:
    comfy_kitchen = None

Candidates = dict[str, Callable[[], object]]


def kitchen_w4a4(x, p, unsigned: bool):
    """What comfy-kitchen's layout runs for one linear."""
    q, scales, h = comfy_kitchen.quantize_svdquant_w4a4(
        x + reference.SHIFT if unsigned else x, smooth=p["smooth_factor"], lora_down=p["proj_down"], act_unsigned=unsigned, lora_x=x
    )
    return comfy_kitchen.scaled_mm_svdquant_w4a4(q, p["weight"], scales, p["weight_scale"], h, p["proj_up"], p["bias"], unsigned)


def dense_candidates(x, case: Case, dtype: torch.dtype, device: str) -> Candidates:
    """F.linear in the model's dtype, and in float32 where that is what a user might choose instead."""
    dense = (x, torch.randn(case.N, case.K, device=device), torch.randn(case.N, device=device))
    dtypes = dict.fromkeys([dtype, *([torch.float32] if device == "cpu" else [])])
    return {f"torch {str(other).removeprefix('torch.')}": partial(linear, *[tensor.to(other) for tensor in dense]) for other in dtypes}


def w4a4_candidates(case: Case, dtype: torch.dtype, device: str) -> Candidates:
    """linear_w4a4 first, then what it is compared with; comfy-kitchen has no rotation."""
    x, p = make_input(case, dtype, device=device), make_w4a4(case, dtype, device=device)
    found = {"nibble": lambda: ops.linear_w4a4(x, **p, **options(case))} | dense_candidates(x, case, dtype, device)
    if comfy_kitchen is not None and not case.rotation:
        for backend in ["eager", *(["cuda"] if device == "cuda" else [])]:
            found[f"comfy_kitchen {backend}"] = with_backend(backend, lambda: kitchen_w4a4(x, p, case.act_unsigned))
    return found


def w4a16_candidates(case: Case, dtype: torch.dtype, device: str) -> Candidates:
    """linear_w4a16 first, then what it is compared with."""
    x, p = make_input(case, dtype, device=device), make_w4a16(case, dtype, device=device)
    found = {"nibble": lambda: ops.linear_w4a16(x, **p)} | dense_candidates(x, case, dtype, device)
    if comfy_kitchen is not None:
        for backend in ["eager", *(["cuda"] if device == "cuda" else [])]:
            found[f"comfy_kitchen {backend}"] = with_backend(
                backend, lambda: comfy_kitchen.gemv_awq_w4a16(x, p["weight"], p["weight_scale"], p["weight_zeros"], p["bias"])
            )
    return found


def with_backend(name: str, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with one of comfy-kitchen's backends and no other."""

    def under() -> object:
        with comfy_kitchen.use_backend(name):
            return run()

    return under


def bench(op: str, case: Case, candidates: Candidates, dtype: torch.dtype, device: str, rounds: int) -> dict:
    """One row of the result."""
    backend, reason = which(op, device, dtype)
    timings = side_by_side(candidates, device, rounds)
    shape = {letter: getattr(case, letter) for letter in "MKNR"}
    print(f"{op:13} {case.name:24} M={case.M} K={case.K} N={case.N}  " + "  ".join(
        f"{name} {t['ms']:.2f} ms (x{t['times_baseline']:.2f})" for name, t in timings.items()), flush=True)
    return {"op": op, "case": case.name, **shape, **options(case), "backend": backend, "reason": reason, "timings": timings}


def environment(device: str) -> dict:
    """Where the figures come from."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    kitchen = importlib.metadata.version("comfy-kitchen") if comfy_kitchen is not None else None
    return {"device": device, "name": name, "threads": torch.get_num_threads(), "torch": torch.__version__, "comfy_kitchen": kitchen}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Command line, with defaults that fit the machine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "ops.json", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="smaller layers and fewer rounds: a smoke test, not a measurement")
    parser.add_argument("--scale", type=float, help="factor on M, K and N (default: 1 on a GPU, 0.25 on CPU, 0.05 with --quick)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, help="default: 7, 3 with --quick")
    chosen = parser.parse_args(arguments)
    chosen.scale = chosen.scale or (0.05 if chosen.quick else 1.0 if chosen.device == "cuda" else 0.25)
    chosen.rounds = chosen.rounds or (3 if chosen.quick else 7)
    return chosen


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    dtype, device = getattr(torch, chosen.dtype), chosen.device
    rows = []
    for op, cases, candidates in (("linear_w4a4", FLUX, w4a4_candidates), ("linear_w4a16", FLUX_MODULATION, w4a16_candidates)):
        for case in (case.scaled(chosen.scale) for case in cases):
            rows.append(bench(op, case, candidates(case, dtype, device), dtype, device, chosen.rounds))
    result = {"environment": environment(device), "dtype": chosen.dtype, "scale": chosen.scale, "rounds": chosen.rounds, "rows": rows}
    chosen.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
