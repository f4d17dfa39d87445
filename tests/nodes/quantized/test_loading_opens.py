"""How often a low-bit file is opened, from the drop-down list to the loaded model, and that its
bytes are read once.
"""

import builtins
import io
import os
import shutil

import comfy.utils
import folder_paths
import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from nibble.nodes.bridge.quantized import loading
from nibble.nodes.svdquant import NibbleLoadSVDQuant
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.interop.opening import OpenedFiles
from published_files import RandomFlux


class Watch:
    """Counts the openings of one file by Python and by safetensors, and the reads of its bytes."""

    def __init__(self, path):
        self.path = os.path.realpath(path)
        self.opens: list[str] = []
        self.ranges: list[tuple[int, int]] = []  # bytes that were read through a handle
        self.mapped: list[str] = []  # tensors that came out of a memory map

    def saw(self, path, how: str) -> bool:
        if isinstance(path, int) or os.path.realpath(path) != self.path:
            return False
        self.opens.append(how)
        return True


class WatchedFile(io.FileIO):
    """A file that notes which bytes are read."""

    def __init__(self, path, ranges):
        super().__init__(path, "rb")
        self.ranges = ranges

    def readinto(self, buffer):
        start = self.tell()
        count = super().readinto(buffer)
        self.ranges.append((start, start + count))
        return count


class WatchedMap:
    """safetensors' memory map, which notes the tensors that are taken from it."""

    def __init__(self, map_, names):
        self.map, self.names = map_, names

    def __enter__(self):
        self.map.__enter__()
        return self

    def __exit__(self, *error):
        return self.map.__exit__(*error)

    def get_tensor(self, name):
        self.names.append(name)
        return self.map.get_tensor(name)

    def __getattr__(self, name):
        return getattr(self.map, name)


