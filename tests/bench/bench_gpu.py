"""The first minutes on a GPU, and everything worth knowing there, in one call of seven minutes:
`make gpu OUT=folder`, or `python tests/bench/bench_gpu.py --out FILE`.

    compile       the kernels that follow, by NVRTC, side by side (--compile 90 does it beforehand)
    probe         a Hopper's instructions, held against what the emulator assumes
    smoke         every op by every route, each in a process of its own: which routes are alive
    correctness   FLUX.1's sizes by the live routes, against float64
    robustness    graphs, the same bits every time, a NaN that stays in its token
    ceilings      copy, second-level cache, bf16, fp8, int8
    products      the product and the quantizer alone, every live route and tile
    transformer   a step of FLUX.1-dev: bfloat16, ours, with the fused MLP
    layers        whole linears beside other people's kernels
    counters      one launch of each route under ncu
    memcheck      every op under compute-sanitizer

It needs torch with CUDA and its NVRTC: no compiler, no network. A route that is wrong, crashes or
hangs is dead, and the rest goes on without it. Every section is a process of its own with a time
limit, and the file is written after every row. `--dry` walks the same code on the CPU at tiny
shapes, a stand-in in the kernels' place.
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench import machine
from bench.gpu import (
    ceilings,
    correctness,
    counters,
    instances,
    isolate,
    layer,
    layers,
    products,
    robustness,
    sanitize,
    smoke,
    start,
    table,
    transformer,
)
from bench.gpu.isolate import Job, Remote
from bench.gpu.report import Report, read, write
from nibble.kernels import which
from nibble.kernels.backends import native

LIMITS = {
    "compile": 70,
    "probe": 20,
    "smoke": 60,
    "correctness": 60,
    "robustness": 30,
    "ceilings": 20,
    "products": 90,
    "transformer": 70,
    "layers": 40,
    "counters": 40,
    "memcheck": 40,
}
"""Seconds that each may take, in the order of their worth; all together get --seconds."""
SECONDS = 420
AT_ONCE = 4
"""Processes of the smoke test side by side."""
OPS = (
    "quantize_down", "gemm_w4a4_up", "gemm_w4a4_up_gelu_quantize_down", "gemv_w4a16", "gemm_w4a16",
    "linear_w4a4", "linear_w4a4_grouped", "mlp_w4a4", "linear_w4a16", "gemm_vq", "linear_vq",
    "linear_w4a8", "linear_nvfp4",
)  # fmt: skip
CACHE = checkout.ROOT / "build" / "gpu-cache"


# ---- the machine ---------------------------------------------------------------------------------


def environment(remote: Remote, device: str) -> None:
    """Machine, versions, and what runs each op with its reason."""
    remote.set(**machine.describe_cpu())
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        remote.set(
            gpu=gpu.name,
            capability=f"{gpu.major}.{gpu.minor}",
            multiprocessors=gpu.multi_processor_count,
            memory_gb=gpu.total_memory / 1e9,
            cuda_of_torch=torch.version.cuda,
            driver=_driver(),
        )
    there = torch.device(device, 0) if device == "cuda" else torch.device(device)
    remote.set(kernels=native.serving(there)[1])
    remote.set(ops={op: " ".join(which(op, device)) for op in OPS})


def _driver() -> str:
    fields = "driver_version,clocks.max.sm,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return found.stdout.strip()


# ---- one run -------------------------------------------------------------------------------------


class Run:
    """The sections in turn. The process that holds this never touches the GPU: it forks."""

    def __init__(self, chosen: argparse.Namespace):
        self.out, self.dry = chosen.out, chosen.dry
        self.device = "cpu" if chosen.dry else "cuda"
        self.end = time.perf_counter() + chosen.seconds
        self.patience = 10 if chosen.dry else 1  # the CPU that it runs dry on may be busy
        self.only = chosen.only
        self.known: dict[str, dict[int, str]] = {}
        self.alive: list[int] = []
        self.fused: list[int] = []

    @property
    def capability(self) -> int:
        words = read(self.out).get("environment", {}).get("capability", "9.0")
        return int(words.replace(".", ""))

    def _inside(self, work: Callable[[Remote], None], remote: Remote) -> None:
        start.ready(self.device, self.dry)
        work(remote)

    def jobs(self, report: Report, jobs: list[Job], at_once: int = 1) -> dict[str, str]:
        """Runs jobs of a section; none gets more than is left."""
        left = self.end - time.perf_counter()
        ready = [
            job._replace(
                work=functools.partial(self._inside, job.work),
                seconds=max(1, min(job.seconds * self.patience, left)),
            )
            for job in jobs
        ]
        return isolate.run(ready, report.receive, at_once)

    def section(self, name: str, work: Callable[[Remote], None]) -> None:
        """A section of one process."""
        if name in LIMITS and name not in self.only:
            return
        report = Report(self.out, name)
        if self.end - time.perf_counter() < 5:
            report.set(state="out of time")
            return
        states = self.jobs(report, [Job(name, work, LIMITS.get(name, 40))])
        report.set(state=states[name])

    # ---- finding the live routes ---------------------------------------------------------------

    def probe(self) -> None:
        """Each group in a process of its own."""
        if "probe" not in self.only:
            return
        from probe import probes

        hopper = self.device == "cpu" or self.capability // 10 == 9
        groups = [name for name in probes.GROUPS if hopper or name not in probes.HOPPER_ONLY]
        report = Report(self.out, "probe")
        jobs = [
            Job(group, functools.partial(_probe, group=group, device=self.device), 20)
            for group in groups
        ]
        states = self.jobs(report, jobs, AT_ONCE)
        bad = {name: state for name, state in states.items() if state != "finished"}
        report.set(state="finished", groups=states, bad=bad)

    def smoke(self) -> None:
        """Sets the live routes, and the default one for every process from now on."""
        report = Report(self.out, "smoke")
        told: dict = {}
        asked = Job("routes", _tell_routes, 30)
        isolate.run(
            [asked._replace(work=functools.partial(self._inside, asked.work))],
            lambda name, kind, value: told.update(value),
        )
        self.known = told.get("known", {})
        if not self.known:
            report.set(state="no routes: nothing is compiled for this device")
            return
        jobs = smoke.route_jobs(self.device, self.dry, self.known)
        states = self.jobs(report, jobs, AT_ONCE)
        rows = report.facts["rows"]
        self.alive = smoke.live(states, rows)
        self.fused = smoke.live(states, rows, "gemm_w4a4_up_gelu_quantize_down")
        report.set(alive=self.alive, fused=self.fused)
        if self.alive:
            default = smoke.default_route(self.alive, self.known["gemm_w4a4_up"])
            os.environ[start.ROUTE] = str(default)
            report.set(default=default)
            states |= self.jobs(report, smoke.linear_jobs(self.device, self.dry), AT_ONCE)
        report.set(state="finished", dead=smoke.dead(states, rows))

    # ---- everything ----------------------------------------------------------------------------

    def measure(self) -> None:
        """The sections that need live routes."""
        device, dry, alive = self.device, self.dry, self.alive
        plan = correctness.Plan(device, dry, alive, self.fused)
        self.section("correctness", lambda remote: correctness.run(remote, plan))
        self.section("robustness", lambda remote: robustness.run(remote, device, dry, alive))
        self.section("ceilings", lambda remote: ceilings.run(remote, device, dry))
        known = read(self.out).get("ceilings", {})
        names = {number: self.known["gemm_w4a4_up"][number] for number in alive}
        slow = products.emulated(names, self.capability)
        timed = products.Plan(device, dry, names, slow, known)
        self.section("products", lambda remote: products.run(remote, timed))
        if "transformer" in self.only:
            report = Report(self.out, "transformer")
            self.jobs(report, transformer.jobs(device, dry, alive, LIMITS["transformer"]))
            report.set(state="finished")
        self.section("layers", lambda remote: layers.run(remote, device, dry, known))
        self.section("counters", lambda remote: counters.run(remote, device, dry, alive))
        self.section("memcheck", lambda remote: sanitize.run(remote, device, dry, alive))

    def all(self) -> None:
        self.section("environment", lambda remote: environment(remote, self.device))
        if self.device == "cuda":
            at_once = os.cpu_count() or 1
            self.section(
                "compile", lambda remote: instances.compile_all(remote, self.capability, at_once)
            )
        self.probe()
        self.smoke()
        if self.alive:
            self.measure()


def _probe(remote: Remote, group: str, device: str) -> None:
    """In a dry run the kernels are compiled, where they can be, and the operands made."""
    from probe import on_gpu, probes

    go = on_gpu.Gpu() if device == "cuda" else (lambda *arguments: None)
    for found in probes.run(group, go):
        remote.add({"group": group, "ok": not found.wrong or device == "cpu", **found._asdict()})


def _tell_routes(remote: Remote) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if layer.compiled(device) is not None:
        remote.set(known=smoke.known_routes(device))


def compile_only(capability: int) -> int:
    """Fills the cache without a GPU; how many kernels failed."""
    facts: dict = {}

    def heard(name: str, kind: str, value: dict) -> None:
        facts.update(value)
        if "done" in value:
            print(f"\r{value['done']} of {value['kernels']}", end="", flush=True)

    at_once = os.cpu_count() or 1
    work = functools.partial(instances.compile_all, capability=capability, at_once=at_once)
    state = isolate.run([Job("compile", work, 3600)], heard)["compile"]
    print(f"\n{state}; {facts.get('failed')} failed; kept in {CACHE}")
    return int(state != "finished" or facts.get("failed", 0))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    results = Path(__file__).resolve().parent / "results" / "gpu.json"
    parser.add_argument("--out", type=Path, default=results, help="JSON file to write")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="for all together (default: %(default)d)"
    )
    parser.add_argument("--only", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument(
        "--dry",
        action="store_true",
        help="the same code at tiny shapes on the CPU: a test of this program, no measurement",
    )
    parser.add_argument(
        "--compile",
        type=int,
        metavar="CAPABILITY",
        help="only compile the kernels for a GPU such as 90 (9.0) into the cache; needs no GPU",
    )
    parser.add_argument(
        "--extension",
        action="store_true",
        help="measure the compiled extension, nibble_kernels, in place of cubins",
    )
    return parser.parse_args(arguments)


def has_gpu() -> bool:
    """Asked in a process of its own: one that has touched the GPU cannot fork any more."""
    told: dict = {}
    work = Job("gpu", lambda remote: remote.set(found=torch.cuda.is_available()), 60)
    isolate.run([work], lambda name, kind, value: told.update(value))
    return told.get("found", False)


def main(arguments: list[str] | None = None) -> int:
    chosen = parse(arguments)
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):  # kernels that are compiled here
        os.environ[variable] = str(CACHE)
    if chosen.compile:
        return compile_only(chosen.compile)
    if not chosen.dry and not has_gpu():
        print("torch finds no NVIDIA GPU here, so nothing was measured; --dry tests this program")
        return 0
    os.environ[start.EXTENSION] = str(int(chosen.extension))
    os.environ.pop(start.ROUTE, None)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.unlink(missing_ok=True)
    write(chosen.out, "command", machine.command())
    begin = time.perf_counter()
    Run(chosen).all()
    print("\n".join(table.lines(read(chosen.out))))
    print(f"{time.perf_counter() - begin:.0f} s; written to {chosen.out}", flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a process that could not be ended must not hold this one up
