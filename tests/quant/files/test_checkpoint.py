"""The file format: what is read, what is refused and how."""

import errno
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_contents import quantized
from nibble.quant.files.checkpoint import is_quantized, open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.safetensors import read_header, read_tensor

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "b": torch.tensor([1, -1], dtype=torch.int8),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(2.5),
    "flag": torch.tensor([True]),
    "fp8": torch.ones(3).to(torch.float8_e4m3fn),
}


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
        (b"", "is empty: the download went wrong"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer"),
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
        '{"a": {"dtype": "F32", "shape": [1, 1, 1, 1, 1, 1, 1, 1, 2], "data_offsets": [0, 8]}}',
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 8)
    with pytest.raises(FileRefused, match="damaged header"):
        read_header(path)


def test_a_shape_of_many_numbers_is_refused_before_they_are_multiplied(tmp_path, monkeypatch):
    """A hostile file in the models folder must not hold up ComfyUI's start."""
    shape = ", ".join(["9223372036854775807"] * 100_000)
    header = f'{{"a": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 8]}}}}'
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode() + b"\0" * 8)
    monkeypatch.setattr("math.prod", lambda numbers: pytest.fail("multiplied"))
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