@pytest.fixture
def watch(monkeypatch):
    """Starts to watch a file."""

    def start(path) -> Watch:
        seen = Watch(path)
        python_open, system_open, map_open = builtins.open, os.open, safetensors.safe_open

        def opened(file, mode="r", *args, **kwargs):
            if seen.saw(file, "open"):
                assert mode == "rb"
                assert kwargs == {"buffering": 0}
                return WatchedFile(file, seen.ranges)
            return python_open(file, mode, *args, **kwargs)

        def opened_by_system(path, *args, **kwargs):
            seen.saw(path, "os.open")
            return system_open(path, *args, **kwargs)

        def mapped(path, *args, **kwargs):
            handle = map_open(path, *args, **kwargs)
            return WatchedMap(handle, seen.mapped) if seen.saw(path, "safe_open") else handle

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
        monkeypatch.setattr(os, "open", opened_by_system)
        monkeypatch.setattr(safetensors, "safe_open", mapped)
        return seen

    return start


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of diffusion models in ComfyUI."""
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, loading.FOLDER, ([str(tmp_path)], {".safetensors"})
    )
    monkeypatch.setattr(loading, "_files", OpenedFiles())
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    yield tmp_path
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)


def queue(name: str, verify: bool = True):
    """What ComfyUI does with a prompt: lists, validates, runs."""
    assert name in loading.quantized_files("svdquant")
    assert NibbleLoadSVDQuant.validate_inputs(name) is True
    return NibbleLoadSVDQuant.execute(name, verify, "default", "vram")


def test_from_the_list_to_the_model_a_file_is_opened_twice(folder, quantized_file, watch):
    path = shutil.copy(quantized_file, folder / "model.safetensors")
    names = set(load_file(path))
    watched = watch(path)
    queue("model.safetensors")
    assert watched.opens == ["open", "safe_open"]
    assert sorted(watched.mapped) == sorted(names)


def test_no_byte_is_read_twice(folder, quantized_file, watch):
    """Before the memory map only the header and the layers' JSON are read, each in one read; the
    JSON that was read then is what is verified.
    """
    path = shutil.copy(quantized_file, folder / "model.safetensors")
    header = open_quantized(path).header
    watched = watch(path)
    queue("model.safetensors")
    texts = [info for name, info in header.tensors.items() if name.endswith(".comfy_quant")]
    first, last = min(info.start for info in texts), max(info.stop for info in texts)
    assert sum(info.nbytes for info in texts) == last - first
    assert watched.ranges == [(0, 32), (8, 8 + len(header.text)), (first, last)]


def test_a_second_run_maps_the_file_and_opens_it_no_more(folder, quantized_file, watch):
    path = shutil.copy(quantized_file, folder / "model.safetensors")
    queue("model.safetensors")
    watched = watch(path)
    queue("model.safetensors")
    assert watched.opens == ["safe_open"]


@pytest.mark.parametrize("form", ["modern", "kitchen"])
def test_a_file_of_another_program_is_opened_three_times(folder, watch, form):
    """By the list, to check the choice, and to read it."""
    flux, path = RandomFlux(), folder / "model.safetensors"
    parts = flux.nunchaku(modern=True) if form == "modern" else (flux.nibble(),)
    save_file({name: t.contiguous() for part in parts for name, t in part.items()}, path)
    watched = watch(path)
    queue(path.name)
    assert watched.opens == ["open"] * 3


def test_the_state_is_that_of_comfyui_bit_for_bit(quantized_file, monkeypatch):
    seen = {}
    load = loading.comfy.sd.load_diffusion_model_state_dict

    def noted(state, metadata, **options):
        seen.update(state=dict(state), metadata=metadata)
        return load(state, metadata=metadata, **options)

    monkeypatch.setattr(loading.comfy.sd, "load_diffusion_model_state_dict", noted)
    loading.load(quantized_file)
    state, metadata = comfy.utils.load_torch_file(str(quantized_file), return_metadata=True)
    expected = loading.packed(state, open_quantized(quantized_file).layers, torch.bfloat16)
    assert seen["metadata"] == metadata
    assert list(seen["state"]) == list(expected)
    for name, tensor in expected.items():
        assert type(seen["state"][name]) is type(tensor), name
        assert torch.equal(seen["state"][name], tensor), name


def test_a_replaced_file_is_opened_again(folder, quantized_file, rotated_file):
    path = folder / "model.safetensors"
    shutil.copy(quantized_file, path)
    before = loading.opened(path.name, "svdquant")
    assert loading.opened(path.name, "svdquant") is before
    shutil.copy(rotated_file, path)
    after = loading.opened(path.name, "svdquant")
    assert after.layers != before.layers
    assert not before.is_current()
    assert loading.quantized_files("svdquant") == [path.name]
    path.write_bytes(b"x" * 100)
    assert loading.quantized_files() == []


def test_a_file_that_changes_while_it_is_read_is_refused(folder, quantized_file, monkeypatch):
    path = shutil.copy(quantized_file, folder / "model.safetensors")
    read = comfy.utils.load_torch_file

    def read_and_touch(*args, **options):
        os.utime(path, (1, 1))
        return read(*args, **options)

    monkeypatch.setattr(comfy.utils, "load_torch_file", read_and_touch)
    with pytest.raises(FileRefused, match="changed while it was read"):
        loading.load(path)


def test_a_damaged_file_is_refused_by_the_bytes_that_would_be_loaded(folder, quantized_file):
    path = shutil.copy(quantized_file, folder / "model.safetensors")
    info = open_quantized(path).header.tensors["single_blocks.0.linear1.weight"]
    data = bytearray(path.read_bytes())
    data[info.start] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileRefused, match="single_blocks.0.linear1.weight does not match"):
        loading.load(path)
    loading.load(path, verify=False)


def test_a_layers_json_is_verified_too(folder, quantized_file):
    path = shutil.copy(quantized_file, folder / "model.safetensors")
    info = open_quantized(path).header.tensors["single_blocks.0.linear1.comfy_quant"]
    data = bytearray(path.read_bytes())
    assert data[info.stop - 1 : info.stop] == b" "
    data[info.stop - 1] = ord("\n")
    path.write_bytes(data)
    with pytest.raises(FileRefused, match="single_blocks.0.linear1.comfy_quant does not match"):
        loading.load(path)


def test_nothing_stays_open_and_memory_is_bounded(folder, quantized_file):
    files = OpenedFiles(limit=3)
    paths = [shutil.copy(quantized_file, folder / f"{i}.safetensors") for i in range(5)]
    assert files.methods([str(path) for path in paths]) == ["svdquant"] * 5
    opened = [files.open(path) for path in paths]
    assert all(stored._handle is None for file in opened for stored in file.files)
    assert len(files._files) == 3
    assert files.open(paths[4]) is opened[4]
    assert files.open(paths[0]) is not opened[0]
    files.methods([])
    assert not files._methods
