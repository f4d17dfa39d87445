"""One checkpoint by several workers: parts that are joined into the bytes of one run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import encoder_shapes
import nibble
import random_flux
from nibble.__main__ import main
from nibble.quant.files import atomic
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.part_files import PartName
from nibble.quant.files.safetensors import read_header
from nibble.quant.files.stored_tensors import SafetensorsFiles
from part_runs import INT4, METHODS, joined, make_parts, qwen_shapes

ROOT = Path(__file__).resolve().parents[2]
COUNTS = (1, 2, 3, 5)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return random_flux.write(tmp_path_factory.mktemp("source") / "m.safetensors", qwen_shapes())


@pytest.fixture(scope="module")
def one_run(source, tmp_path_factory):
    """Of each method: the bytes of a single run, and its report."""
    made = {}

    def of(method):
        if method not in made:
            target = tmp_path_factory.mktemp("whole") / "q.safetensors"
            report = nibble.quantize(source, target, **METHODS[method])
            made[method] = target.read_bytes(), report
        return made[method]

    return of


@pytest.mark.parametrize("method", METHODS)
def test_parts_joined_are_the_bytes_of_one_run(source, tmp_path, one_run, method):
    options, (wanted, report) = METHODS[method], one_run(method)
    for count in COUNTS:
        target = tmp_path / f"{count}.safetensors"
        make_parts(source, target, count, **options)
        assert len(list(tmp_path.glob(f"{count}.safetensors.part*of{count}"))) == count
        found = joined(source, target, count, **options)
        assert target.read_bytes() == wanted
        assert found.to_json(seconds=False) == report.to_json(seconds=False)
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}.safetensors" for n in COUNTS}


def test_a_text_encoder_with_its_table_of_words_is_made_in_parts(tmp_path):
    shapes = encoder_shapes.t5(2, 128, 128, 256, 512, 2)
    source = random_flux.write(tmp_path / "t5.safetensors", shapes)
    nibble.quantize(source, tmp_path / "whole.safetensors", quiet=True)
    target = tmp_path / "q.safetensors"
    make_parts(source, target, 3, quiet=True)
    joined(source, target, 3, quiet=True)
    assert target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def layers_of(part):
    return [row["name"] for row in json.loads(read_header(part).metadata["report"])["rows"]]


def test_a_missing_part_and_a_damaged_layer_are_made_by_the_joining_run(
    source, tmp_path, one_run, caplog, fitted
):
    target, (wanted, report) = tmp_path / "q.safetensors", one_run("int4")
    fitted[:] = []
    make_parts(source, target, 5, 1, 3, 4, 5, **INT4)
    missing = {row.name for row in report.rows if row.action != "keep"} - set(fitted)
    cut, changed = PartName(target, 3, 5).path, PartName(target, 4, 5).path
    name, info = next(iter(read_header(changed).tensors.items()))
    missing |= {*layers_of(cut), name.rpartition(".")[0]}
    cut.write_bytes(cut.read_bytes()[:-7])
    with open(changed, "r+b") as file:
        file.seek(info.start)
        file.write(b"?")
    fitted[:] = []
    joined(source, target, 5, **INT4)
    assert target.read_bytes() == wanted
    assert sorted(fitted) == sorted(missing)
    assert os.listdir(tmp_path) == ["q.safetensors"]
    told = "\n".join(caplog.messages)
    assert "q.safetensors.part3of5 is cut off" in told
    assert f"q.safetensors.part4of5 is damaged: {name}" in told
    assert "part1of5" not in told


DYING = """
    import os, signal, sys
    sys.path.insert(0, {tests!r})
    import checkout
    import nibble
    from nibble.quant.files.writer import Writer
    write, written = Writer.write, []
    def dying(writer, *unit):
        write(writer, *unit)
        written.append(unit)
        if len(written) == {after}:
            os.kill(os.getpid(), signal.SIGKILL)
    Writer.write = dying
    nibble.quantize({source!r}, {target!r}, **{options!r})
