"""What a quantized file says to people and to other programs."""

import json

import pytest
from safetensors.torch import save_file

from nibble import __main__ as cli
from nibble.quant.files.safetensors import read_header
from random_flux import flux_state, quantize

SAID = {
    "modelspec.title": "Painter",
    "modelspec.license": "Apache-2.0",
    "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 200_000,
    "license_link": "https://example.org",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A 4-bit file of a model with metadata."""
    source = tmp_path_factory.mktemp("models") / "painter.safetensors"
    unwanted = {"modelspec.hash_sha256": "0x12", "modelspec.tags": "x" * 70_000}
    save_file(flux_state(), source, SAID | unwanted)
    return quantize(source, "four.safetensors", rotation="off")


def test_the_file_has_what_its_source_says_and_what_opens_it(made):
    metadata = read_header(made).metadata
    assert metadata["modelspec.title"] == "Painter (SVDQuant, 4 bit)"
    assert {key: metadata[key] for key in list(SAID)[1:]} == dict(list(SAID.items())[1:])
    assert not metadata.keys() & {"modelspec.hash_sha256", "modelspec.tags"}
    assert "Nibble node pack" in metadata["requires"]


@pytest.mark.parametrize("form", ["kitchen", "nunchaku"])
def test_conversions_keep_it(made, tmp_path, form):
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    assert cli.main(["convert", str(made), str(there), "--to", form]) == 0
    assert cli.main(["convert", str(there), str(back)]) == 0
    title = read_header(made).metadata["modelspec.title"]
    assert read_header(there).metadata["modelspec.title"] == title
    assert "requires" not in read_header(there).metadata
    assert read_header(back).metadata["modelspec.title"] == title
    assert "Nibble node pack" in read_header(back).metadata["requires"]


def test_inspect_tells_it(made, capsys):
    assert cli.main(["inspect", str(made), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["modelspec.license"] == "Apache-2.0"
    assert "modelspec.thumbnail" not in content
    cli.main(["inspect", str(made)])
    assert "Painter (SVDQuant, 4 bit)" in capsys.readouterr().out
