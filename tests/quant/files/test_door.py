"""Whatever a reader stumbles over is told in one sentence with the file's name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_contents import quantized
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused, reading
from nibble.quant.files.report import Report
from nibble.quant.files.safetensors import read_header
from nibble.quant.files.source import Source
from nibble.quant.files.writer import Writer

DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "error, words",
    [
        (KeyError("lora_down"), "KeyError: 'lora_down' is missing"),
        (RecursionError("maximum depth"), "RecursionError: maximum depth"),
        (NotImplementedError('"isfinite" not implemented'), '"isfinite" not implemented'),
        (MemoryError(), "it asks for more memory than there is"),
        (ZeroDivisionError("division by zero"), "division by zero"),
        (ValueError("two\nlines"), "two lines"),
        (OSError(5, "Input/output error"), "Input/output error"),
    ],
)
def test_errors_of_parsing_become_one_sentence_with_the_name(error, words):
    with pytest.raises(FileRefused) as refusal, reading("/models/m.safetensors"):
        raise error
    text = str(refusal.value)
    assert text.startswith("m.safetensors cannot be read (")
    assert words in text and text.endswith(".") and "\n" not in text
    assert refusal.value.__cause__ is error


def test_what_says_more_and_what_is_no_damage_pass():
    own = FileRefused("m.safetensors is too old; make it anew.")
    with pytest.raises(FileRefused) as refusal, reading("m.safetensors"):
        raise own
    assert refusal.value is own
    with pytest.raises(KeyboardInterrupt), reading("m.safetensors"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    "said", ["no json", "[]", "5", DEEP, '{"layers": []}', '{"layers": {"a": 3}}']
)
def test_a_source_that_says_nonsense_of_its_quantization_is_refused(tmp_path, said):
    path = tmp_path / "m.safetensors"
    save_file({"a.weight": torch.zeros(4, 4)}, path, {"_quantization_metadata": said})
    with pytest.raises(FileRefused, match="m.safetensors says in .* how it is quantized"):
        Source(path)


@pytest.mark.parametrize("said", ["no json", "[]", DEEP, '{"format": []}', '{"params": 3}'])
def test_a_layer_that_says_nonsense_is_refused(tmp_path, said):
    path = tmp_path / "m.safetensors"
    text = torch.tensor(list(said.encode()), dtype=torch.uint8)
    save_file({"a.weight": torch.zeros(4, 4), "a.comfy_quant": text}, path)
    with pytest.raises(FileRefused, match="m.safetensors"):
        Source(path)


@pytest.mark.parametrize(
    "change",
    [
        {"x.bias": torch.zeros(4)},
        {"x.bias": torch.zeros(8, dtype=torch.int32)},
        {"x.weight_scale": torch.zeros(1, 8, dtype=torch.int16)},
        {"x.weight_smooth_factor": torch.zeros(64, dtype=torch.float64)},
    ],
    ids=["half a bias", "whole numbers", "a scale of int16", "float64"],
)
def test_a_layers_own_dtypes_and_its_bias_are_checked(tmp_path, change):
    path = quantized(tmp_path / "m.safetensors", **change)
    name = next(iter(change))
    with pytest.raises(FileRefused, match=f"m.safetensors has a damaged layer: {name}"):
        open_quantized(path)


@pytest.mark.parametrize(
    "option", [{"rank": "16"}, {"rank": True}, {"act_unsigned": 1}, {"smooth_rows": 8}]
)
def test_an_options_value_is_checked(tmp_path, option):
    facts = {"format": "svdquant_w4a4", "rank": 16} | option
    path = quantized(tmp_path / "m.safetensors", facts=facts)
    with pytest.raises(FileRefused, match=f"x says {next(iter(option))}="):
        open_quantized(path)


@pytest.mark.parametrize("version", ["²", "9" * 5000, "-1", ""])
def test_a_version_that_is_no_number_is_refused(tmp_path, version):
    path = quantized(tmp_path / "m.safetensors", version=version)
    with pytest.raises(FileRefused, match="m.safetensors has the format version"):
        open_quantized(path)


def test_a_layers_json_of_a_gigabyte_is_not_read(tmp_path):
    path = tmp_path / "m.safetensors"
    entry = {"dtype": "U8", "shape": [2**30], "data_offsets": [0, 2**30]}
    header = json.dumps(
        {
            "__metadata__": {"format": "nibble", "nibble_version": "1", "method": "svdquant"},
            "x.comfy_quant": entry,
        }
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with open(path, "r+b") as file:
        file.truncate(8 + len(header) + 2**30)
    with pytest.raises(FileRefused, match="x.comfy_quant has 1,073,741,824 bytes, more than"):
        open_quantized(path)


def written(path):
    """A whole file of the writer's own, with one layer."""
    contents = quantized(path.with_name("contents.safetensors"))
    tensors, header = load_file(contents), read_header(contents)
    contents.unlink()
    specs = [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    from nibble.quant.files.safetensors import TensorSpec

    with Writer(path, [TensorSpec(*spec) for spec in specs], "one", 4096) as writer:
        writer.write("x", tensors, {})
        writer.finish([header.metadata | {"recipe": '{"rank": 16}'}])
    return path


@pytest.mark.parametrize(
    "old, new",
    [(b'"BF16"', b'"F16" '), (b'\\"rank\\": 16}', b'\\"rank\\": 17}'), (b"[64,16]", b"[16,64]")],
    ids=["dtype", "metadata", "shape"],
)
def test_what_a_header_says_is_covered_by_its_checksum(tmp_path, old, new):
    path = written(tmp_path / "m.safetensors")
    open_quantized(path).verify()
    content = path.read_bytes()
    assert old in content and len(old) == len(new)
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(FileRefused, match="m.safetensors (is damaged: its header|has a damaged)"):
        open_quantized(path)


def test_a_file_of_before_the_headers_checksum_loads(tmp_path):
    path = quantized(tmp_path / "m.safetensors")
    assert "header_checksum" not in read_header(path).metadata
    open_quantized(path).verify()


@pytest.mark.parametrize(
    "text",
    [
        '{"architecture": 3, "rows": []}',
        '{"architecture": "a", "rows": 5}',
        '{"architecture": "a", "rows": [], "bytes_after": "many"}',
        '{"architecture": "a", "rows": [], "bytes_after": 1e999}',
        '{"architecture": "a", "rows": [], "seconds": NaN}',
        DEEP,
    ],
)
def test_a_report_of_other_kinds_of_values_is_none(text):
    with pytest.raises(ValueError):
        Report.from_json(text)