"""


def killed(source, target, after, **options):
    """A run in a process of its own, killed when it has written so many units."""
    code = textwrap.dedent(DYING).format(
        tests=str(ROOT / "tests" / "support"),
        source=str(source),
        target=str(target),
        after=after,
        options=options,
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment)
    assert run.returncode == -signal.SIGKILL, run.stderr


@pytest.fixture
def units(monkeypatch):
    """The layers that are written from now on."""
    from nibble.quant.files.writer import Writer

    real, written = Writer.write, []

    def write(writer, unit, *rest):
        written.append((writer.target.name, unit))
        real(writer, unit, *rest)

    monkeypatch.setattr(Writer, "write", write)
    return written


@pytest.fixture
def fitted(monkeypatch):
    """The layers that are quantized from now on, and not copied."""
    from nibble.quant.svdquant import quantize as pipeline

    real, layers = pipeline.SVDQuantizer._quantized, []

    def quantized(self, layer, *rest):
        layers.append(layer.name)
        return real(self, layer, *rest)

    monkeypatch.setattr(pipeline.SVDQuantizer, "_quantized", quantized)
    return layers


def test_a_part_that_was_killed_goes_on_after_its_last_layer(source, tmp_path, one_run, units):
    target, (wanted, _) = tmp_path / "q.safetensors", one_run("int4")
    killed(source, target, 4, part="1/2", **INT4)
    assert not PartName(target, 1, 2).path.exists()
    make_parts(source, target, 2, 1, **INT4)
    resumed = [unit for _, unit in units]
    assert resumed == layers_of(PartName(target, 1, 2).path)[4:]
    make_parts(source, target, 2, 2, **INT4)
    joined(source, target, 2, **INT4)
    assert target.read_bytes() == wanted


def test_the_joining_run_takes_over_what_a_killed_part_had_finished(
    source, tmp_path, one_run, fitted
):
    target, (wanted, report) = tmp_path / "q.safetensors", one_run("int4")
    killed(source, target, 4, part="1/2", **INT4)
    make_parts(source, target, 2, 2, **INT4)
    of_part, fitted[:] = len(fitted), []
    joined(source, target, 2, **INT4)
    made = sum(row.action != "keep" for row in report.rows)
    assert len(fitted) == made - of_part - 4
    assert target.read_bytes() == wanted
    assert os.listdir(tmp_path) == ["q.safetensors"]


def test_a_joining_run_that_was_killed_goes_on_and_makes_no_layer_anew(
    source, tmp_path, one_run, fitted
):
    target, (wanted, _) = tmp_path / "q.safetensors", one_run("int4")
    make_parts(source, target, 2, **INT4)
    fitted[:] = []
    killed(source, target, 7, parts=2, **INT4)
    joined(source, target, 2, **INT4)
    assert target.read_bytes() == wanted
    assert fitted == []


def test_parts_left_by_a_run_that_died_at_its_end_are_removed(source, tmp_path):
    target = tmp_path / "q.safetensors"
    make_parts(source, target, 2, **INT4)
    left = PartName(target, 2, 2).path
    kept = left.read_bytes()
    joined(source, target, 2, **INT4)
    left.write_bytes(kept)
    joined(source, target, 2, **INT4)
    assert os.listdir(tmp_path) == ["q.safetensors"]


def test_a_finished_part_and_a_finished_target_are_not_made_again(source, tmp_path, units):
    target = tmp_path / "q.safetensors"
    make_parts(source, target, 2, **INT4)
    first = PartName(target, 1, 2).path
    before, units[:] = first.stat().st_mtime_ns, []
    report = nibble.quantize(source, target, part="1/2", **INT4)
    assert (units, first.stat().st_mtime_ns) == ([], before)
    assert {row.name for row in report.rows} == {
        name.rpartition(".")[0] for name in read_header(first).tensors
    }
    assert report.bytes_after == first.stat().st_size
    joined(source, target, 2, **INT4)
    units[:] = []
    make_parts(source, target, 2, **INT4)  # a worker that comes late
    assert units == []
    assert os.listdir(tmp_path) == ["q.safetensors"]


def test_two_workers_do_not_make_one_part(source, tmp_path):
    target = tmp_path / "q.safetensors"
    with atomic.exclusive(PartName(target, 1, 2).path):
        with pytest.raises(FileRefused, match="q.safetensors.part1of2 is being written by another"):
            make_parts(source, target, 2, 1, **INT4)
        with pytest.raises(FileRefused, match="q.safetensors.part1of2 is being written by another"):
            joined(source, target, 2, **INT4)
        make_parts(source, target, 2, 2, **INT4)
    joined(source, target, 2, **INT4)


def test_a_part_reads_its_own_layers_alone(source, tmp_path, monkeypatch):
    target, read = tmp_path / "q.safetensors", set()
    for name in ("read", "sample"):
        real = getattr(SafetensorsFiles, name)

        def noted(self, tensor, *rest, real=real):
            read.add(tensor.rpartition(".")[0])
            return real(self, tensor, *rest)

        monkeypatch.setattr(SafetensorsFiles, name, noted)
    seen = []
    for number in (1, 2, 3):
        read.clear()
        report = nibble.quantize(source, target, part=f"{number}/3", **INT4)
        assert read == {row.name for row in report.rows}
        seen += read
    assert len(seen) == len(set(seen))


def test_the_commands_tell_what_they_made(source, tmp_path, capsys):
    target = str(tmp_path / "q.safetensors")
    command = ["quantize", str(source), target, "--rank", "16", "--solver", "svd"]
    assert main([*command, "--part", "1/2"]) == 0
    assert capsys.readouterr().out.startswith(f"{target}.part1of2\n")
    assert main([*command, "--parts", "2"]) == 0
    assert capsys.readouterr().out.startswith(f"{target}\n")


def test_a_part_is_told_from_other_files(source, tmp_path):
    target = tmp_path / "q.safetensors"
    make_parts(source, target, 2, 1, **INT4)
    part = PartName(target, 1, 2).path
    facts = nibble.inspect(part, verify=True)
    assert facts["kind"].startswith("part 1 of 2 of a quantized model")
    assert facts["layers"] == len(layers_of(part))
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    with pytest.raises(FileRefused, match="is damaged"):
        nibble.inspect(part, verify=True)
