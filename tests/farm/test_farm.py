"""The command, from a jobs file to files and a report, without a cluster."""

import importlib
import json
import os
import signal

import pytest

from farm_runs import farm_of, job_of, pretending_pack, small_model
from nibble.farm import watch
from nibble.farm.in_order import InOrder
from nibble.farm.jobs import Order
from nibble.farm.ledger import Ledger
from nibble.farm.run import Farm

cli = importlib.import_module("nibble.__main__")
ONE = ["--rank", "16", "--solver", "svd", "--memory-cap", "0"]


def found(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*-q.safetensors"))}


def events_of(runner, last):
    events = []
    while not any(event["event"] == last for event in events):
        events += runner.poll(1)
    return events


def test_a_jobs_file_in_order_gives_what_quantize_gives_and_nothing_the_second_time(
    tmp_path, capsys
):
    jobs = farm_of(tmp_path / "farm", 2)
    for number in range(2):
        source = str(jobs.parent / f"m{number}.safetensors")
        assert cli.main(["quantize", source, str(tmp_path / f"m{number}-q.safetensors"), *ONE]) == 0
    alone = {path.name: path.read_bytes() for path in tmp_path.glob("*-q.safetensors")}
    assert cli.main(["farm", str(jobs), "--in-order"]) == 0
    assert found(jobs.parent) == alone
    report = json.loads((jobs.parent / "jobs-farm.json").read_text())
    assert {job["state"] for job in report["jobs"]} == {"done"}
    capsys.readouterr()
    times = [path.stat().st_mtime_ns for path in sorted(jobs.parent.rglob("*-q.safetensors"))]
    assert cli.main(["farm", str(jobs), "--in-order"]) == 0
    assert "2 of 2 made, 2 of them before" in capsys.readouterr().out
    assert times == [path.stat().st_mtime_ns for path in sorted(jobs.parent.rglob("*-q*"))]


def test_a_damaged_model_does_not_stop_the_others_and_is_told(tmp_path, capsys):
    jobs = farm_of(tmp_path, 2)
    damaged = tmp_path / "m0.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    assert cli.main(["farm", str(jobs), "--in-order"]) == 1
    out, err = capsys.readouterr()
    assert list(found(tmp_path)) == ["m1-q.safetensors"]
    assert "refused  quantized/m0-q.safetensors: m0.safetensors" in out
    assert "1 could not be made" in err


def test_a_folder_with_recipes(tmp_path, capsys):
    small_model(tmp_path / "a.safetensors")
    options = "--rank 16 --solver svd --memory-cap 0"
    assert cli.main(["farm", str(tmp_path), "--in-order", "--recipe", f"q={options}"]) == 0
    assert list(found(tmp_path)) == ["a-q.safetensors"]
    assert cli.main(["farm", str(tmp_path / "quantized")]) == 1
    assert "no model that could be quantized" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["jobs.json", "--watch"], "--watch is for a folder"),
        (["jobs.json", "--in-order", "--address", "x:1"], "give one of them"),
        (["nowhere.json"], "nowhere.json cannot be read"),
        ([".", "--recipe", "q=--rank x"], "--recipe q: argument --rank"),
    ],
)
def test_a_slip_on_the_command_line_is_told(tmp_path, monkeypatch, capsys, words, sentence):
    farm_of(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["farm", *words]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "quantized").exists()


def test_a_job_that_was_killed_is_begun_again_a_few_times(tmp_path):
    code = f"os.kill(os.getpid(), {int(signal.SIGKILL)})"
    runner = InOrder()
    runner.submit(job_of(pretending_pack(tmp_path, code + " if not os.path.exists('x') else 0")))
    assert events_of(runner, "lost")[-1]["sentence"].startswith("the quantization on")
    flag = tmp_path / "flag"
    code = (
        f"again = os.path.exists({str(flag)!r}); open({str(flag)!r}, 'w').close()\n"
        f"say('report', report=1, errors=[]) if again else {code}"
    )
    runner.submit(job_of(pretending_pack(tmp_path / "2", code), retries=1))
    assert events_of(runner, "report")[-1]["report"] == 1
    runner.close()


def test_closing_ends_the_job_that_is_under_way(tmp_path):
    code = "say('progress', layers=[0, 1], weights=[0, 1], pid=os.getpid())\ntime.sleep(600)"
    runner = InOrder()
    runner.submit(job_of(pretending_pack(tmp_path, code), retries=3))
    pid = events_of(runner, "progress")[-1]["pid"]
    runner.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


class Scripted:
    """A runner that ends every job as its name says."""

    def __init__(self):
        self.submitted, self.events, self.closed = [], [], False

    def submit(self, job):
        self.submitted.append(job["id"])
        self.events += [{"event": "refused", "kind": "x", "sentence": "s", "job": job["id"]}]

    def poll(self, seconds):
        events, self.events = self.events, []
        return events

    def close(self):
        self.closed = True


def test_the_largest_model_goes_first(tmp_path):
    jobs = []
    for name, hidden in (("small", 128), ("large", 256), ("middle", 192)):
        source = small_model(tmp_path / f"{name}.safetensors", hidden=hidden)
        jobs += Order(tmp_path).jobs_of(source)
    runner = Scripted()
    Farm(Ledger(jobs), runner).run()
    assert [name.split("/")[1].split("-")[0] for name in runner.submitted] == [
        "large",
        "middle",
        "small",
    ]
    assert runner.closed


