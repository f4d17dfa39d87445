"""10,000 checkpoints on 200 workers, simulated: how long, how many bytes, what breaks first.

    python tests/bench/bench_farm_scale.py [--jobs 10000] [--workers 200] [--out FILE]

farm_simulator.py has the model; INPUTS says of each number whether it was measured, and where, or
assumed. Workers have two CPU cores and run preset *fast*; GPUs: not yet measured.
"""

import argparse
import dataclasses
import json
import math
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import checkout  # noqa: F401
from bench.farm_simulator import Farm, Job, Simulation
from nibble.farm.ray_driver import ALIVE
from nibble.quant.cli.driven import APART
from nibble.quant.files.memory import published

RESULTS = Path(__file__).resolve().parent / "results"
GB, HOUR = 1e9, 3600.0
RAY = json.loads((RESULTS / "ray.json").read_text())
# name → (value, where it comes from)
INPUTS: dict[str, tuple[float, str]] = {
    "seconds a weight": (
        803 / 11_871_977_472,
        "measured: FLUX.1 dev, preset fast, two cores of an AMD EPYC, 13 min 23 s"
        " (docs/benchmarks.md, What quantizing costs), its own reading and writing of a local disk"
        " included, so that transfers are counted on the safe side; other models by their quantized"
        " weights",
    ),
    "bytes read and written": (
        1,
        "times the source and the 4-bit file of published.json (preset fast)",
    ),
    "bytes read first": (
        780 * 3 * 4096,
        "the fingerprint's samples, 3 x 4 KiB of each of FLUX.1's 780 tensors; a recipe that runs"
        " the model first (memory-cap above its size in float32, or prompts) reads all of it twice:"
        " the rows with 'the model run first', without the time that it takes (not measured)",
    ),
    "layers of a checkpoint": (314, "computed: FLUX.1's matrices; assumed of every model"),
    "seconds to start the program": (10, "assumed; import torch alone: 3 s on a busy machine"),
    "tasks a second": (RAY["tasks_a_second"], "measured: results/ray.json"),
    "messages a second": (1 / RAY["actor_call_seconds"], "measured: results/ray.json, one by one"),
    "messages a second of a worker at most": (
        1 / APART + 1 / ALIVE,
        "as they are: progress twice a second (quant/cli/driven.py), a sign of life every five"
        " seconds (farm/ray_driver.py)",
    ),
    "bytes of the driver for a job": (
        RAY["driver_bytes_a_waiting_task"],
        "measured: results/ray.json",
    ),
    "bytes a second of a machine": (1.25e9, "assumed: a link of 10 Gbit/s"),
    "seconds until a dead worker is back": (120, "assumed"),
    "seconds until all are back after the head": (
        75,
        "60 s until a worker gives its head up (Ray's setting, seen), 5 s of docs/farm.md's loop,"
        " 10 s to start (seen on one machine: 4 to 13)",
    ),
}
STORAGES = (1, 5, 25)  # GB/s
MTBF = {"a worker dies every 24 h": 24 * HOUR, "a worker dies every 4 h": 4 * HOUR}
HEAD_EVERY = 6 * HOUR


def value(name: str) -> float:
    return INPUTS[name][0]


def job(row: dict) -> Job:
    """The cost of a published model."""
    return Job(
        first=value("bytes read first"),
        read=row["bytes_16"],
        write=row["bytes_4"],
        compute=row["weights"] * value("seconds a weight"),
        layers=int(value("layers of a checkpoint")),
    )


