"""Every kind of file that ComfyUI loads is named rightly, from the tensors' names that ComfyUI's
own classes have; and no diffusion model is taken for something else.
"""

import pytest

import full_size_models
import kinds_of_files
from nibble.quant.files.architectures import recognise
from nibble.quant.files.kinds import kind_of

KINDS = [(folder, label) for folder, models in kinds_of_files.BUILT.items() for label in models]


@pytest.mark.parametrize(("folder", "label"), KINDS, ids=lambda value: str(value))
def test_a_file_is_named(folder, label):
    names = kinds_of_files.names(folder, label)
    kind = kind_of(names, first=True) or kind_of(names)
    assert kind is not None
    assert kind.folder == folder


@pytest.mark.parametrize("name", full_size_models.SIZES)
def test_a_diffusion_model_is_taken_for_nothing_else(name):
    shapes, _ = full_size_models.build(name)
    assert kind_of(shapes, first=True) is None
    recognise(shapes, name)
