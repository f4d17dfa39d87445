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


def test_folders_that_are_links_lead_where_they_lead(places, tmp_path):
    drive = tmp_path / "drive"
    (drive / "flux").mkdir(parents=True)
    places[1].mkdir()
    (places[1] / "flux").symlink_to(drive / "flux")
    target, name = folders.place("flux/new.safetensors", KIND, places[1] / "flux" / "a.safetensors")
    assert (target, name) == (places[1] / "flux" / "new.safetensors", "flux/new.safetensors")
    target.touch()
    assert (drive / "flux" / "new.safetensors").exists()


def test_a_whole_folder_that_is_a_link_is_a_place(places, tmp_path):
    (tmp_path / "drive").mkdir()
    places[0].symlink_to(tmp_path / "drive")
    assert folders.place("new.safetensors", KIND)[0] == places[0] / "new.safetensors"
    with pytest.raises(FileRefused, match="lies outside"):
        folders.place("../new.safetensors", KIND)


def test_endings_in_letters_of_either_size_are_listed(places):
    places[0].mkdir()
    for name in ("UPPER.SAFETENSORS", "old.sft", "OLD.SFT", "plain.safetensors", "other.txt"):
        (places[0] / name).touch()
    folder_paths.folder_names_and_paths[KIND][1].update({".sft", ".txt"})
    folder_paths.filename_list_cache.pop(KIND, None)
    listed = ["OLD.SFT", "UPPER.SAFETENSORS", "old.sft", "plain.safetensors"]
    assert sorted(folders.names(KIND)) == listed


def test_what_is_not_there_is_told_with_the_way_out(places):
    with pytest.raises(FileRefused) as refused:
        folders.path_of("flux.safetensors", KIND)
    assert str(refused.value) == (
        f"flux.safetensors is not in ComfyUI's {KIND} folder; put it there or choose another, and"
        " press R to refresh the list."
    )


@pytest.mark.parametrize("find", [lambda name: folders.path_of(name, KIND), folders.of_everywhere])
def test_an_empty_list_is_told_as_one(places, find):
    with pytest.raises(FileRefused) as refused:
        find("(no quantized models yet)")
    assert str(refused.value) == (
        "There are no quantized models yet: make or download one, then press R to refresh the list"
        " and choose it."
    )
