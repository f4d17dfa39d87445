"""ComfyUI's folders for CAF's files, empty, and couplings that can be learned."""

import pytest


@pytest.fixture
def output(tmp_path, monkeypatch):
    """The folder of couplings in ComfyUI's output folder, which is empty."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    return tmp_path / "output" / "caf_couplings"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """ComfyUI's folder of CAF files, empty."""
    import folder_paths

    from nibble.nodes.bridge.caf import load as caf_model

    (tmp_path / caf_model.FOLDER).mkdir()
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        caf_model.FOLDER,
        ([str(tmp_path / caf_model.FOLDER)], {".safetensors"}),
    )
    folder_paths.filename_list_cache.pop(caf_model.FOLDER, None)
    yield tmp_path / caf_model.FOLDER
    folder_paths.filename_list_cache.pop(caf_model.FOLDER, None)


@pytest.fixture
def data(tmp_path):
    from caf_training_runs import pairs

    return pairs(tmp_path / "pairs")
