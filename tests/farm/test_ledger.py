"""Where jobs stand, told by events; what an earlier run did; table, lines and report."""

import io
import json
import re

import pytest

from farm_runs import REPORT
from nibble.farm import report
from nibble.farm import table as table_file
from nibble.farm.jobs import Job
from nibble.farm.ledger import BEFORE, DONE, LOST, REFUSED, RUNNING, WAITING, Ledger, stamp
from nibble.farm.table import Lines, Table


@pytest.fixture
def jobs(tmp_path):
    found = []
    for name in "abc":
        source, target = tmp_path / f"{name}.safetensors", tmp_path / f"{name}-q.safetensors"
        source.write_bytes(b"source"), target.write_bytes(b"target")
        found.append(Job(target.name, source, target, "q", ("--rank=16",)))
    return found


def progress(job, done, weights, worker="w1"):
    facts = {"layers": [done, 4], "weights": [weights, 400], "layer": "x"}
    return {"event": "progress", "job": job.name, "worker": worker, **facts}


def of(job, event, **facts):
    return {"event": event, "job": job.name, "worker": "w1", "at": 1.0, "seconds": 90.0, **facts}


@pytest.fixture
def ledger(jobs):
    """One made, one refused, one at work."""
    ledger = Ledger(jobs)
    a, b, c = jobs
    for job in jobs:
        ledger.take(of(job, "started"))
    ledger.take(of(a, "report", report=REPORT, errors=[]))
    ledger.take(of(b, "refused", kind="FileRefused", sentence="b <is> damaged."))
    ledger.take(progress(c, 1, 100))
    ledger.take(progress(c, 2, 200))
    return ledger


def test_states_follow_events(ledger, jobs):
    a, b, c = (ledger.entries[job.name] for job in jobs)
    assert (a.state, b.state, c.state) == (DONE, REFUSED, RUNNING)
    assert a.result["db"] == 27.0 and a.result["worst_db"] == 24.0
    assert a.result["bytes_after"] == 6_600_000_000
    assert b.sentence == "b <is> damaged."
    assert (c.layers, c.weights) == ((2, 4), (200, 400))
    assert [entry.job for entry in ledger.open] == [jobs[2]]


def test_time_left_goes_by_the_speed_of_this_try_alone(ledger, jobs, monkeypatch):
    entry = ledger.entries[jobs[2].name]
    monkeypatch.setattr("nibble.farm.ledger.time.monotonic", lambda: entry.began + 10)
    # 100 weights in 10 s since its first line, 200 to go; the 100 of an earlier try do not count
    assert entry.left == 20
    ledger.take(of(jobs[2], "started"))
    assert entry.left is None


def test_what_another_run_is_writing_waits_with_a_note(ledger, jobs):
    ledger.take(of(jobs[2], "refused", kind="TargetBusy", sentence="c is being written."))
    assert [entry.job for entry in ledger.open] == [jobs[2]] and not ledger.ready()
    assert ledger.notes == ["c is being written. It is looked at again."]


def test_with_the_cluster_lost_what_was_at_work_waits_again(ledger, jobs):
    ledger.take({"event": "again"})
    assert [ledger.entries[job.name].state for job in jobs] == [DONE, REFUSED, WAITING]
    ledger.take(of(jobs[2], "started"))
    assert ledger.entries[jobs[2].name].workers == ["w1", "w1"]


def test_what_is_busy_is_not_called_away_by_what_comes_late(ledger, jobs):
    entry = ledger.entries[jobs[2].name]
    ledger.take(of(jobs[2], "refused", kind="TargetBusy", sentence="busy."))
    for event in ({"event": "again"}, progress(jobs[2], 3, 300), of(jobs[2], "alive")):
        ledger.take(event)
    assert entry.state == "written elsewhere"


@pytest.mark.parametrize(
    "event",
    [
        {"event": "report", "report": {}},
        {"event": "report"},
        {"event": "refused", "sentence": "x"},
        {"event": "progress", "layers": [1, 2]},
        {"event": "something new"},
    ],
    ids=lambda event: "-".join(event),
)
def test_a_worker_that_cannot_be_understood_costs_its_own_job_alone(jobs, event):
    ledger = Ledger(jobs)
    ledger.take({"job": jobs[0].name, "worker": "w9", **event})
    entry = ledger.entries[jobs[0].name]
    assert entry.state == LOST and entry.sentence.startswith("w9 says what this Nibble does not")
    assert len(ledger.open) == 2
    ledger.take({"event": "progress", "job": "of nobody"})


def test_what_has_ended_stays_ended(ledger, jobs):
    ledger.take(progress(jobs[0], 1, 1))
    ledger.take(of(jobs[0], "lost", sentence="late"))
    assert ledger.entries[jobs[0].name].state == DONE


def kept(ledger, tmp_path):
    report.write(tmp_path / "jobs-farm", ledger, 100)
    return report.earlier(tmp_path / "jobs-farm")


def test_the_next_run_does_not_do_again_what_lies_there_untouched(ledger, jobs, tmp_path):
    again = Ledger(jobs, kept(ledger, tmp_path))
    assert [entry.state for entry in again.entries.values()] == [BEFORE, WAITING, WAITING]
    assert again.entries[jobs[0].name].result == ledger.entries[jobs[0].name].result
    page = (tmp_path / "jobs-farm.html").read_text()
    assert "24.00 GB → 6.60 GB in 2 minutes" in page
    assert "24.00 GB → 6.60 GB, all of them in an earlier run; 2 not yet" in report.page(
        report.facts(again, 3)
    )
    third = Ledger(jobs, kept(again, tmp_path))  # its report tells it, too
    assert third.entries[jobs[0].name].state == BEFORE


