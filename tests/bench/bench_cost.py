"""What quantizing costs: peak memory, time by stage, and the time that the whole FLUX.1-dev would
take, from its layers' shapes; on a quiet machine and beside a process that keeps one core busy.

    python -m nibble bench cost [--preset fast] [--double 2] [--single 4] [--threads N] [--out FILE]
    [--folder DIR] [--busy 1]

A checkpoint with FLUX.1's own shapes (hidden 3072) is written with random weights and a few outlier
channels, streamed tensor by tensor, and quantized in a fresh process. Memory is that process's peak
(VmHWM) above what it had after `import torch`. Every shape in FLUX.1-dev occurs in the small model,
so the whole takes as many times longer as the sum over its layers of the mean time of a layer of
that shape does. (A layer's own seconds overlap those of others: several are worked on at once.)
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401

RESULTS = Path(__file__).resolve().parent / "results"


def memory(field: str) -> float:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {field}")


def write_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """bf16 weights of a transformer's size, with one channel in 500 ten times larger; returns their
    number.
    """
    import torch

    generator, table, end = torch.Generator().manual_seed(0), {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        table[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for shape in shapes.values():
            tensor = torch.randn(shape, generator=generator).mul_(0.02)
            if len(shape) == 2:
                tensor[
                    :, torch.randperm(shape[1], generator=generator)[: max(1, shape[1] // 500)]
                ] *= 10
            file.write(memoryview(tensor.bfloat16().view(torch.uint8).numpy()))
    return end // 2


def measure(source: str, target: str, preset: str, rank: int, threads: int) -> dict:
    """In the fresh process: quantizes, with a clock around reading, decomposing and writing."""
    import torch

    torch.set_num_threads(threads)
    baseline = memory("VmRSS")
    from nibble.quant.files import source as sources
    from nibble.quant.files import writer
    from nibble.quant.svdquant import quantize as pipeline
    from nibble.quant.svdquant.recipe import Recipe

    stages = {"read": 0.0, "decompose": 0.0, "write": 0.0}

    def timed(stage, function):
        def run(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                stages[stage] += time.perf_counter() - began

        return run

    for name in ("read", "weight", "bias"):
        setattr(sources.Source, name, timed("read", getattr(sources.Source, name)))
    for name in ("quantize_linear", "quantize_w4a16", "shared_smoothing"):
        setattr(pipeline, name, timed("decompose", getattr(pipeline, name)))
    for name in ("write", "finish"):
        setattr(writer.Writer, name, timed("write", getattr(writer.Writer, name)))
    cpu = time.process_time()
    report = pipeline.quantize_checkpoint(source, target, Recipe.from_preset(preset, rank=rank))
    rows = [
        {
            "name": r.name,
            "action": r.action,
            "seconds": r.seconds,
            "db": r.db,
            "before": r.bytes_before,
            "after": r.bytes_after,
        }
        for r in report.rows
    ]
    return {
        "baseline_bytes": baseline,
        "peak_bytes": memory("VmHWM"),
        "above_baseline_bytes": memory("VmHWM") - baseline,
        "seconds": report.seconds,
        "cpu_seconds": time.process_time() - cpu,
        "stages": stages,
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "rows": rows,
    }


def extrapolate(result: dict, small: dict, large: dict) -> dict:
    """Seconds for the large model: as the layers' times, each the mean of its shape, add up."""
    times: dict[tuple, list[float]] = {}
    for row in result["rows"]:
        times.setdefault((small[f"{row['name']}.weight"], row["action"] != "keep"), []).append(
            row["seconds"]
        )
    means = {shape: sum(values) / len(values) for (shape, _), values in times.items()}
    layers = [name for name, shape in large.items() if name.endswith(".weight") and len(shape) == 2]
    longer = sum(means[large[name]] for name in layers) / sum(
        row["seconds"] for row in result["rows"]
    )
    seconds = result["seconds"] * longer
    return {
        "weights": sum(map(_count, large.values())),
        "seconds": seconds,
        "minutes": seconds / 60,
        "core_minutes": seconds / 60 * result["cpu_seconds"] / result["seconds"],
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count


@contextlib.contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """So many processes beside, each with a core's whole time to spend."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measured_apart(source: Path, target: Path, options: argparse.Namespace) -> dict:
    """`measure` in a fresh process."""
    threads = str(options.threads)
    recipe = ["--preset", options.preset, "--rank", str(options.rank), "--threads", threads]
    output = subprocess.run(
        [sys.executable, __file__, *recipe, "--measure", str(source), str(target)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": threads},
    )
    target.unlink()
    return json.loads(output.stdout.splitlines()[-1])


def main() -> None:
    """Makes the checkpoint, measures in a child process, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--double", type=int, default=2)
    parser.add_argument("--single", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--busy", type=int, default=1, help="busy cores beside the second run")
    parser.add_argument("--out", type=Path, default=RESULTS / "cost.json")
    parser.add_argument("--folder", help="for the temporary files (needs about 4 GB)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.preset, options.rank, options.threads)))
        return
    from bench import machine
    from nibble.quant.files.known_shapes import flux1_shapes

    small, large = flux1_shapes(options.double, options.single), flux1_shapes()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "flux.safetensors", Path(folder) / "flux-int4.safetensors"
        weights = write_checkpoint(source, small)
        result = measured_apart(source, target, options)
        result["flux1_dev"] = extrapolate(result, small, large)
        with busy_cores(options.busy):
            beside = measured_apart(source, target, options)
        beside["flux1_dev"] = extrapolate(beside, small, large)
    result |= {
        "weights": weights,
        "preset": options.preset,
        "rank": options.rank,
        "threads": options.threads,
        "beside": {
            "busy_cores": options.busy,
            **{name: beside[name] for name in ("seconds", "cpu_seconds", "flux1_dev")},
        },
        "cpu": machine.cpu_name(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print_result(result, options.out)


def print_result(result: dict, out: Path) -> None:
    """The figures, for people."""
    print(
        f"{result['weights'] / 1e9:.2f} B weights, preset {result['preset']}, rank"
        f" {result['rank']}, {result['threads']} threads on {result['cores']} cores (load average"
        f" {result['load_average']:.1f})"
    )
    print(
        f"  peak memory above the interpreter's {result['baseline_bytes'] / 1e9:.2f} GB:"
        f" {result['above_baseline_bytes'] / 1e9:.2f} GB"
    )
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result["stages"].items())
    print(f"  time {result['seconds']:.1f} s: {stages}")
    whole = result["flux1_dev"]
    print(
        f"  FLUX.1-dev, {whole['weights'] / 1e9:.1f} B weights: {whole['minutes']:.1f} minutes"
        f" ({whole['core_minutes']:.1f} core minutes)"
    )
    beside = result["beside"]
    print(
        f"  beside {beside['busy_cores']} busy cores: {beside['flux1_dev']['minutes']:.1f} minutes,"
        f" {beside['seconds'] / result['seconds']:.2f} times as long"
    )
    print(f"  written to {out}")


if __name__ == "__main__":
    main()
