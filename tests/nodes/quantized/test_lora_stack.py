"""The LoRA stack does what as many stock Load LoRA do, and says what each row reached."""

import comfy.sd
import comfy.utils
import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from adapter_tensors import layer, tensors_of
from nibble.nodes import lora as nodes
from nibble.nodes.bridge.quantized import lora_stack
from nibble.nodes.bridge.quantized.lora_stack import NONE, Row
from nibble.quant.files.errors import FileRefused


@pytest.fixture
def loras(tmp_path, monkeypatch, model):
    """models/loras with two LoRAs of one layer of the random FLUX, one of another model, and one
    that is damaged.
    """
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop("loras", None)
    shape = layer(model).weight.shape
    for name in ("first", "second"):
        save_file(tensors_of("lora", *shape), tmp_path / f"{name}.safetensors")
    save_file({"nothing.lora_A.weight": torch.ones(4, 4)}, tmp_path / "other.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"not a file of tensors")
    yield tmp_path
    folder_paths.filename_list_cache.pop("loras", None)


def patches_of(model) -> dict[str, list[float]]:
    return {key: [strength for strength, *_ in entries] for key, entries in model.patches.items()}


def stock(model, home, *pairs):
    for name, strength in pairs:
        tensors = comfy.utils.load_torch_file(str(home / name))
        model, _ = comfy.sd.load_lora_for_models(model, None, tensors, strength, strength)
    return model


def test_two_rows_are_two_stock_loaders(model, loras):
    rows = [Row("first.safetensors", 0.8, True), Row("second.safetensors", -0.5, True)]
    stacked, clip, chart = lora_stack.apply(model, None, rows)
    expected = stock(model, loras, ("first.safetensors", 0.8), ("second.safetensors", -0.5))
    assert clip is None
    assert patches_of(stacked) == patches_of(expected)
    assert model.patches == {}
    assert chart["summary"][:2] == [
        ["first.safetensors, 0.8", "reaches 1 weights of the model"],
        ["second.safetensors, -0.5", "reaches 1 weights of the model"],
    ]


def test_a_16_bit_model_takes_it_too(dense_model, loras):
    rows = [Row("first.safetensors", 1.0, True)]
    stacked, _, chart = lora_stack.apply(dense_model, None, rows)
    assert patches_of(stacked) == patches_of(stock(dense_model, loras, ("first.safetensors", 1.0)))
    assert chart["rows"][0]["how"] == "comfyui"


@pytest.mark.parametrize(
    "row",
    [Row(NONE, 1.0, True), Row("first.safetensors", 1.0, False), Row("first.safetensors", 0, True)],
    ids=["empty", "off", "no strength"],
)
def test_a_row_that_does_not_count_changes_nothing(model, loras, row):
    stacked, _, chart = lora_stack.apply(model, None, [row])
    assert stacked.patches == {}
    assert chart["summary"] == [["LoRAs", "none is on"]]


def test_a_lora_of_another_model_is_told(model, loras):
    _, _, chart = lora_stack.apply(model, None, [Row("other.safetensors", 1.0, True)])
    assert chart["summary"][0] == [
        "other.safetensors, 1",
        "reaches nothing: it was made for another model",
    ]


@pytest.mark.parametrize(
    ("name", "words"),
    [("damaged.safetensors", "cannot be read"), ("gone.safetensors", "is not in ComfyUI's loras")],
)
def test_a_file_that_cannot_be_read_is_refused(model, loras, name, words):
    with pytest.raises(FileRefused, match=f"{name} {words}"):
        lora_stack.apply(model, None, [Row(name, 1.0, True)])


def test_a_prompt_may_leave_every_row_out(model, loras):
    stacked = nodes.NibbleLoRAStack.execute(model).args[0]
    assert stacked.patches == {}
    stacked = nodes.NibbleLoRAStack.execute(model, lora_8="first.safetensors").args[0]
    assert list(patches_of(stacked).values()) == [[1.0]]
