"""Calibrations as files, without a model: equal bytes for equal content, and every damage refused
in a sentence with the file's name.
"""

import json
import random

import numpy as np
import pytest

from calibrations import STEPS, calibration
from nibble.accel.caching.calibration_file import LARGEST, read
from nibble.accel.caching.extrapolate import Reuse
from nibble.accel.caching.flow_time import FlowTime
from nibble.quant.files.errors import FileRefused

COSMOS = [80.0, 20.0, 5.0, 1.0, 0.2, 0.02, 0.0]


@pytest.fixture
def path(tmp_path):
    calibration().save(tmp_path / "some.json")
    return tmp_path / "some.json"


def without_sum(path, change=lambda facts: None):
    """The file as it was written before files had sums, and changed."""
    facts = json.loads(path.read_text())
    facts.pop("checksum")
    facts["run"].pop("flow")
    change(facts)
    path.write_text(json.dumps(facts | {"created": "2026-01-01T00:00:00+00:00"}))


def test_what_is_written_is_read_and_equal_content_is_equal_bytes(path):
    found, written = read(path), path.read_bytes()
    assert found.curves == calibration().curves
    assert found.run == calibration().run
    assert np.allclose(found.grams, calibration().grams, atol=1e-8)
    assert found.digest() == calibration().digest()
    assert found.name == "some.json"
    found.save(path)
    assert path.read_bytes() == written
    assert [other.name for other in path.parent.iterdir()] == ["some.json"]


def test_no_damaged_byte_is_accepted(path):
    whole, rng, accepted = path.read_bytes(), random.Random(0), 0
    for _ in range(1500):
        damaged = bytearray(whole)
        where = rng.randrange(len(damaged) - 1)  # the last one ends the line
        damaged[where] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.choice((len(damaged), where))])
        try:
            found = read(path)
        except FileRefused as refused:
            assert str(refused).startswith("some.json")
        else:
            accepted += found.digest() != calibration().digest()
    assert accepted == 0


def test_a_file_of_before_is_read(path):
    without_sum(path)
    found = read(path)
    assert found.flow == FlowTime()
    assert found.times == tuple(found.sigmas)
    assert sum(found.mask(4, found.times, Reuse(1))) == 4
    found.need(["step", "double"])


def test_what_was_measured_in_another_unit_is_refused_where_it_matters(path):
    without_sum(path, lambda facts: facts["run"].update(sigmas=COSMOS))
    found = read(path)
    assert found.times[0] == pytest.approx(80 / 81)
    found.need(["double"])
    for ask in (lambda: found.need(["step"]), lambda: found.mask(4, found.times, Reuse(1))):
        with pytest.raises(FileRefused, match="some.json is of an older Nibble"):
            ask()
    again = calibration(sigmas=COSMOS, flow=FlowTime(mixes=False).to_json())
    again.need(["step"])
    assert sum(again.mask(4, again.times, Reuse(1))) == 4


WRONG = {
    "model": [[], {}, None, "Flux"],
    "run": [[], {}, None],
    "teacache": [[], {}, 3],
    "smoothcache": [[], None, {"step": []}, {"step": {}}],
    "grams": [[], None, [[[1.0]]], "no"],
    "model.fingerprint": [None, 3, "short"],
    "model.name": [None, 3],
    "run.sampler": [None, 1],
    "run.steps": [None, 0, -1, 5, 1e9, True],
    "run.prompts": [None, 0, 3],
    "run.sigmas": [None, [], [1.0], [1.0] * 6 + [None], [1.0] * 6 + [-1.0], [0.0] * 7],
    "run.latent": [None, ["a"]],
    "run.flow": [None, {}, {"mixes": True, "noise": 0, "data": 1}, {"mixes": 2}],
    "teacache.feature": [None, 5],
    "teacache.coefficients": [None, [], ["a"], [1.0] * 40],
    "teacache.x_min": [None, 0.9, -1.0],
    "teacache.r2": ["good"],
    "teacache.points": [None, [[1.0]], [1.0], [["a", "b"]]],
    "smoothcache.step": [None, {"mean": [], "half": [], "samples": 1}],
}


@pytest.mark.parametrize("where", WRONG)
def test_a_field_that_cannot_be_is_refused_also_without_a_sum(path, where):
    whole = path.read_bytes()
    for value in WRONG[where]:
        path.write_bytes(whole)

        def change(facts, value=value):
            *outer, name = where.split(".")
            for key in outer:
                facts = facts[key]
            facts[name] = value

        without_sum(path, change)
        with pytest.raises(FileRefused, match="^some.json is damaged: it .*; calibrate again"):
            read(path)
    path.write_bytes(whole)
    without_sum(path, lambda facts: facts.pop(where) if "." not in where else facts.pop("run"))
    with pytest.raises(FileRefused, match="^some.json is damaged"):
        read(path)


def test_numbers_are_finite_and_grams_are_inner_products(path):
    whole = path.read_bytes()
    for name, at in (("NaN", 0), ("Infinity", 1), ("1e999", 2)):
        path.write_bytes(whole)
        without_sum(path)
        path.write_text(path.read_text().replace("0.1,", f"{name},", at + 1))
        with pytest.raises(FileRefused, match="^some.json is"):
            read(path)
    for change in (
        lambda gram: gram.__setitem__(1, [0.0] * STEPS),
        lambda gram: gram[0].__setitem__(0, -1.0),
    ):
        path.write_bytes(whole)
        without_sum(path, lambda facts, change=change: change(facts["grams"][0]))
        with pytest.raises(FileRefused, match="no inner products"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b"[]",
        b'"nibble-cache/1"',
        b'{"format": []}',
        b'{"format": "nibble-cache/1"}',
        b'{"format": "nibble-cache/1", "format": "nibble-cache/1"}',
        b'{"format": "nibble-cache/1", "model": ' + b"9" * 5000 + b"}",
        b" " * (LARGEST + 1),
    ],
    ids=lambda content: content[:20],
)
def test_what_is_no_calibration_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(FileRefused, match="^some.json is "):
        read(path)


def test_a_run_that_gave_nan_is_not_written(path):
    broken, before = calibration(), path.read_bytes()
    broken.grams[0, 0, 0] = np.nan
    with pytest.raises(FileRefused, match="some.json was not written: the run"):
        broken.save(path)
    assert path.read_bytes() == before


def test_a_full_disk_is_said_and_leaves_nothing(path, monkeypatch):
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FileRefused, match="disk of .* is full: some.json"):
        calibration(seed=6).save(path)
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == ["some.json"]


def test_guesses_are_fitted_for_the_measured_schedule_and_sampler_alone():
    found, asked = calibration(), Reuse(1)
    mask = found.mask(4, found.times, asked)
    fitted = found.guesses(mask, found.times, found.run["sampler"], asked)
    skipped = [round(found.times[i], 6) for i, wanted in enumerate(mask) if not wanted]
    assert sorted(fitted.table) == sorted(skipped)
    other = [time**2 for time in found.times]
    assert found.guesses(mask, found.times, "another", asked) is asked
    assert found.guesses(mask, other, found.run["sampler"], asked) is asked
    fewer = found.times[:-1]
    assert found.guesses(mask[:-1], fewer, found.run["sampler"], asked) is asked
