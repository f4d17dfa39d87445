"""What cannot be made in parts, and parts of different runs, are refused in a sentence."""

import os

import pytest
import torch
from safetensors.torch import save_file

import nibble
import random_flux
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.files.part_files import PartName
from nibble.quant.files.safetensors import read_header
from part_runs import INT4, QUICK, joined, make_parts, qwen_shapes


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return random_flux.write(tmp_path_factory.mktemp("source") / "m.safetensors", qwen_shapes())


REFUSED = {
    "no number": ({"part": "two"}, "--part two is not K/N"),
    "no such part": ({"part": "5/4"}, "--part 5/4: the parts are 1/4 to 4/4"),
    "part 0": ({"part": "0/4"}, "--part 0/4: the parts are 1/4 to 4/4"),
    "no parts": ({"parts": 0}, "--parts 0 is no number of parts"),
    "parts of a part": ({"parts": "2/4"}, "--parts '2/4' is no number of parts"),
    "both": ({"part": "1/2", "parts": 2}, "give one of the two"),
    "more than groups": ({"part": "1/99"}, "99 parts cannot be made of 10 groups"),
    "more to join": ({"parts": 99}, "99 parts cannot be made of 10 groups"),
    "best": ({"part": "1/2", "preset": "best"}, "the preset 'best' runs the whole model"),
    "auto": ({"parts": 2, "activations": "auto"}, "'auto' are shared out over all layers"),
    "budget": ({"parts": 2, "method": "vq", "budget": 1.0}, "a budget is shared out"),
    "calibrated": ({"part": "1/2", "method": "vq", "steps": 3}, "calibration"),
    "vq4dit": ({"part": "1/2", "method": "vq", "preset": "vq4dit"}, "calibration"),
}


@pytest.mark.parametrize("options, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_made_in_parts_is_refused(source, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        nibble.quantize(source, tmp_path / "q.safetensors", **QUICK, **options)
    assert os.listdir(tmp_path) == []


def test_a_model_that_would_be_run_on_noise_is_refused_with_the_way_out(tmp_path):
    source = random_flux.write(tmp_path / "m.safetensors", flux1_shapes(1, 1, 128, 64, 64))
    target = tmp_path / "q.safetensors"
    for share in ({"part": "1/2"}, {"parts": 2}):
        with pytest.raises(ValueError, match="m.safetensors would be run.*add --memory-cap 0"):
            nibble.quantize(source, target, quiet=True, **share)
    assert os.listdir(tmp_path) == ["m.safetensors"]


OTHER_OPTIONS = {
    "rank": ({"rank": 32}, "rank 16, here 32"),
    "other ranges": ({"keep": ["*.0.*"]}, r"keep \[\], here \['\*\.0\.\*'\]"),
    "unsaid": ({"format": "svdquant_nvfp4"}, "format as it is by default, here svdquant_nvfp4"),
}


@pytest.mark.parametrize("options, words", OTHER_OPTIONS.values(), ids=OTHER_OPTIONS)
def test_parts_of_other_options_are_refused_and_told_which(source, tmp_path, options, words):
    target = tmp_path / "q.safetensors"
    make_parts(source, target, 2, 1, **INT4)
    for share in ({"part": "1/2"}, {"parts": 2}):
        with pytest.raises(FileRefused, match=f"part1of2 was made with other options .*{words}"):
            nibble.quantize(source, target, **share, **{**INT4, **options})
    assert os.listdir(tmp_path) == ["q.safetensors.part1of2"]


def test_a_part_of_another_source_is_refused_unless_it_may_be_overwritten(source, tmp_path):
    other, target = tmp_path / source.name, tmp_path / "q.safetensors"
    random_flux.write(other, qwen_shapes())
    content = bytearray(other.read_bytes())
    content[read_header(other).tensors["transformer_blocks.0.attn.to_q.weight"].start] ^= 1
    other.write_bytes(content)
    make_parts(other, target, 2, **INT4)
    for work in (make_parts, joined):
        with pytest.raises(FileRefused, match="part.of2 was made of another source"):
            work(source, target, 2, **INT4)
    make_parts(source, target, 2, overwrite=True, **INT4)
    joined(source, target, 2, **INT4)


def test_another_program_s_file_is_neither_taken_nor_removed(source, tmp_path):
    target = tmp_path / "q.safetensors"
    strange = PartName(target, 1, 2).path
    save_file({"x": torch.zeros(1)}, strange)
    for share in ({"part": "1/2", "overwrite": True}, {"parts": 2}):
        with pytest.raises(FileRefused, match="part1of2 exists and is no part file of Nibble's"):
            nibble.quantize(source, target, **share, **INT4)
    assert os.listdir(tmp_path) == [strange.name]
