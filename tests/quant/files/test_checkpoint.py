"""The file format: what is read, what is refused and how, and that writing survives
interruption.
"""

import errno
import json
import os
import struct
import subprocess
import sys

import filelock
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from nibble.quant.files import writer
from nibble.quant.files.checkpoint import is_quantized, open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.safetensors import TensorSpec, checksum, read_header, read_tensor
from nibble.quant.files.writer import Writer, check_target

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.tensor([1, -1], dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "flag": torch.tensor([True]),
    "fp8": torch.ones(3).to(torch.float8_e4m3fn),
}
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


# ---- reading ----


def test_reads_what_safetensors_writes(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors", {"note": "hi"})
    header = read_header(tmp_path / "m.safetensors")
    assert header.metadata == {"note": "hi"}
    for name, tensor in TENSORS.items():
        assert torch.equal(read_tensor(header, name).float(), tensor.float())
        assert read_tensor(header, name).dtype == tensor.dtype


@pytest.mark.parametrize(
    "start, word",
    [
        (b"GGUF" + b"\3" * 60, "GGUF"),
        (b"PK\3\4" + b"\0" * 60, "pickle"),
        (b"\x80\2" + b"\0" * 60, "pickle"),
        (b"<!DOCTYPE html>" * 4, "web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer"),
        (b"", "not a safetensors"),
        (b"hello", "not a safetensors"),
        (os.urandom(7) + b"\xff" + b"x" * 99, "safetensors"),
    ],
)
def test_other_files_are_refused_with_their_kind(tmp_path, start, word):
    path = tmp_path / "m.safetensors"
    path.write_bytes(start)
    with pytest.raises(FileRefused, match=word) as refusal:
        read_header(path)
    assert str(refusal.value).startswith("m.safetensors")
    assert str(refusal.value).count(". ") == 0


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(FileRefused, match="does not exist"):
        read_header(tmp_path / "no.safetensors")
    with pytest.raises(FileRefused, match="is a folder"):
        read_header(tmp_path)


def test_a_file_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr("builtins.open", denied)
    with pytest.raises(FileRefused, match="may not be read"):
        read_header(tmp_path / "m.safetensors")


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.97])
def test_a_truncated_file_is_refused(tmp_path, keep):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(100, 100)}, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if keep > 0.1 else 40])
    with pytest.raises(FileRefused, match="cut off"):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        '{"a": 1}',
        "{not json",
        '{"__metadata__": {"a": 3}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}',
        '{"__metadata__": []}',
        '{"a": {"dtype": "I8", "shape": [4], "data_offsets": [4, 8]}}',
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 8)
    with pytest.raises(FileRefused, match="damaged header"):
        read_header(path)


def test_every_flipped_header_byte_is_refused_or_harmless(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.zeros(8), "b": torch.ones(4)}, path)
    good = path.read_bytes()
    for place in range(8 + struct.unpack("<Q", good[:8])[0]):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        try:
            header = read_header(path)
        except FileRefused:
            continue
        for name in header.tensors:
            read_tensor(header, name)


def test_unknown_dtypes_are_named(tmp_path):
    path, header = (
        tmp_path / "m.safetensors",
        '{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}',
    )
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0")
    with pytest.raises(FileRefused, match="F4"):
        read_header(path)


# ---- quantized files ----


def quantized(path, version="1", facts=None, method="svdquant", **changes):
    """A smallest valid file with one layer."""
    facts = facts or {"format": "svdquant_w4a4", "rank": 16}
    tensors = {
        "x.weight": torch.zeros(8, 32, dtype=torch.int8),
        "x.weight_scale": torch.zeros(1, 8).bfloat16(),
        "x.weight_proj_down": torch.zeros(64, 16).bfloat16(),
        "x.weight_proj_up": torch.zeros(8, 16).bfloat16(),
        "x.weight_smooth_factor": torch.ones(64).bfloat16(),
        "x.comfy_quant": torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8),
        **changes,
    }
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    sums = json.dumps({name: checksum(tensor) for name, tensor in tensors.items()})
    save_file(
        tensors,
        path,
        {"format": "nibble", "nibble_version": version, "method": method, "checksums": sums},
    )
    return path


def test_a_quantized_file_opens_without_reading_weights(tmp_path):
    path = quantized(tmp_path / "q.safetensors")
    assert is_quantized(path)
    file = open_quantized(path)
    assert file.layers == {"x": {"format": "svdquant_w4a4", "rank": 16}}
    suffixes = (
        "weight",
        "weight_scale",
        "weight_proj_down",
        "weight_proj_up",
        "weight_smooth_factor",
        "comfy_quant",
    )
    assert set(file.layer("x")) == {f"x.{suffix}" for suffix in suffixes}
    file.verify()


def test_files_that_are_no_quantized_models_are_told_apart(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "m.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"GGUF")
    assert not any(
        is_quantized(tmp_path / name) for name in ("m.safetensors", "broken.safetensors", "no")
    )
    with pytest.raises(FileRefused, match="not made by Nibble"):
        open_quantized(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    "change, word",
    [
        ({"version": "2"}, "update Nibble"),
        ({"version": ""}, "update Nibble"),
        ({"method": "sorcery"}, "update Nibble"),
        ({"facts": {"format": "int3"}}, "unknown format"),
        ({"facts": {"format": "svdquant_w4a4", "rank": 16, "new": 1}}, "new"),
        ({"facts": {"format": "svdquant_w4a4", "rank": 8}}, "proj_down"),
        ({"x.weight_scale": None}, "weight_scale"),
        ({"x.weight": torch.zeros(8, 32).bfloat16()}, "int8"),
        ({"x.weight": torch.zeros(8, 16, dtype=torch.int8)}, "damaged layer"),
        ({"x.comfy_quant": torch.zeros(9, dtype=torch.uint8)}, "unknown format"),
    ],
)
def test_what_the_reader_does_not_know_is_refused_with_the_reason(tmp_path, change, word):
    path = quantized(tmp_path / "q.safetensors", **change)
    with pytest.raises(FileRefused, match=word):
        open_quantized(path)


def test_a_flipped_bit_is_found_and_named(tmp_path):
    path = quantized(tmp_path / "q.safetensors")
    info = read_header(path).tensors["x.weight_proj_up"]
    data = bytearray(path.read_bytes())
    data[info.start + 3] ^= 16
    path.write_bytes(data)
    with pytest.raises(FileRefused, match="x.weight_proj_up"):
        open_quantized(path).verify()


# ---- writing ----


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


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "no locks"), NotImplementedError("none")])
def test_a_drive_without_locks_is_written_to_with_a_warning(tmp_path, monkeypatch, caplog, error):
    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with Writer(tmp_path / "t.safetensors", SPECS, "run", 100) as file:
        file.discard()
    assert "this drive cannot lock files" in caplog.text
    assert not os.listdir(tmp_path)
