"""Merge and Save of a model of codewords with LoRAs: the file draws what was connected."""

import math
import shutil

import pytest

from adapter_tensors import layer, sampled, tensors_of, with_file
from flux_runs import decibels
from nibble.nodes.bridge.intlora import save
from nibble.nodes.bridge.quantized import loading
from nibble.quant.files.errors import FileRefused
from nibble.quant.interop.convert import convert

NAMES = ["double_blocks.0.img_mlp.0", "double_blocks.0.img_mod.lin", "single_blocks.0.linear2"]


@pytest.fixture
def based(folder, codeword_file):
    shutil.copy(codeword_file, folder / "codewords.safetensors")
    return loading.load(folder / "codewords.safetensors")


# factors are kept as they are; a DoRA's rows go into the layers' scales, which rounds them
@pytest.mark.parametrize(
    ("kind", "floor"), [("lora", math.inf), ("loha", math.inf), ("dora lora", 80)]
)
@pytest.mark.parametrize("branch", ["wider", "same size"])
def test_the_merged_file_draws_what_was_connected(based, folder, kind, floor, branch):
    tensors = {}
    for name in NAMES:
        stem = "lora_unet_" + name.replace(".", "_")
        tensors |= tensors_of(kind, *layer(based, name).weight.shape, stem=stem)
    patched = with_file(based, tensors)
    picture, plain = sampled(patched), sampled(based)
    report = save.save_merged(save.SaveJob(patched, "merged", branch))
    assert {row.action for row in report.layers} == {"vq"}
    again = sampled(loading.load(folder / report.name))
    assert decibels(picture, plain) < 40
    assert decibels(picture, again) >= floor
    assert report.name in loading.quantized_files("vq")


@pytest.mark.parametrize("target", ["kitchen", "nunchaku"])
def test_other_formats_refuse_codewords_before_anything_is_written(codeword_file, tmp_path, target):
    with pytest.raises(FileRefused, match="holds codewords"):
        convert(codeword_file, tmp_path / "other.safetensors", target)
    assert not list(tmp_path.iterdir())