def test_a_target_that_another_farm_writes_is_looked_at_again(tmp_path, monkeypatch):
    monkeypatch.setattr("nibble.farm.run.AGAIN", 0)
    (job,) = Order(tmp_path).jobs_of(small_model(tmp_path / "m.safetensors"))
    runner = Scripted()
    busy = {"event": "refused", "kind": "TargetBusy", "sentence": "busy", "job": job.name}
    plain = runner.submit
    runner.submit = lambda given: (
        plain(given) if runner.submitted.count(job.name) else _busy(runner, busy)
    )
    ledger = Ledger([job])
    Farm(ledger, runner).run()
    assert runner.submitted == [job.name, job.name]
    assert ledger.entries[job.name].state == "refused"


def _busy(runner, event):
    runner.submitted.append(event["job"])
    runner.events.append(event)


def test_a_watched_folder_gives_models_that_lie_still(tmp_path):
    look = watch.Watch(Order(tmp_path, {"q": (), "r": ()}), every=0)
    assert look() == []
    first = small_model(tmp_path / "a.safetensors")
    assert look() == []  # new: it may still be coming
    assert [job.recipe for job in look()] == ["q", "r"]
    second = small_model(tmp_path / "b.safetensors")
    assert look() == []
    os.utime(second, (0, 0))
    assert look() == []  # it has changed
    assert [job.source for job in look()] == [second, second]
    assert look() == [] and first.exists()


def test_a_copy_that_had_stalled_is_made_when_it_is_whole(tmp_path):
    look = watch.Watch(Order(tmp_path, {"q": ()}), every=0)
    whole = small_model(tmp_path / "whole.bin")
    (tmp_path / "a.safetensors").write_bytes(whole.read_bytes()[:1000])
    runner, ledger = Scripted(), Ledger()
    farm = Farm(ledger, runner, more=lambda: None)
    look()
    farm._add(*look())
    ledger.end(next(iter(ledger.entries.values())).job, "refused", "cut off")
    (tmp_path / "a.safetensors").write_bytes(whole.read_bytes())
    assert look() == []
    farm._add(*look())
    assert [entry.state for entry in ledger.entries.values()] == ["waiting"]


def test_two_models_of_one_target_in_a_watched_folder_are_told(tmp_path):
    (tmp_path / "b").mkdir()
    order, ledger = Order(tmp_path), Ledger()
    farm = Farm(ledger, Scripted())
    for folder in (tmp_path, tmp_path / "b"):
        farm._add(*order.jobs_of(small_model(folder / "s.safetensors")))
    assert len(ledger.entries) == 1
    assert "b/s.safetensors was left out" in ledger.notes[0]


def test_a_report_that_cannot_be_written_is_told_before_any_work(tmp_path, capsys):
    jobs = farm_of(tmp_path, 1)
    assert cli.main(["farm", str(jobs), "--in-order", "--report", str(tmp_path / "no" / "r")]) == 1
    assert "r.json" in capsys.readouterr().err
    assert not (tmp_path / "quantized").exists()


@pytest.mark.parametrize(("asked", "threads"), [(True, "1"), (False, "7")])
def test_alone_on_a_machine_a_job_has_all_threads_unless_told(
    tmp_path, monkeypatch, asked, threads
):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    runner = InOrder()
    code = "say('report', report=os.environ['OMP_NUM_THREADS'], errors=[])"
    runner.submit(job_of(pretending_pack(tmp_path, code)) | {"asked": asked})
    assert events_of(runner, "report")[-1]["report"] == threads
    runner.close()


def test_a_job_that_cannot_even_be_begun_does_not_stop_the_others(tmp_path):
    runner = InOrder()
    pack = pretending_pack(tmp_path, "say('report', report=1, errors=[])")
    runner.submit(job_of(pack, "a\0b"))
    runner.submit(job_of(pack) | {"id": "other"})
    events = events_of(runner, "report")
    assert [event["job"] for event in events if event["event"] in ("lost", "report")] == [
        "m.safetensors",
        "other",
    ]
    runner.close()


def test_one_model_in_parts_gives_the_bytes_of_one_run(tmp_path, capsys):
    jobs = farm_of(tmp_path / "farm", 1)
    source = str(jobs.parent / "m0.safetensors")
    assert cli.main(["quantize", source, str(tmp_path / "m0-q.safetensors"), *ONE]) == 0
    content = json.loads(jobs.read_text())
    job = {"source": "m0.safetensors", "recipe": "q", "parts": 3}
    jobs.write_text(json.dumps({"recipes": content["recipes"], "jobs": [job]}))
    capsys.readouterr()
    assert cli.main(["farm", str(jobs), "--in-order"]) == 0
    assert found(jobs.parent) == {"m0-q.safetensors": (tmp_path / "m0-q.safetensors").read_bytes()}
    assert not list(jobs.parent.rglob("*.part*"))
    assert "1 of 1 made" in capsys.readouterr().out
    (told,) = json.loads((jobs.parent / "jobs-farm.json").read_text())["jobs"]
    assert (told["parts"], len(told["workers"])) == (3, 4)
    assert told["seconds"] > 4 * told["result"]["seconds"]  # of all its parts, not of joining them
    assert cli.main(["farm", str(jobs), "--in-order"]) == 0
    assert "1 of 1 made, 1 of them before" in capsys.readouterr().out


def test_what_is_refused_of_a_part_is_refused_of_the_whole(tmp_path, capsys):
    jobs = farm_of(tmp_path, 1)
    job = {"source": "m0.safetensors", "parts": 2, "options": {"activations": "auto"}}
    jobs.write_text(json.dumps({"jobs": [job]}))
    assert cli.main(["farm", str(jobs), "--in-order"]) == 1
    out = capsys.readouterr().out
    assert out.count("refused  quantized/m0-svdq.safetensors: ") == 1
    assert "0 of 1 made; 1 failed" in out
