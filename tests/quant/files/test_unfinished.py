"""Unfinished files of stopped runs: found with their size, told from those at work, removed."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nibble.__main__ import main
from nibble.quant.files import atomic, unfinished
from nibble.quant.files.errors import FileRefused

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def left(tmp_path):
    """A folder with two unfinished files, one of them deeper, and a finished one."""
    (tmp_path / "deeper").mkdir()
    for name, size in (("a.safetensors", 1000), ("deeper/b.safetensors", 3000)):
        (tmp_path / f"{name}.partial").write_bytes(bytes(size))
        (tmp_path / f"{name}.partial.journal").write_text("{}\n")
    (tmp_path / "c.safetensors").write_bytes(bytes(7))
    return tmp_path


def test_every_unfinished_file_is_found_with_its_size(left):
    found = unfinished.found_in([left, left / "deeper"])
    assert [(file.target.name, file.bytes, file.held_since) for file in found] == [
        ("a.safetensors", 1003, None),
        ("b.safetensors", 3003, None),
    ]


def test_looking_changes_nothing(left):
    before = {path: path.stat().st_mtime_ns for path in left.rglob("*")}
    unfinished.found_in([left])
    assert {path: path.stat().st_mtime_ns for path in left.rglob("*")} == before


def test_removing_takes_what_lies_beside_the_target_and_not_the_target(left):
    (left / "a.safetensors").write_bytes(b"an older one")
    assert unfinished.remove(left / "a.safetensors") == 1003
    assert sorted(os.listdir(left)) == ["a.safetensors", "c.safetensors", "deeper"]


def test_a_file_at_work_is_told_with_its_time_and_is_not_removed(left):
    """By another program, as the lock sees it."""
    target = left / "a.safetensors"
    code = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(ROOT.parent)!r})
        from pathlib import Path
        from nibble.quant.files import atomic
        with atomic.exclusive(Path({str(target)!r})):
            print("held", flush=True)
            sys.stdin.read()
        """
    )
    began = time.time()
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline().strip() == b"held"
    for _ in range(2):  # asking does not change the answer
        (file, _) = unfinished.found_in([left])
        assert began - 2 <= file.held_since <= time.time()
    clock = time.strftime("%H:%M", time.localtime(file.held_since))
    with pytest.raises(FileRefused, match=f"of another program, since {clock}"):
        unfinished.remove(target)
    holder.communicate()
    assert target.with_name("a.safetensors.partial").exists()
    assert unfinished.found_in([left])[0].held_since is None


def test_the_same_job_taken_up_twice_says_that_this_program_has_it(tmp_path):
    target = tmp_path / "q.safetensors"
    with (
        atomic.exclusive(target),
        pytest.raises(FileRefused, match="of this program, since"),
        atomic.exclusive(target),
    ):
        pass


def test_the_command_lists_and_removes(left, capsys):
    assert main(["partials", str(left)]) == 0
    told = capsys.readouterr().out
    assert str(left / "a.safetensors") in told
    assert "--remove gives its room back" in told
    assert main(["partials", str(left), "--remove"]) == 0
    capsys.readouterr()
    assert main(["partials", str(left)]) == 0
    assert capsys.readouterr().out == "no unfinished files\n"


def test_parts_that_wait_to_be_joined_are_found_and_removed(left, capsys):
    part = left / "a.safetensors.part1of2"
    part.write_bytes(bytes(50))
    (left / "b.safetensors.part2of2.partial").write_bytes(bytes(20))
    found = {file.target.name: (file.bytes, file.part_of) for file in unfinished.found_in([left])}
    assert found["a.safetensors.part1of2"] == (50, left / "a.safetensors")
    assert found["b.safetensors.part2of2"] == (20, left / "b.safetensors")
    assert main(["partials", str(left)]) == 0
    told = capsys.readouterr().out
    assert f"{part}  (a finished part of a.safetensors, joined by --parts)" in told
    assert unfinished.remove(part) == 50
    assert not part.exists()


@pytest.mark.parametrize("held", ["a.safetensors", "a.safetensors.part2of2"])
def test_a_part_stays_while_a_run_is_at_work_on_its_fellows(left, held):
    part, stranger = left / "a.safetensors.part1of2", left / "a.safetensors.part1of3"
    for path in (part, stranger):
        path.write_bytes(bytes(50))
    with atomic.exclusive(left / held):
        file = next(file for file in unfinished.found_in([left]) if file.target == part)
        assert file.held_since is not None
        with pytest.raises(FileRefused, match="part1of2 belongs to a run that is at work"):
            unfinished.remove(part)
    assert unfinished.remove(part) == 50


def test_the_command_refuses_what_is_no_folder(tmp_path, capsys):
    assert main(["partials", str(tmp_path / "nowhere")]) == 1
    assert "is not a folder" in capsys.readouterr().err
