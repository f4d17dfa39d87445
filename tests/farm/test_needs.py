"""What a job asks of a machine, by numbers that are known."""

import math
from pathlib import Path

import pytest
import torch

from nibble.farm.jobs import Job
from nibble.farm.needs import PROCESS, needs_of
from nibble.quant.cli import by_name
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.job.checkpoint_run import ShapesOnly

FLUX = flux1_shapes()
WEIGHTS = sum(math.prod(shape) for shape in FLUX.values() if len(shape) > 1)
LARGEST = 21504 * 3072  # single_blocks.*.linear1


def needs(shapes=FLUX, words=(), parts=1, number=0, **said):
    source = ShapesOnly("m", shapes, 0, lambda name: torch.bfloat16)
    job = Job("m", Path("m"), Path("t"), "r", (), said, parts, number)
    return needs_of(source, by_name.parsed(words), job)


def test_flux_gets_a_core_and_the_memory_of_its_largest_layer():
    found = needs()
    assert found.cpus == 1 and found.gpus == 0
    assert found.memory == PROCESS + 48 * LARGEST
    assert found.seconds == pytest.approx(2 * 803, rel=0.01)  # two cores took 803 s
    assert found.retries == 3


def test_a_model_of_hours_gets_more_cores_and_their_memory():
    large = {f"{i}.{name}": shape for i in range(5) for name, shape in FLUX.items()}
    found = needs(large)
    assert found.cpus == 5  # 8030 s alone, in half hours
    assert found.memory == PROCESS + 48 * LARGEST * 5


def test_a_part_is_a_share_of_the_seconds_and_joining_little():
    part, joined = needs(parts=4, number=2), needs(parts=4)
    assert part.seconds == pytest.approx(needs().seconds / 4, abs=0.1)
    assert part.memory == needs().memory  # its largest layer may be the model's
    assert joined.seconds < 0.1 * part.seconds


def test_a_calibrated_preset_holds_the_model_and_what_it_records():
    found = needs(words=["--preset=best", "--memory-cap=3"])
    assert found.memory == PROCESS + 48 * LARGEST + 4 * WEIGHTS + 3_000_000_000
    assert found.retries == 3 + math.floor(found.seconds / 3600)


def test_a_card_is_asked_for_where_layers_are_worked_on_one():
    found = needs(words=["--device=cuda"])
    assert (found.cpus, found.gpus) == (1, 1)


def test_what_the_user_says_goes_first():
    found = needs(words=["--device=cuda"], cpus=3, gpus=0.5, memory=7, retries=0)
    assert (found.cpus, found.gpus, found.memory, found.retries) == (3, 0.5, 7_000_000_000, 0)