@pytest.mark.parametrize("change", ["source", "target", "gone", "options"])
def test_what_was_touched_is_looked_at_again(ledger, jobs, tmp_path, change):
    earlier = kept(ledger, tmp_path)
    job = jobs[0]
    if change == "gone":
        job.target.unlink()
    elif change == "options":
        job = Job(job.name, job.source, job.target, "q", ("--rank=32",))
    else:
        getattr(job, change).write_bytes(b"another")
    assert Ledger([job], earlier).entries[job.name].state == WAITING


@pytest.mark.parametrize("name", ["workers", "result", "at", "stamps"])
def test_an_entry_that_somebody_wrote_into_is_none(ledger, jobs, tmp_path, name):
    earlier = kept(ledger, tmp_path)
    del earlier[jobs[0].name][name]
    assert Ledger(jobs, earlier).entries[jobs[0].name].state == WAITING


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "", "[]", "{}", '{"format": 0, "jobs": []}', '{"format": 1}']
)
def test_a_report_that_cannot_be_read_is_none(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert report.earlier(tmp_path / "x") == {}
    assert report.earlier(tmp_path / "y") == {}


def test_a_folder_is_stamped_by_its_files(tmp_path):
    before = stamp(tmp_path)
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").write_bytes(b"123")
    assert before == [] and stamp(tmp_path)[0] == 3


def test_the_page_tells_sizes_errors_time_worker_and_failures(ledger, tmp_path):
    report.write(tmp_path / "jobs-farm", ledger, 100)
    page = (tmp_path / "jobs-farm.html").read_text()
    assert "b &lt;is&gt; damaged." in page and "<is>" not in page
    row = re.search(r"<tr[^>]*><td>a-q.*?</tr>", page)[0]
    assert re.findall(r"<td>(.*?)</td>", row) == [
        "a-q.safetensors",
        "q",
        "24.00 GB",
        "6.60 GB",
        "27.0 dB",
        "24.0 dB",
        "2 minutes",
        "w1",
    ]
    assert "1 of 3 models quantized" in page
    found = json.loads((tmp_path / "jobs-farm.json").read_text())
    assert found["workers"] == {"w1": {"jobs": 1, "seconds": 90.0}}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_table_that_is_drawn_over(ledger, monkeypatch):
    monkeypatch.setattr("nibble.farm.table.APART", 0)
    out = Terminal()
    table = Table(ledger, out)
    table()
    first = out.getvalue()
    assert "made  a-q.safetensors  24.00 GB → 6.60 GB  27.0 dB  2 minutes  w1\n" in first
    assert "refused  b-q.safetensors: b <is> damaged.\n" in first
    assert re.search(r"c-q.safetensors +w1 +layer 2 of 4", first)
    assert "1 of 3 made; 1 failed; 1 not yet; about" in first
    table()
    second = out.getvalue()[len(first) :]
    assert second.startswith("\x1b[2F\x1b[J") and "a-q" not in second


def test_a_small_window_has_the_count_of_all_below_as_many_as_fit(jobs, monkeypatch):
    ledger = Ledger([Job(f"{i}", jobs[0].source, jobs[0].target, "q") for i in range(30)])
    for name in ledger.entries:
        ledger.take({"event": "started", "job": name, "worker": "w"})
    monkeypatch.setattr("nibble.farm.table.shutil.get_terminal_size", lambda: (20, 10))
    out = Terminal()
    Table(ledger, out)()
    lines = out.getvalue().splitlines()
    assert len(lines) == 8 and lines[-2:] == ["and 24 more", "0 of 30 made; 30 no"]


def test_a_name_cannot_command_a_terminal(jobs):
    ledger = Ledger([Job("a\x1b[2Jb", jobs[0].source, jobs[0].target, "q")])
    ledger.take({"event": "refused", "job": "a\x1b[2Jb", "kind": "", "sentence": "no\x07"})
    out = io.StringIO()
    Table(ledger, out)()
    assert out.getvalue() == "refused  a?[2Jb: no?\n"


def test_a_job_that_ended_before_it_was_told_has_its_worker(jobs):
    ledger = Ledger([jobs[0]])
    ledger.take(of(jobs[0], "report", report=REPORT, errors=[]))
    assert ledger.entries[jobs[0].name].workers == ["w1"]


def test_a_file_gets_a_line_for_each_job_that_ends(ledger, jobs):
    out = io.StringIO()
    table = Table(ledger, out)
    table(), table()
    assert len(out.getvalue().splitlines()) == 2
    ledger.note("something"), ledger.take(of(jobs[2], "lost", sentence="gone"))
    table()
    assert out.getvalue().splitlines()[2:] == ["note: something", "lost  c-q.safetensors: gone"]
    assert ledger.entries[jobs[2].name].state == LOST


def test_a_program_gets_json(ledger):
    out = io.StringIO()
    lines = Lines(ledger, out)
    lines(), lines()
    (line,) = map(json.loads, out.getvalue().splitlines())
    assert (line["jobs"], line["made"], line["failed"]) == (3, 1, 1)
    assert line["running"] == [{"job": "c-q.safetensors", "worker": "w1", "layers": [2, 4]}]
    assert line["ended"] == {"a-q.safetensors": "done", "b-q.safetensors": "b <is> damaged."}


def test_a_program_gets_a_note_although_nothing_else_has_changed(ledger, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(table_file, "APART", 0.0)
    lines = Lines(ledger, out)
    lines()
    ledger.note("no machine has a GPU")
    lines()
    last = json.loads(out.getvalue().splitlines()[-1])
    assert last["notes"] == ["no machine has a GPU"]
