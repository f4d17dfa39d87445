"""One job on one machine: the command line as a process, and what comes back of it."""

import os
import signal

import pytest

from farm_runs import REPORT, job_of, pretending_pack
from nibble.farm import work


def run(folder, code, **job):
    told = []
    pack = pretending_pack(folder, code)
    return work.run(job_of(pack, "quantize", "a", "b") | job, told.append), told


def test_progress_is_told_and_the_report_comes_back(tmp_path):
    answer, told = run(
        tmp_path,
        f"say('progress', layers=[1, 2], weights=[3, 4], layer='x')\n"
        f"print('a package that prints'); print('3')\n"
        f"say('report', report={REPORT!r}, errors=[])",
    )
    assert told == [{"event": "progress", "layers": [1, 2], "weights": [3, 4], "layer": "x"}]
    assert answer["report"] == REPORT
    assert answer["worker"] == work.name() and answer["seconds"] > 0


def test_the_command_gets_its_words_and_threads(tmp_path):
    code = "say('refused', kind='', sentence=' '.join([*words, os.environ['OMP_NUM_THREADS']]))"
    answer, _ = run(tmp_path, code + "; sys.exit(1)", threads=3)
    assert answer["sentence"] == "quantize a b 3"


def test_what_is_refused_in_words_is_no_failure_of_the_machine(tmp_path):
    answer, _ = run(tmp_path, "sys.exit('nibble: no such thing')")
    assert (answer["event"], answer["sentence"]) == ("refused", "no such thing")
    answer, _ = run(tmp_path, "1 / 0")
    assert answer["sentence"] == "ZeroDivisionError: division by zero"


def test_what_was_killed_may_be_done_elsewhere(tmp_path):
    with pytest.raises(ChildProcessError, match=f"signal {int(signal.SIGKILL)}; last words"):
        run(tmp_path, "sys.stderr.write('last words'); os.kill(os.getpid(), signal.SIGKILL)")


def test_an_end_without_a_word_is_one_by_force(tmp_path):
    with pytest.raises(ChildProcessError, match="code 1"):  # so Windows ends a process
        run(tmp_path, "os._exit(1)")


def test_a_python_that_is_not_there_is_told(tmp_path):
    answer, _ = run(tmp_path, "", python=str(tmp_path / "python"))
    assert answer["event"] == "refused"
    assert "cannot be started" in answer["sentence"]


def test_a_target_that_another_run_is_letting_go_is_waited_for(tmp_path):
    code = (
        "again = os.path.exists('flag')\nopen('flag', 'w').close()\n"
        "if again: say('report', report={}, errors=[])\n"
        "else: say('refused', kind='TargetBusy', sentence='busy'); sys.exit(1)"
    ).replace("'flag'", repr(str(tmp_path / "flag")))
    assert run(tmp_path / "p", code)[0]["event"] == "report"
    os.unlink(tmp_path / "flag")
    answer, _ = run(tmp_path / "p", code, patience=0)
    assert (answer["kind"], answer["sentence"]) == ("TargetBusy", "busy")
