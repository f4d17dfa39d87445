"""IntLoRAs on models whose low-bit layers have no even grid of integers (W4A8 of a table, 4-bit
floats, codewords): the table of Apply IntLoRA's help page, cell by cell.
"""

import math
import shutil

import pytest
from safetensors.torch import save_file

from adapter_tensors import layer, sampled, tensors_of, with_file
from flux_loras import MLP, lora_file
from flux_runs import decibels
from intlora_runs import STYLE, apply, converted, handmade
from intlora_training_runs import job, trained
from nibble.nodes.bridge.intlora import files, save
from nibble.nodes.bridge.intlora import train as intlora_training
from nibble.nodes.bridge.quantized import loading
from nibble.nodes.bridge.training import session as training
from nibble.quant.files.errors import FileRefused
from nibble.quant.intlora.variants import ShiftAdd
from nibble.quant.training.loop import Options

FORMATS = {
    "table_file": "4-bit codes of a table",
    "float_file": "NVFP4",
    "codeword_file": "codewords of a codebook",
}


@pytest.fixture(params=FORMATS)
def uneven(request):
    """(a model, the words for how it stores its layers)."""
    path = request.getfixturevalue(request.param)
    return loading.load(path), FORMATS[request.param]


def test_training_is_refused_before_the_model_is_loaded(uneven, loras, monkeypatch):
    model, words = uneven
    monkeypatch.setattr(training, "run", lambda *_: pytest.fail("loaded the model"))
    with pytest.raises(FileRefused, match=f"as {words}.*not evenly spaced.* with Load LoRA"):
        intlora_training.run(job(model))


def test_converting_and_applying_are_refused_and_write_nothing(uneven, model, loras):
    other, words = uneven
    save_file(lora_file(model), loras / STYLE)
    with pytest.raises(FileRefused, match=f"as {words}.*not evenly spaced"):
        converted(other)
    assert not list((loras.parent / files.FOLDER).iterdir())
    name = handmade(model, loras, lambda base: ShiftAdd(6), "made.intlora.safetensors")
    for mode in ("branch", "merge"):
        with pytest.raises(FileRefused, match=f"{MLP} as {words}.*not evenly spaced"):
            apply(other, name, 1.0, mode)


@pytest.mark.parametrize("file", ["table_file", "float_file"])
def test_the_modulation_of_such_a_file_can_be_taught(request, file, loras):
    model = loading.load(request.getfixturevalue(file))
    _, adapter = trained(
        model,
        loras.parent / files.FOLDER,
        layers=("double_blocks.0.*mod*",),
        options=Options(steps=2, lr=1e-2, warmup=0),
    )
    assert set(adapter.layers) == {"double_blocks.0.img_mod.lin", "double_blocks.0.txt_mod.lin"}


@pytest.mark.parametrize("branch", ["wider", "same size"])
@pytest.mark.parametrize("file", ["table_file", "float_file"])
def test_an_ordinary_lora_is_merged_into_a_file_that_draws_the_same(request, folder, file, branch):
    """Of codewords: `test_merge_codewords.py`."""
    shutil.copy(request.getfixturevalue(file), folder / "base.safetensors")
    based = loading.load(folder / "base.safetensors")
    stem = "lora_unet_" + MLP.replace(".", "_")
    patched = with_file(based, tensors_of("lora", *layer(based, MLP).weight.shape, stem=stem))
    picture, plain = sampled(patched), sampled(based)
    report = save.save_merged(save.SaveJob(patched, "merged", branch))
    again = sampled(loading.load(folder / report.name))
    assert decibels(picture, plain) < 60
    assert decibels(picture, again) == math.inf
