"""Writing files: valid, aligned and complete; interrupted, it goes on to the same bytes; and what
is refused.
"""

import errno
import os
import subprocess
import sys

import filelock
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from checkpoint_contents import quantized
from nibble.quant.files import writer
from nibble.quant.files.errors import DiskRefused, FileRefused
from nibble.quant.files.safetensors import TensorSpec, read_header
from nibble.quant.files.writer import Writer, check_target

SPECS = [
    TensorSpec("x.weight", torch.int8, (64, 32)),
    TensorSpec("odd", torch.bfloat16, (3,)),
    TensorSpec("last", torch.uint8, (5,)),
    TensorSpec("x.comfy_quant", torch.uint8, (128,)),
    TensorSpec("half", torch.float32, (2, 2)),
]


def contents(spec, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(
        -100 if spec.dtype.is_signed else 0, 100, spec.shape, generator=generator
    ).to(spec.dtype)


def write(
    target, identity="run", specs=SPECS, stop_after=None, choices=({"format": "nibble"},), room=200
):
    """Writes all specs, each a unit of its own; returns how many units were done in this run."""
    done = 0
    with Writer(target, specs, identity, room) as file:
        for spec in specs:
            if spec.name not in file.finished:
                if done == stop_after:
                    raise InterruptedError("stopped")
                file.write(spec.name, {spec.name: contents(spec)}, {"row": spec.name})
                done += 1
        file.finish(choices)
    return done


def test_a_written_file_is_valid_aligned_and_complete(tmp_path):
    target = tmp_path / "t.safetensors"
    write(target, choices=[{"format": "nibble", "note": "x" * 50}])
    loaded = load_file(target)
    assert all(torch.equal(loaded[spec.name], contents(spec)) for spec in SPECS)
    assert len(loaded) == len(SPECS)
    header = read_header(target)
    assert all(
        header.tensors[spec.name].start % (8 if spec.nbytes % 8 == 0 else spec.dtype.itemsize) == 0
        for spec in SPECS
    )
    assert (
        min(header.tensors.values(), key=lambda info: info.start) == header.tensors["x.comfy_quant"]
    )
    with safetensors.safe_open(target, "pt") as file:
        assert file.metadata()["note"] == "x" * 50
    assert os.listdir(tmp_path) == ["t.safetensors"]


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(tmp_path):
    write(tmp_path / "whole.safetensors")
    target = tmp_path / "t.safetensors"
    with pytest.raises(InterruptedError):
        write(target, stop_after=3)
    assert not target.exists()
    assert write(target) == len(SPECS) - 3
    assert target.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    "error, kept",
    [
        (KeyboardInterrupt(), True),
        (InterruptedError("Stop"), True),
        (DiskRefused("full"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (KeyError("a"), False),
        (FileRefused("damaged"), False),
        (OverflowError(), False),
    ],
)
def test_only_a_failure_that_would_come_again_takes_what_is_done(tmp_path, error, kept):
    with pytest.raises(type(error)), Writer(tmp_path / "t.safetensors", SPECS, "run", 100) as file:
        file.write("odd", {"odd": contents(SPECS[1])}, {})
        raise error
    left = ["t.safetensors.partial", "t.safetensors.partial.journal"]
    assert sorted(os.listdir(tmp_path)) == (left if kept else [])


def test_a_half_written_part_is_done_again(tmp_path):
    target, journal = tmp_path / "t.safetensors", tmp_path / "t.safetensors.partial.journal"
    with pytest.raises(InterruptedError):
        write(target, stop_after=3)
    journal.write_text(journal.read_text()[:-20])  # the last line was cut by a crash
    # and the first part never reached the disk
    with open(tmp_path / "t.safetensors.partial", "r+b") as file:
        file.seek(-SPECS[0].nbytes, os.SEEK_END)
        file.write(b"\0" * SPECS[0].nbytes)
    assert write(target) >= len(SPECS) - 2
    assert torch.equal(load_file(target)["x.weight"], contents(SPECS[0]))


def test_an_unfinished_file_of_other_options_is_not_used(tmp_path):
    with pytest.raises(InterruptedError):
        write(tmp_path / "t.safetensors", "other", stop_after=3)
    assert write(tmp_path / "t.safetensors") == len(SPECS)


@pytest.mark.parametrize("text", ["3\n[]\n", "{}\n{}\n", "nonsense", "\x00\xff"])
def test_a_journal_that_is_not_ours_is_ignored(tmp_path, text):
    (tmp_path / "t.safetensors.partial.journal").write_text(text)
    (tmp_path / "t.safetensors.partial").write_bytes(b"x" * 5000)
    assert write(tmp_path / "t.safetensors") == len(SPECS)


def test_the_first_metadata_that_fits_is_taken(tmp_path):
    target = tmp_path / "t.safetensors"
    write(target, choices=[{"report": "x" * 10_000}, {"report": "short"}])
    assert read_header(target).metadata["report"] == "short"
    with pytest.raises(ValueError, match="does not fit"):
        write(tmp_path / "u.safetensors", choices=[{"report": "x" * 10_000}])
    assert not (tmp_path / "u.safetensors").exists()


def test_a_tensor_that_was_not_planned_so_is_refused(tmp_path):
    with (
        Writer(tmp_path / "t.safetensors", SPECS, "run", 100) as file,
        pytest.raises(ValueError, match="was planned"),
    ):
        file.write("odd", {"odd": torch.zeros(4).bfloat16()}, {})
    with (
        Writer(tmp_path / "t.safetensors", SPECS, "run", 100) as file,
        pytest.raises(ValueError, match="never written"),
    ):
        file.finish([{}])


def test_two_writers_of_one_target_exclude_one_another(tmp_path):
    with Writer(tmp_path / "t.safetensors", SPECS, "run", 100):
        with (
            pytest.raises(FileRefused, match="another run"),
            Writer(tmp_path / "t.safetensors", SPECS, "run", 100),
        ):
            pass
    with Writer(tmp_path / "t.safetensors", SPECS, "run", 100):  # the lock was released
        pass


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="reads /dev/full, which is Linux's"
)
@pytest.mark.parametrize("where", ["before", "fallocate", "write"])
def test_a_full_disk_is_one_sentence_and_leaves_no_target(tmp_path, monkeypatch, where):
    target = tmp_path / "t.safetensors"

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "before":
        monkeypatch.setattr(
            writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})()
        )
    if where == "fallocate":
        monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(FileRefused, match=r"The disk of .* is full: t.safetensors needs 0.00 GB"):
        with Writer(target, SPECS, "run", 100) as file:
            if where == "write":
                file._file.close()
                file._file = open("/dev/full", "r+b", buffering=0)
            file.write("odd", {"odd": contents(SPECS[1])}, {})
    assert not target.exists()
    assert (where == "write") == (tmp_path / "t.safetensors.partial").exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_folder_is_one_sentence(tmp_path, monkeypatch, code):
    def denied(*_, **__):
        raise OSError(code, "denied")

    monkeypatch.setattr(os, "open", denied)
    with (
        pytest.raises(FileRefused, match="is read-only; choose another one"),
        Writer(tmp_path / "t.safetensors", SPECS, "run", 100),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_the_target_may_not_be_the_source_by_any_name(tmp_path):
    source = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(2)}, source)
    (tmp_path / "soft.safetensors").symlink_to(source)
    os.link(source, tmp_path / "hard.safetensors")
    (tmp_path / "sub").mkdir()
    for target in (
        source,
        tmp_path / "soft.safetensors",
        tmp_path / "hard.safetensors",
        tmp_path / "sub" / ".." / "m.safetensors",
    ):
        with pytest.raises(FileRefused, match="is the file that would be read"):
            check_target(source, target)


