"""Whatever opens a file refuses a damaged one in one sentence with its name: nodes that read by
Nibble's own reader, and those that read by ComfyUI's.
"""

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

import damage
from nibble.nodes.bridge.host import folders
from nibble.nodes.bridge.quantize import sources
from nibble.nodes.bridge.quantized import encoders, loading, lora_stack
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.source import Source
from nibble.quant.interop.convert import convert

KINDS = ("diffusion_models", "text_encoders", "loras")


def whole() -> bytes:
    """A file of two tensors."""
    table = {
        "a.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]},
        "b.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [64, 128]},
    }
    return damage.joined(table, bytes(128))


WHOLE = whole()
DAMAGED = {
    "empty": b"",
    "zeros": bytes(256),
    "the length alone": WHOLE[:8],
    "its header cut": WHOLE[:40],
    "its tensors cut": WHOLE[:-1],
    "a byte too many": WHOLE + b"\0",
    "a length beyond the file": (10**6).to_bytes(8, "little") + WHOLE[8:],
    "a length beyond memory": (2**62).to_bytes(8, "little") + WHOLE[8:],
    "no JSON": WHOLE[:8] + b"?" + WHOLE[9:],
    "a list": damage.joined(b"[1, 2]", bytes(128)),
    "no text": damage.joined(b"\xff\xfe{}", b""),
    "a web page": b"<html><body>404 Not Found</body></html>",
    "a pickle": b"\x80\x02}q\x00.",
}


@pytest.fixture(params=DAMAGED)
def name(request, tmp_path, monkeypatch):
    """A damaged file in ComfyUI's folders."""
    for kind in KINDS:
        place = ([str(tmp_path)], {".safetensors", ".pt"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, place)
        folder_paths.filename_list_cache.pop(kind, None)
    (tmp_path / "bad.safetensors").write_bytes(DAMAGED[request.param])
    return "bad.safetensors"


def model(name: str):
    return loading.load(folders.path_of(name))


def source(name: str):
    return sources.load(Source(sources.path_of(name)))


def encoder(name: str):
    return encoders.load([name])


def encoder_of_a_type(name: str):
    return encoders.load([name], "sd3")


def one_of_two_encoders(name: str):
    path = folders.path_of(name, "text_encoders")
    save_file({"c.weight": torch.zeros(4, 4)}, path.with_name("good.safetensors"))
    folder_paths.filename_list_cache.pop("text_encoders", None)
    return encoders.load(["good.safetensors", name], "flux")


def lora(name: str):
    return lora_stack.apply(None, None, [lora_stack.Row(name, 1.0, True)])


def converted(name: str):
    path = folders.path_of(name)
    return convert(path, path.with_name("new.safetensors"), "kitchen")


@pytest.mark.parametrize(
    "opened", [model, source, encoder, encoder_of_a_type, one_of_two_encoders, lora, converted]
)
def test_a_damaged_file_is_refused_by_name(name, opened):
    with pytest.raises(FileRefused) as refused:
        opened(name)
    said = str(refused.value)
    assert said.startswith("bad.safetensors ")
    assert said.endswith(".")
    assert "\n" not in said


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04", bytes(64)])
def test_a_damaged_pickle_of_a_lora_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".pt"}))
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(FileRefused, match=r"^bad.pt cannot be read \("):
        lora("bad.pt")
