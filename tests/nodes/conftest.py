"""ComfyUI's own library in this process, on the CPU, and a random FLUX of 16 and of 4 bits."""

import shutil
from pathlib import Path

import pytest

import comfyui_in_process
from comfyui_in_process import COMFYUI
from random_flux import flux_state, quantize

HERE = Path(__file__).parent

if COMFYUI:
    comfyui_in_process.start()


def pytest_ignore_collect(collection_path):
    """Without ComfyUI the modules in the rooms' folders cannot be imported; test_comfyui_found.py
    says so aloud.
    """
    return True if not COMFYUI and HERE in collection_path.parent.parents else None


@pytest.fixture(scope="session")
def flux_file(tmp_path_factory) -> Path:
    """A random 16-bit FLUX as a file."""
    from safetensors.torch import save_file

    path = tmp_path_factory.mktemp("models") / "random-flux.safetensors"
    save_file(flux_state(), path)
    return path


@pytest.fixture(scope="session")
def quantized_file(flux_file) -> Path:
    """The same FLUX at 4 bits, with unsigned inputs behind its GELUs."""
    return quantize(flux_file, "unsigned.safetensors", rotation="off")


@pytest.fixture(scope="session")
def rotated_file(flux_file) -> Path:
    """The same FLUX at 4 bits, rotated."""
    return quantize(flux_file, "rotated.safetensors", rotation="on")


@pytest.fixture(scope="session")
def table_file(flux_file) -> Path:
    """The same FLUX in W4A8, with levels of a table."""
    return quantize(flux_file, "table.safetensors", format="svdquant_w4a8")


@pytest.fixture(scope="session")
def float_file(flux_file) -> Path:
    """The same FLUX in 4-bit floats."""
    return quantize(flux_file, "floats.safetensors", format="svdquant_nvfp4")


@pytest.fixture
def model(quantized_file):
    """The quantized FLUX as ComfyUI's model patcher, fresh for each test."""
    from nibble.nodes.bridge.quantized import loading

    return loading.load(quantized_file)


@pytest.fixture
def dense_model(flux_file):
    """The 16-bit FLUX as ComfyUI loads it."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(flux_file))


@pytest.fixture(scope="session")
def codeword_file(flux_file) -> Path:
    """The random FLUX at 3 bits, from its weights."""
    from nibble.nodes.bridge.quantize import vq4dit
    from nibble.quant.vq4dit.quantize import quantize_checkpoint

    target = flux_file.with_name("codewords.safetensors")
    quantize_checkpoint(flux_file, target, vq4dit.recipe_of("fast", 3, turns=0))
    return target


@pytest.fixture
def folder(tmp_path, monkeypatch, flux_file):
    """ComfyUI's diffusion_models folder, with the 16-bit model in it."""
    import folder_paths

    from nibble.nodes.bridge.quantized import loading

    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, loading.FOLDER, ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    shutil.copy(flux_file, tmp_path / "flux.safetensors")
    yield tmp_path
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
