"""What a call costs when there is nearly nothing to compute: microseconds of one token through a
tiny layer, beside torch's own linear: `python -m nibble bench call_overhead`.

    python tests/bench/bench_call_overhead.py
    python tests/bench/bench_call_overhead.py --before CHECKOUT --before-python PYTHON

Each checkout is measured in processes of its own, taking turns; of many short rounds the fastest
counts, because everything else on a machine only adds to a time. The arithmetic of such a layer
takes a few microseconds, so what is seen is what surrounds it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import subprocess
import sys
import timeit
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(__file__).with_name("results") / "call-overhead.json"
K, N, RANK = 128, 128, 16
OURS = ("linear_w4a4", "linear_w4a16", "linear_vq")
PLAIN = "F.linear"


# ---- one checkout, in a process of its own -------------------------------------------------------


def load(checkout: Path) -> None:
    """A checkout as the package `nibble`."""
    spec = importlib.util.spec_from_file_location(
        "nibble", checkout / "__init__.py", submodule_search_locations=[str(checkout)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["nibble"] = package
    spec.loader.exec_module(package)


def calls() -> dict[str, Callable[[], torch.Tensor]]:
    from nibble.kernels import ops

    draw = torch.Generator().manual_seed(0)
    x, dense, bias = (torch.randn(*shape, generator=draw) for shape in ((1, K), (N, K), (N,)))
    codes = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8, generator=draw)
    scale = torch.rand(K // 64, N, generator=draw)
    smooth = torch.rand(K, generator=draw) + 0.5
    down, up = (torch.randn(size, RANK, generator=draw) for size in (K, N))
    indices = torch.randint(0, 256, (N, K // 4), dtype=torch.uint8, generator=draw)
    codebook = torch.randn(256, 4, generator=draw)
    return {
        PLAIN: lambda: torch.nn.functional.linear(x, dense, bias),
        "linear_w4a4": lambda: ops.linear_w4a4(x, codes, scale, smooth, down, up, bias),
        "linear_w4a16": lambda: ops.linear_w4a16(x, codes, scale, None, bias),
        "linear_vq": lambda: ops.linear_vq(x, indices, codebook, None, None, None, bias),
    }


@torch.inference_mode()
def measure(rounds: int, number: int) -> dict[str, float]:
    """Microseconds per call, the least of all rounds."""
    torch.set_num_threads(1)
    timers = {name: timeit.Timer(call) for name, call in calls().items()}
    best = dict.fromkeys(timers, float("inf"))
    for _ in range(rounds):
        for name, timer in timers.items():
            best[name] = min(best[name], timer.timeit(number) / number * 1e6)
    return best


# ---- all of them ---------------------------------------------------------------------------------


def in_its_own_process(python: str, checkout: Path, quick: bool) -> dict:
    command = [python, __file__, "--worker", str(checkout), *(["--quick"] if quick else [])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def merged(runs: list[dict]) -> dict:
    """The least time of several processes."""
    names = runs[0]["us"]
    us = {name: round(min(run["us"][name] for run in runs), 2) for name in names}
    ratio = {name: round(us[name] / us[PLAIN], 2) for name in OURS}
    return runs[0] | {"us": us, "times_of_F.linear": ratio}


def work(checkout: Path, quick: bool) -> None:
    """Measures a checkout and prints what was found."""
    load(checkout)
    from nibble.kernels import which

    backends = {op: which(op, "cpu", torch.float32, (1, N, K))[0] for op in OURS}
    rounds, number = (2, 20) if quick else (150, 50)
    print(json.dumps({"backend": backends, "us": measure(rounds, number)}))


def print_table(found: dict) -> None:
    sides = [side for side in ("before", "after") if side in found]
    print(f"us per call at M = 1, K = {K}, N = {N}, rank {RANK} on {found['cpu']}")
    print(f"{'':<14}" + "".join(f"{side:>10}{'of F.linear':>14}" for side in sides))
    for name in (PLAIN, *OURS):
        cells = ""
        for side in sides:
            ratio = found[side]["times_of_F.linear"].get(name, 1.0)
            cells += f"{found[side]['us'][name]:>10.2f}{ratio:>13.2f}x"
        print(f"{name:<14}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--before-python", default=sys.executable, help="what runs it")
    parser.add_argument("--processes", type=int, default=3, help="of each checkout")
    parser.add_argument("--quick", action="store_true", help="a look, not a measurement")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options.quick)
        return
    sides = {"after": (sys.executable, ROOT)}
    if options.before:
        sides = {"before": (options.before_python, options.before.resolve()), **sides}
    runs: dict[str, list[dict]] = {side: [] for side in sides}
    for _ in range(1 if options.quick else options.processes):
        for side, (python, checkout) in sides.items():
            runs[side].append(in_its_own_process(python, checkout, options.quick))
    found: dict = {
        "cpu": _cpu(),
        "threads": 1,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "shape": {"M": 1, "K": K, "N": N, "R": RANK},
        "dtype": "float32",
    } | {side: merged(of_side) for side, of_side in runs.items()}
    print_table(found)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def _cpu() -> str:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from bench import machine

    return machine.cpu_name()


if __name__ == "__main__":
    main()
