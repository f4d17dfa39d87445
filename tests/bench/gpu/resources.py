"""What the compiler made of the kernels in the module that is being measured: registers, spills,
matrix instructions, and how many warps fit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.gpu.report import Report
from nibble.kernels.backends import native

PROGRAM = Path(__file__).resolve().parents[2] / "kernels" / "check_resources.py"
REGISTERS, MOST_WARPS = 65536, {"75": 32, "86": 48, "89": 48, "120": 48, "120f": 48}


def warps_by_registers(registers: int, arch: str) -> int:
    """Warps that a multiprocessor's registers hold; shared memory may allow fewer. They are given
    out 8 a thread at a time.
    """
    taken = 32 * -(-registers // 8) * 8
    return min(MOST_WARPS.get(arch.rstrip("a"), 64), REGISTERS // taken) if taken else 0


def run(report: Report, device: str, dry: bool) -> None:
    module, why = native.module()
    if module is None or "cuda" not in module.DEVICES:
        report.set(absent=why if module is None else "this nibble_kernels was built without CUDA")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "kernels.json"
        # It ends with 1 where a bound is broken, and writes what it found all the same.
        ended = subprocess.run(
            [sys.executable, str(PROGRAM), "--module", module.__file__, "--json", str(found)],
            capture_output=True,
            text=True,
        )
        if not found.exists():
            report.set(absent=(ended.stderr or ended.stdout).strip().splitlines()[-1])
            return
        kernels = json.loads(found.read_text())
    report.facts["rows"] = [
        {
            key: kernel[key]
            for key in ("name", "arch", "registers", "shared", "stack", "spills", "matrix")
        }
        | {"warps_by_registers": warps_by_registers(kernel["registers"], kernel["arch"])}
        for kernel in kernels
    ]
    report.set(
        kernels=len(kernels),
        spilling=[kernel["name"] for kernel in kernels if kernel["spills"] or kernel["stack"]],
    )
