"""One rule of names for every node that writes, the same on every system."""

import os

import pytest

from nibble.nodes.bridge.caching.calibrate import file_name as calibration_name
from nibble.nodes.bridge.caf.couplings import folder_of
from nibble.nodes.bridge.caf.train import file_name as caf_name
from nibble.nodes.bridge.host import file_names
from nibble.nodes.bridge.intlora.files import file_name as intlora_name
from nibble.nodes.bridge.intlora.save import file_name as merged_name
from nibble.nodes.bridge.quantize.job import new_name
from nibble.quant.files.errors import FileRefused


class Model:
    """As much of a MODEL as names a calibration."""

    model = object()


def quantized(name):
    return new_name("old.safetensors", name, "svdq-int4-r16")


def merged(name):
    return merged_name("old.safetensors", name)


def converted(name):
    return intlora_name("style.safetensors", name)


def trained(name):
    return intlora_name("", name or "trained")


def calibration(name):
    return calibration_name(name, Model(), [1.0, 0.0])


def couplings(name):
    return str(folder_of(name).name)


FOLDERED = {
    "SVDQuant Quantize Checkpoint": quantized,
    "VQ Quantize Checkpoint": quantized,
    "Merge and Save": merged,
    "Convert LoRA to IntLoRA": converted,
    "Train IntLoRA": trained,
    "Train CAF": caf_name,
}
PLAIN = {"Calibrate Cache": calibration, "Make CAF Couplings": couplings}
NODES = FOLDERED | PLAIN
ENDINGS = {
    "SVDQuant Quantize Checkpoint": ".safetensors",
    "VQ Quantize Checkpoint": ".safetensors",
    "Merge and Save": ".safetensors",
    "Convert LoRA to IntLoRA": ".intlora.safetensors",
    "Train IntLoRA": ".intlora.safetensors",
    "Train CAF": ".caf.safetensors",
    "Calibrate Cache": ".json",
    "Make CAF Couplings": "",
}
REFUSED = [
    "a\0b",
    "a\nb",
    "a\tb",
    "a\x7fb",
    "a\u2028b",
    "a\ud800b",
    *(f"a{letter}b" for letter in '<>:"|?*'),
    "CON",
    "con.safetensors",
    "NUL.txt",
    "com1",
    "LPT9",
    "COM¹",
    "sub/aux",
    "..",
    "../a",
    "sub/../../a",
    "..\\a",
    "/a",
    "\\\\server\\a",
    "C:\\a",
    ".hidden",
    "a.",
    "sub /a",
    "sub//a",
    "sub/",
    "sub\\",
    ".safetensors" + "/",
    "a" * 300,
    "ä" * 120,
]
ALLOWED = ["a", "flux dev (1), +2", "ä ö", "模型", "a.b-c_d", "console", "a#b&c'd", "x" * 190]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("name", REFUSED, ids=lambda name: ascii(name)[:30])
def test_no_node_writes_under_a_name_that_is_none_somewhere(node, name):
    with pytest.raises(FileRefused, match="cannot be a file's name in") as refusal:
        NODES[node](name)
    assert len(str(refusal.value)) < 300
    str(refusal.value).encode()


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("name", ALLOWED)
def test_every_node_writes_under_the_same_other_names(node, name):
    assert NODES[node](f" {name} ") == name + ENDINGS[node]


@pytest.mark.parametrize("node", FOLDERED)
@pytest.mark.parametrize("name", ["sub/deeper/a", "sub\\deeper\\a"])
def test_folders_within_are_allowed_with_either_slash(node, name):
    assert FOLDERED[node](name) == os.path.join("sub", "deeper", "a") + ENDINGS[node]


@pytest.mark.parametrize("node", PLAIN)
def test_no_folders_where_there_are_none(node):
    with pytest.raises(FileRefused, match="it has a folder in it"):
        PLAIN[node]("sub/a")


@pytest.mark.parametrize("node", ENDINGS)
def test_an_ending_that_was_typed_is_not_added_again(node):
    ending = ENDINGS[node]
    assert NODES[node](f"a{ending.upper()}") == f"a{ending}"
    if "safetensors" in ending:
        assert NODES[node]("a.safetensors") == NODES[node]("a.SFT") == f"a{ending}"


@pytest.mark.parametrize("origin", ["flux/old.sft", "flux/old.SAFETENSORS", "flux/old.safetensors"])
def test_a_default_name_keeps_nothing_of_its_origins_ending(origin):
    assert new_name(origin, "", "svdq-int4-r16") == os.path.join(
        "flux", "old-svdq-int4-r16.safetensors"
    )
    assert intlora_name(origin, "") == os.path.join("flux", "old.intlora.safetensors")


@pytest.mark.parametrize(
    "name, inside", [("a", True), ("sub/../a", True), ("..", False), ("../a", False), (".", False)]
)
def test_a_place_is_within_its_folder_by_its_letters(tmp_path, name, inside):
    assert (file_names.within(tmp_path, name) is not None) == inside
