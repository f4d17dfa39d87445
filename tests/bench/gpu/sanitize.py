"""compute-sanitizer over every op at small shapes, where the tool is on PATH: memory errors, races,
reads of what nobody wrote.

`python sanitize.py` is the program that the tool watches; `run` starts the tool on it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def exercise(device: str) -> None:
    """Every op, at shapes with ragged edges and every route that small shapes take."""
    import torch

    from bench.gpu.layer import Layer, Steps, compiled_for, in_order
    from cases import SMALL, Case, make_w4a16, options
    from nibble.kernels import ops

    extra = [
        Case("tile", 129, 256, 136, R=32),
        Case("rank", 65, 128, 128, R=80),
        Case("unsigned", 200, 192, 192, R=16, act_unsigned=True),
    ]
    with torch.inference_mode():
        for case in [*SMALL, *extra]:
            layer = Layer.random(case, torch.bfloat16, device)
            p, second = layer.parameters, Case("second", case.M, case.N, 64, R=8, act_unsigned=True)
            q, ascales, h = ops.quantize_down(
                layer.x, p["smooth_factor"], p["proj_down"], **options(case)
            )
            ops.gemm_w4a4_up(
                q,
                ascales,
                h,
                p["weight"],
                p["weight_scale"],
                p["proj_up"],
                p["bias"],
                case.act_unsigned,
                torch.bfloat16,
            )
            layer.linear()
            if compiled_for(device):
                Steps(layer).both()
            if case.N % 64 == 0:
                p2 = Layer.random(second, torch.bfloat16, device).parameters
                ops.mlp_w4a4(
                    layer.x, in_order(p), in_order(p2), **options(case), act_unsigned2=True
                )
            for tokens in (1, case.M, 40):
                x = torch.randn(tokens, case.K, device=device).bfloat16()
                ops.linear_w4a16(x, **make_w4a16(case, torch.bfloat16, device=device))
    if device == "cuda":
        torch.cuda.synchronize()


def run(report, device: str, dry: bool) -> None:
    """One row a tool: errors that it counted, and its words."""
    program = [sys.executable, str(Path(__file__).resolve()), device]
    tool = shutil.which("compute-sanitizer")
    if tool is None and not dry:
        report.set(absent="compute-sanitizer is not on PATH")
        return
    for name in TOOLS[:1] if dry else TOOLS:
        left = report.deadline - time.perf_counter()
        if report.late() or left < 5:
            break
        # Our kernels alone, for time. initcheck has to see torch's too: what an unwatched kernel
        # writes would count as never written.
        only = [] if name == "initcheck" else ["--kernel-name", "kernel_substring=nibble"]
        command = (
            program
            if dry
            else [
                tool,
                "--tool",
                name,
                *only,
                "--print-limit",
                "20",
                "--error-exitcode",
                "9",
                *program,
            ]
        )
        # Without torch's cache every tensor is an allocation of its own, so that a step past its
        # end is seen.
        surroundings = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            ended = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=None if left == float("inf") else left,
                env=surroundings,
            )
        except subprocess.TimeoutExpired:
            report.add({"tool": name, "ok": None, "why": "out of time"})
            continue
        lines = (ended.stdout + ended.stderr).strip().splitlines()
        report.add(
            {
                "tool": name,
                "ok": ended.returncode == 0,
                "last": lines[-1] if lines else "",
                "words": {"all": lines[:40]} if ended.returncode else {},
            }
        )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
    import checkout  # noqa: F401

    exercise(sys.argv[1] if len(sys.argv) > 1 else "cuda")
