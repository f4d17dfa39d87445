"""ComfyUI's LoRA folder, with LoRAs of the tests' FLUX in it."""

import pytest


@pytest.fixture
def loras(tmp_path, monkeypatch, model):
    """ComfyUI's LoRA folder, with two LoRAs of the model in it; the IntLoRA folder beside it is
    empty.
    """
    import folder_paths
    from safetensors.torch import save_file

    from flux_loras import lora_file
    from intlora_runs import OTHER, STYLE
    from nibble.nodes.bridge.intlora import files as intlora

    for kind in (intlora.LORAS, intlora.FOLDER):
        (tmp_path / kind).mkdir()
        monkeypatch.setitem(
            folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], {".safetensors"})
        )
        folder_paths.filename_list_cache.pop(kind, None)
    save_file(lora_file(model), tmp_path / intlora.LORAS / STYLE)
    save_file(lora_file(model, seed=40), tmp_path / intlora.LORAS / OTHER)
    yield tmp_path / intlora.LORAS
    for kind in (intlora.LORAS, intlora.FOLDER):
        folder_paths.filename_list_cache.pop(kind, None)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """ComfyUI's IntLoRA folder, empty."""
    import folder_paths

    from nibble.nodes.bridge.intlora import files

    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, files.FOLDER, ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop(files.FOLDER, None)
    yield tmp_path
    folder_paths.filename_list_cache.pop(files.FOLDER, None)
