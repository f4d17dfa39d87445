"""One product by each route under `ncu`, where the tool is there and may count: time, matrix unit,
caches, memory. `python counters.py [--routes N ...]` is the program that the tool watches.
"""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path

METRICS = {
    "gpu__time_duration.sum": "time",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "matrix_unit_percent",
    "sm__issue_active.avg.pct_of_peak_sustained_active": "issue_percent",
    "lts__t_bytes.sum.per_second": "cache",
    "lts__t_sectors.avg.pct_of_peak_sustained_elapsed": "cache_percent",
    "dram__bytes.sum.per_second": "memory",
}
KERNELS = "regex:gemm_kernel|gemm_w4a4|quantize_down_kernel"
SIZE = (4608, 3072, 9216)


def exercise(device: str, numbers: list[int], dry: bool) -> None:
    import torch

    from bench.gpu.layer import Layer, Steps
    from bench.gpu.products import flux_case

    case = flux_case(*SIZE)
    layer = Layer.random(case.scaled(0.02) if dry else case, torch.bfloat16, device)
    with torch.inference_mode():
        for number in numbers:
            steps = Steps(layer, number)
            steps.both()
    if device == "cuda":
        torch.cuda.synchronize()


def rows_of(text: str) -> list[dict]:
    """ncu's table of values (--csv) as a row a launch, with the units that it chose."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict] = {}
    for entry in csv.DictReader(lines[start:]):
        launch = found.setdefault(entry["ID"], {"kernel": entry["Kernel Name"][:90]})
        name = METRICS.get(entry["Metric Name"])
        if name is not None:
            launch[name] = f"{entry['Metric Value']} {entry['Metric Unit']}".strip()
    return list(found.values())


def run(remote, device: str, dry: bool, numbers: list[int]) -> None:
    program = [sys.executable, str(Path(__file__).resolve()), device, *map(str, numbers)]
    if dry:
        program.append("--dry")
    tool = shutil.which("ncu")
    if tool is None and not dry:
        remote.set(absent="ncu is not on PATH")
        return
    options = ["--csv", "--clock-control", "none", "--kernel-name", KERNELS]
    command = program if dry else [tool, *options, "--metrics", ",".join(METRICS), *program]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=remote.left() - 1)
    except subprocess.TimeoutExpired:
        remote.set(absent="out of time")
        return
    for row in rows_of(ended.stdout):
        remote.add(row)
    if ended.returncode or "ERR_NVGPUCTRPERM" in ended.stdout + ended.stderr:
        words = (ended.stderr or ended.stdout).strip().splitlines()[-1:]
        remote.set(absent=f"ended with code {ended.returncode}: {' '.join(words)}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "support"))
    import checkout  # noqa: F401
    from bench.gpu import start

    dry = "--dry" in sys.argv
    start.ready(sys.argv[1], dry)
    exercise(sys.argv[1], [int(word) for word in sys.argv[2:] if word.isdigit()], dry)
