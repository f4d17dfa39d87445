"""compute-sanitizer's memcheck over every op at small shapes and by every route that is alive,
where the tool is on PATH. `python sanitize.py DEVICE ROUTE...` is the program that it watches.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path


def exercise(device: str, numbers: list[int]) -> None:
    """Every op, at shapes with ragged edges."""
    import torch

    from bench.gpu.layer import Layer, Steps, in_order
    from cases import SMALL, VQ_LAYOUTS, Case, make_vq, make_w4a8, make_w4a16, options
    from nibble.kernels import ops

    extra = [
        Case("tile", 129, 256, 136, R=32),
        Case("rank", 65, 128, 128, R=80),
        Case("unsigned", 200, 192, 192, R=16, act_unsigned=True),
    ]
    bf16 = torch.bfloat16
    with torch.inference_mode():
        for case in [*SMALL[2:4], SMALL[7], *extra]:
            layer = Layer.random(case, bf16, device)
            p, second = layer.parameters, Case("second", case.M, case.N, 64, R=8, act_unsigned=True)
            layer.linear()
            for number in numbers:
                Steps(layer, number).both()
            if case.N % 64 == 0:
                p2 = Layer.random(second, bf16, device).parameters
                mlp = in_order(p), in_order(p2)
                ops.mlp_w4a4(layer.x, *mlp, **options(case), act_unsigned2=True)
            for tokens in (1, case.M, 40):
                x = torch.randn(tokens, case.K, device=device).bfloat16()
                ops.linear_w4a16(x, **make_w4a16(case, bf16, device=device))
            w4a8 = make_w4a8(case, bf16, device=device)
            ops.linear_w4a8(layer.x, **w4a8, rotation=case.rotation)
            for layout in VQ_LAYOUTS.values():
                ops.linear_vq(layer.x, **make_vq(case, *layout, bf16, device=device))
    if device == "cuda":
        torch.cuda.synchronize()


def run(remote, device: str, dry: bool, numbers: list[int]) -> None:
    """One row: errors that the tool counted, and its words."""
    program = [sys.executable, str(Path(__file__).resolve()), device, *map(str, numbers)]
    tool = shutil.which("compute-sanitizer")
    if tool is None and not dry:
        remote.set(absent="compute-sanitizer is not on PATH")
        return
    # Our kernels alone, for time.
    only = ["--kernel-name", "kernel_substring=nibble", "--print-limit", "20"]
    watched = [tool, "--tool", "memcheck", *only, "--error-exitcode", "9", *program]
    # Without torch's cache every tensor is an allocation of its own, so that a step past its end
    # is seen.
    surroundings = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        ended = subprocess.run(
            [*program, "--dry"] if dry else watched,
            capture_output=True,
            text=True,
            timeout=remote.left() - 1,
            env=surroundings,
        )
    except subprocess.TimeoutExpired:
        remote.set(absent="out of time")
        return
    lines = (ended.stdout + ended.stderr).strip().splitlines()
    row = {"tool": "memcheck", "ok": ended.returncode == 0, "last": lines[-1] if lines else ""}
    remote.add(row | {"words": {"all": lines[:40]} if ended.returncode else {}})


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
    import checkout  # noqa: F401
    from bench.gpu import start

    start.ready(sys.argv[1], "--dry" in sys.argv)
    exercise(sys.argv[1], [int(word) for word in sys.argv[2:] if word.isdigit()])
