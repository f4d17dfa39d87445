"""A hostile header costs its reader little; what cannot be read is told with the file's name."""

import struct
import time

import pytest

from nibble.quant.files.errors import FileRefused
from nibble.quant.files.header_limits import LISTED_HEADER, MOST_TENSORS
from nibble.quant.files.safetensors import SafetensorsFile, read_header, read_tensor
from nibble.quant.interop.opening import OpenedFiles

HOSTILE = {
    "lists": b'{"a":[' + b"[]," * 2_600_000 + b"0]}",
    "objects": b'{"a":[' + b"{}," * 2_600_000 + b"0]}",
    "numbers": b'{"a":[' + b"0," * 3_900_000 + b"0]}",
    "strings": b'{"a":[' + b'"",' * 2_600_000 + b"0]}",
    "nested": b'{"a":' + b"[" * 7_900_000 + b"}",
    "keys": b'{"a":{' + b",".join(b'"%x":0' % i for i in range(790_000)) + b"}}",
}


def written(path, header: bytes, data: bytes = b"\0" * 8):
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return path


def entry(name: str, shape="[2]", offsets="[0, 8]") -> str:
    return f'"{name}": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}'


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_told_from_a_model_in_a_fraction_of_a_second(tmp_path, kind):
    path = written(tmp_path / "m.safetensors", HOSTILE[kind])
    began = time.process_time()
    assert OpenedFiles().methods([path]) == [None]
    assert time.process_time() - began < 0.5
    with pytest.raises(FileRefused, match=r"^m\.safetensors has more than 50,000 entries"):
        read_header(path)


def test_a_list_reads_no_header_longer_than_any_model_has(tmp_path):
    text = "x" * LISTED_HEADER
    path = written(
        tmp_path / "m.safetensors", f'{{"__metadata__": {{"a": "{text}"}}}}'.encode(), b""
    )
    assert read_header(path).metadata["a"] == text
    with pytest.raises(FileRefused, match="has a header of 8,000,027 bytes"):
        SafetensorsFile(path, largest_header=LISTED_HEADER).__enter__()


def test_as_many_tensors_as_are_allowed_are_read(tmp_path):
    entries = ", ".join(entry(f"layers.{i}.weight", "[0]", "[0, 0]") for i in range(MOST_TENSORS))
    path = written(tmp_path / "m.safetensors", f"{{{entries}}}".encode(), b"")
    assert len(read_header(path).tensors) == MOST_TENSORS


@pytest.mark.parametrize(
    "header",
    [
        f"{{{entry('a')}, {entry('a')}}}",
        '{"__metadata__": {"a": "1", "a": "2"}, ' + entry("b") + "}",
        "{" + entry(chr(92) + "ud800") + "}",
        '{"__metadata__": {"a": "' + chr(92) + 'udfff"}, ' + entry("b") + "}",
    ],
    ids=["a tensor twice", "metadata twice", "surrogate name", "surrogate text"],
)
def test_what_safetensors_itself_refuses_is_refused(tmp_path, header):
    path = written(tmp_path / "m.safetensors", header.encode())
    with pytest.raises(FileRefused, match="m.safetensors has a damaged header"):
        read_header(path)


def test_a_tensor_larger_than_memory_is_refused_with_the_files_name(tmp_path):
    header = entry("a", "[1099511627776]", "[0, 4398046511104]")
    path = written(tmp_path / "sparse.safetensors", f"{{{header}}}".encode(), b"")
    with open(path, "r+b") as file:
        file.truncate(file.seek(0, 2) + 2**42)
    with pytest.raises(FileRefused, match=r"sparse.safetensors needs 4,398.0 GB of memory for a"):
        read_tensor(read_header(path), "a")


@pytest.mark.parametrize("name", ["a\0b.safetensors", "a" * 300 + ".safetensors"])
def test_a_path_that_no_file_can_have_is_refused(tmp_path, name):
    with pytest.raises(FileRefused, match="cannot be opened"):
        read_header(tmp_path / name)