def mixes(count: int) -> dict[str, list[Job]]:
    """FLUX finetunes alone, every published model alike, and a short list of these."""
    rows = published.models()
    kinds = [job(row) for row in rows.values()]
    return {
        "FLUX.1 dev": [job(rows["flux1-dev"])] * count,
        f"{len(kinds)} models": random.Random(0).choices(kinds, k=count),
        f"{len(kinds)} models, {count // 20} jobs": random.Random(1).choices(kinds, k=count // 20),
    }


def farm(workers: int, storage: float) -> Farm:
    return Farm(
        workers,
        storage=storage * GB,
        link=value("bytes a second of a machine"),
        start=value("seconds to start the program"),
        dispatch=1 / value("tasks a second"),
        rejoin=value("seconds until a dead worker is back"),
        away=value("seconds until all are back after the head"),
    )


def arm(setting: Farm, jobs: list[Job]) -> dict:
    """One simulated run beside two bounds that no order can beat: computing alone, spread evenly;
    and the storage, never idle.
    """
    found = Simulation(setting, jobs).run()
    ideal = sum(each.compute for each in jobs) / setting.workers
    least = sum(each.bytes for each in jobs)
    return {
        "hours": found.makespan / HOUR,
        "ideal_hours": ideal / HOUR,
        "efficiency": ideal / found.makespan,
        "storage_bound_hours": least / setting.storage / HOUR,
        "moved_tb": found.moved / 1e12,
        "more_than_needed_tb": (found.moved - least) / 1e12,
        "mean_gb_s": found.moved / found.makespan / GB,
        "peak_gb_s": found.peak / GB,
        "storage_full": found.full / found.makespan,
        "program_starts": found.starts,
        "deaths_with_a_job": found.deaths,
    }


def rows(workers: int, count: int) -> list[dict]:
    found = []
    for mix, jobs in mixes(count).items():
        longest = sorted(jobs, key=lambda each: -each.compute)
        for storage in STORAGES:
            quiet = farm(workers, storage)
            arms = {("as given", "none"): (quiet, jobs)}
            if longest != jobs:
                arms["longest first", "none"] = (quiet, longest)
            for name, mtbf in MTBF.items():
                arms["as given", name] = (dataclasses.replace(quiet, mtbf=mtbf), jobs)
            heads = tuple(HEAD_EVERY * (i + 1) for i in range(1000))
            arms["as given", "the head starts again every 6 h"] = (
                dataclasses.replace(quiet, heads=heads),
                jobs,
            )
            twice = [dataclasses.replace(each, first=each.read) for each in jobs]
            arms["as given", "none, the model run first"] = (quiet, twice)
            for (order, faults), (setting, listed) in arms.items():
                what = {"mix": mix, "storage_gb_s": storage, "order": order, "faults": faults}
                found.append({**what, **arm(setting, listed)})
                print(line(found[-1]), flush=True)
    return found


def line(row: dict) -> str:
    return (
        f"{row['mix']:>19} {row['storage_gb_s']:3} GB/s {row['order']:13} {row['faults']:32}"
        f" {row['hours']:6.2f} h, efficiency {row['efficiency']:.3f}, {row['moved_tb']:.0f} TB,"
        f" full {row['storage_full']:.0%}"
    )


def limits(jobs: list[Job]) -> dict:
    """Workers at which each part has no more to give, at the pace of a worker that waits for
    nobody.
    """
    link, start = value("bytes a second of a machine"), value("seconds to start the program")
    count = len(jobs)
    moved = sum(each.bytes for each in jobs) / count
    seconds = sum(each.compute for each in jobs) / count + start + moved / link
    shortest = min(jobs, key=lambda each: each.compute)
    quick = shortest.compute + start + shortest.bytes / link
    a_second = messages(seconds)
    return {
        "bytes_a_job": moved,
        "seconds_a_job": seconds,
        "bytes_a_second_of_a_worker": moved / seconds,
        "messages_a_second_of_a_worker": a_second,
        "workers_until": {
            **{
                f"storage of {s} GB/s is full": math.floor(s * GB * seconds / moved)
                for s in STORAGES
            },
            "the driver's messages": math.floor(value("messages a second") / a_second),
            "the driver's messages, if all have the smallest model": math.floor(
                value("messages a second") / messages(quick)
            ),
            "the driver's tasks": math.floor(value("tasks a second") * seconds),
        },
        "driver_bytes_for_all_jobs": value("bytes of the driver for a job") * count,
    }


def messages(seconds: float) -> float:
    """What a worker says a second that makes a checkpoint in so many."""
    return min(value("layers of a checkpoint") / seconds, 1 / APART) + 1 / ALIVE


def verdict(found: dict, workers: int) -> str:
    """What breaks first, in a sentence."""
    until = found["workers_until"]
    need = found["bytes_a_second_of_a_worker"] * workers / GB
    full = [f"{name} at {n}" for name, n in until.items() if "storage" in name and n < workers]
    after = min(
        ((n, name) for name, n in until.items() if "storage" not in name), key=lambda x: x[0]
    )
    which = ", ".join(full) if full else "none of the assumed ones is full"
    return (
        f"{workers} workers want {need:.1f} GB/s of the shared storage, which breaks first"
        f" ({which} workers); then {after[1]}, at {after[0]} workers."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "farm_scale.json")
    args = parser.parse_args()
    bounds = {mix: limits(jobs) for mix, jobs in mixes(args.jobs).items()}
    found = {
        "jobs": args.jobs,
        "workers": args.workers,
        "inputs": {name: {"value": v, "source": source} for name, (v, source) in INPUTS.items()},
        "limits": bounds,
        "breaks_first": {mix: verdict(each, args.workers) for mix, each in bounds.items()},
        "rows": rows(args.workers, args.jobs),
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for mix, sentence in found["breaks_first"].items():
        print(f"{mix}: {sentence}")


if __name__ == "__main__":
    main()
