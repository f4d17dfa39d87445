"""What this machine has, and what each op runs through on it and why: the page to read first when
something is slow.

Needs nothing installed beyond torch; what is missing is said instead.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from . import ops
from .backends import choose, native, triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def describe(shape: tuple[int, int, int] = ops.TYPICAL) -> dict:
    """Facts and, for every op, device and dtype, its backend with path and reason for a layer of
    `shape` (M, N, K). Plain JSON.
    """
    devices = _devices()
    rows = []
    for op in ops.SCHEMAS:
        asked = (1, *shape[1:]) if op == "gemv_w4a16" else shape  # one token: what a gemv is for
        for device in devices:
            for dtype in DTYPES:
                backend, reason = ops.which(op, device, dtype, asked)
                rows.append(
                    {
                        "op": op,
                        "device": device,
                        "dtype": str(dtype).removeprefix("torch."),
                        "backend": backend,
                        "reason": reason,
                    }
                )
    return {"facts": _facts(), "shape": dict(zip("MNK", shape, strict=True)), "ops": rows}


def table(found: dict) -> str:
    """`describe` for people: facts, then ops, with the dtypes that run alike on one line."""
    facts = found["facts"]
    width = max(map(len, facts))
    lines = [f"{name:<{width}}  {value}" for name, value in facts.items()]
    lines += [
        "",
        "for a layer with "
        + ", ".join(f"{letter}={size}" for letter, size in found["shape"].items()),
        "",
    ]
    alike: dict[tuple, list[str]] = {}
    for row in found["ops"]:
        reason = row["reason"]
        if row["backend"] == "native":  # that it is installed is among the facts
            reason = reason.removeprefix(f"{native.module()[1]}; ").removeprefix(f"{row['op']}: ")
        if row["backend"] == "native" and row["op"] in choose.PARTS:
            reason = f"through {' and '.join(choose.PARTS[row['op']])}"
        alike.setdefault((row["op"], row["device"], row["backend"], reason), []).append(
            row["dtype"]
        )
    rows = [("op", "device", "dtypes", "backend", "path and reason")]
    rows += [
        (op, device, " ".join(dtypes), backend, reason)
        for (op, device, backend, reason), dtypes in alike.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        lines
        + [
            "  ".join([*(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=False)), row[4]])
            for row in rows
        ]
    )


def _facts() -> dict[str, str]:
    facts = {
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": str(torch.__version__),
        "CPU": (
            f"{_cpu()}, {torch.get_num_threads()} threads, torch uses"
            f" {torch.backends.cpu.get_cpu_capability()}"
        ),
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        facts[f"GPU {index}"] = (
            f"{gpu.name}, compute capability {gpu.major}.{gpu.minor},"
            f" {gpu.total_memory / 2**30:.0f} GiB"
        )
    if torch.cuda.device_count():
        facts["driver"] = f"{_driver()}; torch was built for {_built_for()}"
    elif hasattr(torch, "xpu") and torch.xpu.device_count():
        facts["GPU"] = torch.xpu.get_device_properties(0).name
    else:
        facts["GPU"] = (
            "torch finds none" if torch.version.cuda else "this torch was built without CUDA"
        )
    facts["compiled"] = _compiled()
    facts["Triton"] = triton.module()[1]
    for device in _devices():
        facts[f"way on {device}"] = way(torch.device(device))
    facts["comfy_kitchen"] = _version("comfy-kitchen")
    return facts


def _devices() -> list[str]:
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    xpus = torch.xpu.device_count() if hasattr(torch, "xpu") else 0
    return ["cpu", *cuda, *(f"xpu:{index}" for index in range(xpus))]


def _built_for() -> str:
    hip = torch.version.hip
    return f"ROCm {hip}" if hip else f"CUDA {torch.version.cuda}"


def way(device: torch.device) -> str:
    """How a device comes by compiled kernels, in one line: the extension, the package's CPU
    library, cubins of the package, cubins compiled here; and why not a way before that one.
    """
    served, why = native.serving(device)
    if served is None:
        return f"no compiled kernels: {why}"
    compiled, reason = native.module()
    if served is compiled:
        return f"{compiled.kind}: {reason}"
    if compiled is not None:
        reason = f"this {compiled.name} was built for {' and '.join(compiled.DEVICES)}"
    return f"cubins: {served.on(native.index_of(device)).way}; {reason}"


def _compiled() -> str:
    module, why = native.module()
    if module is None:
        return why
    info = module.build_info()
    cuda = f"CUDA {info['cuda']} for {info['architectures']}" if info["cuda"] else "no CUDA"
    return (
        f"{module.kind} {module.__version__}, built with {info['compiler']} and {cuda}; this CPU"
        f" runs {', '.join(module.cpu_isas())}"
    )


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.processor() or "unknown",
    )


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return "unknown (no nvidia-smi)"
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True)
    return (
        result.stdout.split("\n")[0].strip()
        if result.returncode == 0
        else "unknown (nvidia-smi failed)"
    )


def main(arguments: list[str]) -> None:
    """bench --env [--json FILE] [--shape M N K]: hardware, versions, and what each op runs
    through.
    """
    parser = argparse.ArgumentParser(
        prog="python -m nibble bench --env",
        description="What this machine has, and what each op runs through and why.",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("M", "N", "K"),
        default=ops.TYPICAL,
        help="tokens, outputs and inputs of the layer to speak of (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    description = describe(tuple(options.shape))
    if options.json:
        options.json.write_text(json.dumps(description, indent=1), encoding="utf-8")
    print(table(description))
