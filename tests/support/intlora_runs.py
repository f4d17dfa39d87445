"""IntLoRAs of the tests' FLUX, converted, made by hand, applied and run."""

import comfy.model_management
import folder_paths
import pytest

from flux_loras import MLP, assert_untouched, bits, outputs, pair
from nibble.nodes.bridge.intlora import files, merge
from nibble.nodes.bridge.intlora.bases import Bases
from nibble.nodes.bridge.intlora.convert import ConvertJob, convert_lora
from nibble.quant.files.errors import FileRefused
from nibble.quant.intlora import file
from nibble.quant.intlora.adapter import Adapter, LayerAdapter
from nibble.quant.intlora.factors import quantize

STYLE, OTHER = "style.safetensors", "other.safetensors"


def converted(model, name: str = STYLE, **options) -> str:
    return convert_lora(ConvertJob(model, name, **options)).name


def apply(model, *args):
    return merge.apply(model, *args)[0]


def adapter_path(loras, name: str):
    return loras.parent / files.FOLDER / name


def on(*patchers) -> dict:
    """Outputs of the layers with the last of these loaded."""
    for patcher in patchers:
        comfy.model_management.load_models_gpu([patcher])
    return outputs(patchers[-1])


def handmade(model, folder, rule, name: str) -> str:
    """An adapter of one layer with another variant than SHIFT-ADD."""
    base = Bases(model)[MLP]
    up, down = pair(*base.shape)
    layer = LayerAdapter(rule(base), base.digest(), quantize(up * 0.3, down))
    file.save(Adapter({MLP: layer}), adapter_path(folder, name))
    folder_paths.filename_list_cache.pop(files.FOLDER, None)
    return name


def refused(model, words: str, work) -> None:
    before = bits(model)
    with pytest.raises(FileRefused, match=words) as refusal:
        work()
    assert str(refusal.value).count("\n") == 0
    assert_untouched(model, before)
    assert not model.patches
