"""Where a new file goes among the places of one of ComfyUI's kinds of folders."""

from pathlib import Path

import folder_paths
import pytest

from nibble.nodes.bridge.host import folders
from nibble.quant.files.errors import FileRefused

KIND = "nibble_test_kind"


@pytest.fixture
def places(tmp_path, monkeypatch) -> list[Path]:
    """Two places of a kind, neither of them made, in ComfyUI's order."""
    homes = [tmp_path / "unet", tmp_path / "diffusion_models"]
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, KIND, ([str(home) for home in homes], {".safetensors"})
    )
    return homes


def test_a_place_that_exists_comes_before_one_that_would_have_to_be_made(places):
    places[1].mkdir()
    assert folders.place("new.safetensors", KIND) == (
        places[1] / "new.safetensors",
        "new.safetensors",
    )
    assert not places[0].exists()


def test_where_none_exists_the_first_is_made(places):
    target, name = folders.place("sub/new.safetensors", KIND)
    assert target == places[0] / "sub" / "new.safetensors"
    assert name == "sub/new.safetensors"
    assert target.parent.is_dir()


def test_the_place_of_the_source_comes_first(places):
    for home in places:
        home.mkdir()
    source = places[1] / "model.safetensors"
    assert folders.place("new.safetensors", KIND, beside=source)[0].parent == places[1]
    assert folders.place("new.safetensors", KIND)[0].parent == places[0]


@pytest.mark.parametrize("name", ["../new.safetensors", "/new.safetensors"])
def test_a_name_that_leads_outside_is_refused(places, name):
    places[0].mkdir()
    with pytest.raises(FileRefused, match="lies outside ComfyUI's nibble_test_kind folder"):
        folders.place(name, KIND)


def test_an_existing_file_is_kept_unless_it_may_be_replaced(places):
    places[0].mkdir()
    (places[0] / "old.safetensors").touch()
    with folders.new_file("old.safetensors", KIND, overwrite=False) as new:
        with pytest.raises(FileRefused, match="exists already"):
            new.check()
    with folders.new_file("old.safetensors", KIND, overwrite=True) as new:
        new.check()
        assert new.name == "old.safetensors"
        with (
            pytest.raises(FileRefused, match="is being written by another run"),
            folders.new_file("old.safetensors", KIND, overwrite=True),
        ):
            pass
    with folders.new_file("late.safetensors", KIND, overwrite=False) as new:
        new.check()
        new.path.touch()  # another program's, which heeds no lock
        with pytest.raises(FileRefused, match="exists already"):
            new.check()
    assert sorted(path.name for path in places[0].iterdir()) == [
        "late.safetensors",
        "old.safetensors",
    ]
