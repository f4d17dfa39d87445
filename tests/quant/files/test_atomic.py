"""One run at a time, room before the work, and nothing left behind."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import filelock
import pytest
import torch

from nibble.quant.files import atomic, small
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.safetensors import TensorSpec
from nibble.quant.files.writer import Writer

SUPPORT = Path(__file__).resolve().parents[2] / "support"


def test_of_many_processes_that_want_one_file_one_at_a_time_has_it(tmp_path):
    """Each takes the lock as often as it gets it, and writes its own name into the target for as
    long as it holds it: nobody ever finds another's name there.
    """
    code = (
        "import sys, os, time, pathlib, checkout;"
        "from nibble.quant.files import atomic;"
        "from nibble.quant.files.errors import FileRefused\n"
        "target, me = pathlib.Path(sys.argv[1]), sys.argv[2]\n"
        "held, end = 0, time.monotonic() + 2\n"
        "while time.monotonic() < end or not held:\n"
        "    try:\n"
        "        with atomic.exclusive(target):\n"
        "            target.write_text(me)\n"
        "            time.sleep(0.0005)\n"
        "            assert target.read_text() == me\n"
        "            held += 1\n"
        "    except FileRefused as error:\n"
        "        assert 'is being written by another run' in str(error)\n"
        "print(held)\n"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "t"), str(i)],
            cwd=SUPPORT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    held = [int(run.communicate()[0]) for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert min(held) > 0
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.skipif(os.name == "nt", reason="Windows removes no file that is open")
def test_a_lock_whose_file_was_removed_meanwhile_excludes_nobody(tmp_path, monkeypatch):
    """Between our opening of the lock's file and our locking it, its holder removes it, and another
    run locks a new one of that name.
    """
    target, path = tmp_path / "t", tmp_path / "t.partial.lock"
    other, acquire, calls = filelock.FileLock(path), filelock.FileLock.acquire, []

    def late(lock, *arguments, **options):
        calls.append(lock)
        if len(calls) > 1:
            return acquire(lock, *arguments, **options)
        result = acquire(lock, *arguments, **options)
        path.unlink()
        acquire(other, timeout=0)
        return result

    monkeypatch.setattr(filelock.FileLock, "acquire", late)
    with pytest.raises(FileRefused, match="another run"), atomic.exclusive(target):
        pass
    assert len(calls) == 2
    other.release()


def test_a_held_target_is_written_to_under_the_same_lock(tmp_path):
    target = tmp_path / "a.safetensors"
    with atomic.exclusive(target) as held:
        small.write(held, {"x": torch.ones(2)}, {"format": "f"})
        with Writer(held, [TensorSpec("x", torch.float32, (2,))], "run", 0) as writer:
            writer.write("x", {"x": torch.zeros(2)}, {})
            writer.finish([{}])
        with pytest.raises(FileRefused, match="another run"):
            small.write(target, {}, {})
    small.write(target, {"x": torch.ones(2)}, {"format": "f"})
    assert os.listdir(tmp_path) == [target.name]


def test_room_is_asked_for_before_the_work(tmp_path, monkeypatch):
    atomic.reserve(tmp_path / "t", 10_000)
    assert not os.listdir(tmp_path)
    with pytest.raises(FileRefused, match=r"The disk of .* is full: t needs 1000000000.00 GB"):
        atomic.reserve(tmp_path / "t", 10**18)

    def quota(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", quota)
    with pytest.raises(FileRefused, match=r"The disk of .* is full: t needs"):
        atomic.reserve(tmp_path / "t", 10_000)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_a_file_that_is_in_use_is_not_called_a_read_only_folder(tmp_path, monkeypatch, code):
    """What Windows says where the target is mapped into memory."""
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")

    def denied(*_):
        raise OSError(code, "Access is denied")

    monkeypatch.setattr(os, "replace", denied)
    with pytest.raises(FileRefused, match="a.safetensors may not be replaced .* unload the model"):
        small.write(target, {"x": torch.ones(2)}, {})
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == [target.name]


def test_what_no_run_can_go_on_from_is_removed(tmp_path):
    partial, journal = tmp_path / "t.partial", tmp_path / "t.partial.journal"
    for left in ([journal], [partial], [tmp_path / "t.partial.journal.new"]):
        for path in left:
            path.touch()
        with atomic.exclusive(tmp_path / "t"):
            pass
        assert not os.listdir(tmp_path)
    partial.touch()
    journal.touch()
    with atomic.exclusive(tmp_path / "t"):
        pass
    assert len(os.listdir(tmp_path)) == 2, "an unfinished file of another run is gone on with"


def test_json_comes_back_and_any_change_of_it_is_found():
    content = {"b": [1, {"c": None}], "a": "ä"}
    text = small.json_bytes(content)
    assert text == small.json_bytes(dict(reversed(content.items())))
    assert small.json_content(text) == content
    assert small.json_content(b'{"a": 1}') == {"a": 1}, "of an earlier version"
    with pytest.raises(ValueError, match="does not match its checksum"):
        small.json_content(text.replace(b"1", b"2", 1))
