"""`quantize --driven`: lines for a program, an end when its input ends, and the same bytes."""

import json
import subprocess
import sys

from checkout import ROOT
from farm_runs import small_model
from nibble.quant.files import unfinished

QUICK = ["--rank", "16", "--solver", "svd", "--memory-cap", "0"]


def start(*words):
    command = [sys.executable, str(ROOT), "quantize", *map(str, words), *QUICK]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)


def lines(process):
    """All that it says; its input stays open meanwhile."""
    with process:
        found = [json.loads(line) for line in process.stdout]
        return found, process.stderr.read().decode()


def test_progress_the_report_and_the_same_bytes(tmp_path):
    source = small_model(tmp_path / "m.safetensors")
    plain, driven = tmp_path / "plain.safetensors", tmp_path / "driven.safetensors"
    assert start(source, plain).wait(120) == 0
    process = start(source, driven, "--driven")
    found, said = lines(process)
    assert process.returncode == 0, said
    assert driven.read_bytes() == plain.read_bytes()
    *progress, last = found
    assert {line["event"] for line in progress} == {"progress"}
    done, of = progress[-1]["layers"]
    assert done == of == len(last["report"]["rows"])
    assert progress[-1]["weights"][0] == progress[-1]["weights"][1] > 0
    assert last["event"] == "report"
    assert last["report"]["bytes_after"] == driven.stat().st_size


def test_what_is_refused_is_a_line_and_an_exit_code(tmp_path):
    process = start(tmp_path / "none.safetensors", tmp_path / "t.safetensors", "--driven")
    found, said = lines(process)
    assert process.returncode == 1
    assert [line["event"] for line in found] == ["refused"]
    assert "none.safetensors" in found[0]["sentence"] and found[0]["sentence"] in said


def test_it_ends_with_its_input_and_goes_on_the_next_time(tmp_path):
    source = small_model(tmp_path / "m.safetensors", hidden=384, single=4)
    target = tmp_path / "t.safetensors"
    process = start(source, target, "--driven")
    for line in process.stdout:
        if json.loads(line).get("layers", [0])[0] >= 2:
            break
    process.stdin.close()
    assert process.wait(30) == 130
    (left,) = unfinished.found_in([tmp_path])
    assert left.held_since is None and not target.exists()
    again = start(source, target, "--driven")
    _, said = lines(again)
    assert again.returncode == 0 and "resuming" in said
    assert not unfinished.found_in([tmp_path])
