"""What a job takes of a machine, from the shapes of its model: Ray places jobs by it.

Cores: as many as bring a data-free job to half an hour, MOST at most; a core each is what keeps a
cluster busiest, for layers are made one thread each. Memory: what the layers under way take
(`side_by_side`) beside a process with torch, and with a calibrated preset the model in float32.
Retries: a job that takes hours meets more machines that go away, and goes on where it stopped.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from typing import Any

from ..quant.files.memory.switches import SECONDS_A_WEIGHT
from ..quant.files.source import Source
from ..quant.job.side_by_side import BYTES_PER_WEIGHT
from .jobs import Job

PROCESS = 1 << 30  # bytes of Python with torch, and its buffers
MOST = 8  # cores
SHORT = 1800.0  # seconds
CORES_OF_RATE = 2  # that SECONDS_A_WEIGHT was measured on
CALIBRATED = 10  # times the seconds of data-free
RETRIES = 3
JOINING = 0.05  # times the seconds of a part, which are copied: bytes alone
RECORDED = 4  # times the model: what is recorded of its layers' inputs, under the cap


@dataclass(frozen=True)
class Needs:
    """cpus, gpus: cores and graphics cards; memory: bytes of RAM; retries: times that a job is
    begun again after its worker died; seconds: that it will take, roughly.
    """

    cpus: float
    gpus: float
    memory: int
    retries: int
    seconds: float

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def needs_of(source: Source, options: argparse.Namespace, job: Job) -> Needs:
    """Of quantizing a model, a part of it, or of joining its parts. options: as `quantize` reads
    them. What the user said of `AMOUNTS` (memory in GB) goes before what is reckoned here.
    """
    said = job.worker
    matrices = [math.prod(shape) for shape in source.shapes.values() if len(shape) >= 2]
    weights, largest = sum(matrices), max(matrices, default=0)
    alone = CORES_OF_RATE * SECONDS_A_WEIGHT * weights / job.parts
    if job.parts > 1 and not job.number:
        alone *= JOINING
    cores = max(1, min(MOST, math.ceil(alone / SHORT)))
    calibrated = options.preset != "fast" or options.prompts is not None
    on_card = options.device.partition(":")[0] != "cpu"
    memory = PROCESS + BYTES_PER_WEIGHT * largest * (1 if on_card else cores)
    cap, in_float32 = int(1e9 * options.memory_cap), 4 * weights
    if calibrated or in_float32 <= cap:  # the model runs
        memory += in_float32 + min(cap, RECORDED * in_float32)
    cpus = said.get("cpus", 1 if on_card else cores)
    seconds = alone / max(1, cpus) * (CALIBRATED if calibrated else 1)
    return Needs(
        cpus=cpus,
        gpus=said.get("gpus", 1 if on_card else 0),
        memory=int(1e9 * said["memory"]) if "memory" in said else memory,
        retries=int(said.get("retries", RETRIES + seconds // 3600)),
        seconds=round(seconds, 1),
    )