def test_targets_that_would_surprise_are_refused(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for target, word in [
        ("other.safetensors", "not made by Nibble"),
        ("folder.safetensors", "is a folder"),
        ("no/t.safetensors", "does not exist"),
        ("t.gguf", "does not end in .safetensors"),
    ]:
        with pytest.raises(FileRefused, match=word):
            check_target(None, tmp_path / target)
    check_target(None, quantized(tmp_path / "q.safetensors"))


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError("none")])
def test_a_drive_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, caplog, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with Writer(tmp_path / "t.safetensors", SPECS, "run", 100) as file:
        file.discard()
    assert "this drive cannot lock files" in caplog.text
    assert not os.listdir(tmp_path)


def test_a_lock_of_another_process_is_told_and_ends_with_it(tmp_path):
    target = tmp_path / "t.safetensors"
    code = (
        "import filelock, sys\n"
        f"lock = filelock.FileLock({str(target) + '.partial.lock'!r})\n"
        "lock.acquire()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(FileRefused, match="t.safetensors is being written by another run"),
            Writer(target, SPECS, "run", 100),
        ):
            pass
        other.kill()
    with Writer(target, SPECS, "run", 100) as file:
        file.discard()
    assert not os.listdir(tmp_path)


def test_nothing_of_the_lock_is_left_behind(tmp_path):
    target = tmp_path / "t.safetensors"
    with pytest.raises(RuntimeError), Writer(target, SPECS, "run", 100):
        raise RuntimeError
    assert not list(tmp_path.glob("*.lock*"))
    with Writer(target, SPECS, "run", 100):
        with pytest.raises(FileRefused), Writer(target, SPECS, "run", 100):
            pass
    assert not list(tmp_path.glob("*.lock*"))
