"""Everything worth knowing on a machine with a GPU, in one call: `make gpu OUT=folder`, or `python
tests/bench/bench_gpu.py --out FILE`.

Ceilings of the GPU, every op against its reference, FLUX.1's layers beside other people's kernels,
every path of the router, the whole FLUX.1-dev transformer, graphs and streams, compute-sanitizer.
Each section is a process of its own with its own time limit (an error on a GPU spoils the process
that it happens in), and the file is written after every step. Other people's packages are optional:
what is absent is listed with its reason. `--dry` walks the same code on the CPU at tiny shapes, in
one process.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import machine
from bench.gpu import (
    ceilings,
    correctness,
    layers,
    resources,
    robustness,
    routes,
    sanitize,
    transformer,
)
from bench.gpu.report import Report, read, write
from nibble.kernels import which
from nibble.kernels.backends import native

SECTIONS = {
    "ceilings": 25,
    "correctness": 80,
    "layers": 150,
    "transformer": 90,
    "robustness": 40,
    "routes": 60,
    "sanitizer": 60,
    "resources": 15,
}
"""Seconds of each in a run of 8.7 minutes, in the order of their worth; --minutes scales them."""
OPS = (
    "quantize_down",
    "gemm_w4a4_up",
    "gemm_w4a4_up_gelu_quantize_down",
    "gemv_w4a16",
    "gemm_w4a16",
    "linear_w4a4",
    "linear_w4a4_grouped",
    "mlp_w4a4",
    "linear_w4a16",
    "gemm_vq",
    "linear_vq",
)


def environment(device: str) -> dict:
    """Machine, versions, and what runs each op with its reason."""
    facts = machine.describe_cpu() | {"device": device}
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": gpu.name,
            "capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_gb": gpu.total_memory / 1e9,
            "cuda_of_torch": torch.version.cuda,
            "driver": _driver(),
        }
    module, why = native.module()
    facts["nibble_kernels"] = {"state": why} | (module.build_info() if module is not None else {})
    facts["ops"] = {
        op: dict(zip(("backend", "reason"), which(op, device), strict=True)) for op in OPS
    }
    return facts


def _driver() -> str:
    try:
        found = subprocess.run(
            [
                "nvidia-smi",
                "--query-gpu=driver_version,clocks.max.sm,power.limit",
                "--format=csv,noheader",
            ],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return found.stdout.strip()


def run_section(name: str, out: Path, seconds: float, device: str, dry: bool) -> None:
    """In the section's own process."""
    report = Report(out, name, seconds)
    report.save()
    known = read(out).get("ceilings", {})
    work = {
        "ceilings": ceilings.run,
        "correctness": correctness.run,
        "transformer": transformer.run,
        "robustness": robustness.run,
        "routes": routes.run,
        "sanitizer": sanitize.run,
        "resources": resources.run,
        "layers": lambda *rest: layers.run(*rest, known),
    }[name]
    work(report, device, dry)
    report.set(state="finished")


def start_section(name: str, out: Path, seconds: float) -> None:
    """Runs a section in a fresh process; one that hangs is ended a little after its time, one that
    breaks is noted.
    """
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--section",
        name,
        "--seconds",
        f"{seconds:.0f}",
        "--out",
        str(out),
    ]
    try:
        code = subprocess.run(
            command, timeout=seconds * 1.25 + 20, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        ).returncode
        state = None if code == 0 else f"ended with code {code}"
    except subprocess.TimeoutExpired:
        state = "took too long and was ended"
    if state:
        write(out, name, read(out).get(name, {}) | {"state": state})


def print_summary(whole: dict) -> None:
    """The figures that decide, in few lines: the end of the output is what a reader sees first."""
    print("\n==== summary ====")
    print(
        "ceilings:",
        whole.get("ceilings", {}).get("tops"),
        "TOP/s; copy",
        whole.get("ceilings", {}).get("copy_gb_s"),
        "GB/s",
    )
    checks = whole.get("correctness", {})
    print(f"correctness: {checks.get('failed')} of {checks.get('checks')} failed")
    for row in [row for row in checks.get("rows", []) if not row["ok"]][:20]:
        print("  FAILED", {key: value for key, value in row.items() if key != "ok"})
    for tokens, found in whole.get("layers", {}).get("summary", {}).items():
        print(
            f"layers, M={tokens}:", {key: value for key, value in found.items() if key != "shapes"}
        )
    for name, found in whole.get("transformer", {}).get("summary", {}).items():
        print(f"transformer, {name}:", found)
    print("robustness, failed:", whole.get("robustness", {}).get("failed"))
    for row in whole.get("sanitizer", {}).get("rows", []):
        print("sanitizer:", row["tool"], row["ok"], row.get("last", row.get("why")))
    print("sections:", {name: whole.get(name, {}).get("state") for name in SECTIONS})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "results" / "gpu.json",
        help="JSON file to write",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=sum(SECTIONS.values()) / 60,
        help="for all sections together (default: %(default).1f)",
    )
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument(
        "--dry",
        action="store_true",
        help="the same code at tiny shapes on the CPU: a test of this program, no measurement",
    )
    parser.add_argument("--section", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    device = "cpu" if chosen.dry else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print(
            "torch finds no NVIDIA GPU here, so nothing was measured; --dry tests this program on"
            " the CPU"
        )
        return
    if chosen.section:
        run_section(chosen.section, chosen.out, chosen.seconds, device, chosen.dry)
        return
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.unlink(missing_ok=True)
    write(chosen.out, "environment", environment(device))
    scale, start = chosen.minutes * 60 / sum(SECTIONS.values()), time.perf_counter()
    for name in chosen.only:
        left = chosen.minutes * 60 - (time.perf_counter() - start)
        # What an earlier section did not need is there for the later ones; a section never gets
        # more than is left.
        seconds = max(5.0, min(SECTIONS[name] * scale * 1.2, left))
        if chosen.dry:
            run_section(name, chosen.out, seconds, device, dry=True)
        else:
            start_section(name, chosen.out, seconds)
    print_summary(read(chosen.out))
    print(f"{time.perf_counter() - start:.0f} s; written to {chosen.out}")


if __name__ == "__main__":
    main()
