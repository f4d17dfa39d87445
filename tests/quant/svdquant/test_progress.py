"""What a quantization tells while it works, and of the runs before it was stopped."""

import json
import time

import pytest

import random_flux
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.job.monitor import Monitor
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe

SHAPES = flux1_shapes(1, 1, 128, 64, 64)
LINEARS = sum(len(shape) == 2 for shape in SHAPES.values())
FAST = Recipe.from_preset("fast", rank=16, smoothing_grid=1, iterations=1)


class Stop(Exception):
    """What a host raises to interrupt."""


@pytest.fixture
def source(tmp_path):
    return random_flux.write(tmp_path / "m.safetensors", SHAPES)


def test_layers_are_counted_up_to_all_of_them(source, tmp_path):
    told = []
    monitor = Monitor(layers=lambda done, count: told.append((done, count)))
    quantize_checkpoint(source, tmp_path / "q.safetensors", FAST, monitor=monitor)
    assert told[0] == (0, LINEARS)
    assert told[-1] == (LINEARS, LINEARS)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert {done for done, _ in told} == set(range(LINEARS + 1))


def test_a_resumed_run_counts_what_is_done_and_tells_the_whole_time(source, tmp_path):
    target, told, weights = tmp_path / "q.safetensors", [], []

    def stop_late(done, count):
        if done == 10:
            time.sleep(0.5)
        if done == 11:
            raise Stop

    with pytest.raises(Stop):
        quantize_checkpoint(source, target, FAST, monitor=Monitor(layers=stop_late))
    journal = tmp_path / "q.safetensors.partial.journal"
    lines = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    finished = {line["unit"] for line in lines} & {
        name.removesuffix(".weight") for name, shape in SHAPES.items() if len(shape) == 2
    }
    before = lines[-1]["seconds"]
    assert before >= 0.5
    began = time.monotonic()
    report = quantize_checkpoint(
        source,
        target,
        FAST,
        monitor=Monitor(
            progress=lambda done, total, name: weights.append(done),
            layers=lambda done, count: told.append((done, count)),
        ),
    )
    assert told[0] == (len(finished), LINEARS)
    assert told[-1] == (LINEARS, LINEARS)
    sizes = {name.removesuffix(".weight"): shape for name, shape in SHAPES.items()}
    assert weights[0] == sum(sizes[name][0] * sizes[name][1] for name in finished)
    assert 0.5 < report.seconds <= before + time.monotonic() - began
