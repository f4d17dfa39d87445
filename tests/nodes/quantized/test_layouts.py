"""One quantized tensor a layer: what ComfyUI does with tensors must leave it whole."""

import comfy.memory_management
import comfy.model_management
import pytest
import torch
from comfy.quant_ops import QuantizedTensor

from nibble.nodes.bridge.quantized import layouts
from nibble.quant.files import checkpoint, safetensors
from nibble.quant.weights.base import tensor_json
from nibble.quant.weights.formats import FORMATS

W4A4, W4A16 = "double_blocks.0.img_mlp.0", "double_blocks.0.img_mod.lin"


def packed(path, name) -> QuantizedTensor:
    file = checkpoint.open_quantized(path)
    tensors = {key[len(name) + 1 :]: tensor for key, tensor in file.layer(name).items()}
    return layouts.pack(tensors, file.layers[name], torch.bfloat16)


@pytest.fixture(params=[W4A4, W4A16])
def weight(request, quantized_file) -> QuantizedTensor:
    return packed(quantized_file, request.param)


def parts(weight) -> list[torch.Tensor]:
    names, _ = weight.__tensor_flatten__()
    return [getattr(weight, name) for name in names]


def test_it_looks_like_the_16_bit_weight(weight, flux_file):
    name = W4A4 if weight._layout_cls == "NibbleSVDQuantLayout" else W4A16
    header = safetensors.read_header(flux_file)
    assert tuple(weight.shape) == header.tensors[f"{name}.weight"].shape
    assert weight.dtype == torch.bfloat16


def test_every_tensor_that_it_owns_moves_with_it(weight):
    geometry = comfy.memory_management.vram_aligned_size(weight)
    buffer = torch.empty(geometry, dtype=torch.uint8)
    view = comfy.memory_management.interpret_gathered_like([weight], buffer)[0]
    view.copy_(weight)
    assert all(torch.equal(a, b) for a, b in zip(parts(view), parts(weight), strict=True))
    low, high = buffer.data_ptr(), buffer.data_ptr() + geometry
    assert all(low <= part.data_ptr() < high for part in parts(view)), (
        "all of it lies in the streamed buffer"
    )


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference mode"])
@pytest.mark.parametrize(
    "wanted", [{"device": torch.device("cpu")}, {"dtype": torch.bfloat16}], ids=["device", "dtype"]
)
def test_a_copy_that_is_asked_for_is_one(weight, wanted, inference):
    """ComfyUI's backups are made so. In inference mode comfy_kitchen's own tensors give themselves
    back.
    """
    own = layouts.live(weight)
    with torch.inference_mode(inference):
        copy = own.to(**wanted, copy=True)
        assert isinstance(copy, layouts.NibbleTensor)
        assert copy._qdata.data_ptr() != weight._qdata.data_ptr()
        assert torch.equal(copy._qdata, weight._qdata)
        same = own.to(**wanted)
        assert same._qdata.data_ptr() == weight._qdata.data_ptr()


def test_its_effective_weight_is_the_file_s(weight, quantized_file):
    name = W4A4 if weight._layout_cls == "NibbleSVDQuantLayout" else W4A16
    file = checkpoint.open_quantized(quantized_file)
    expected = (
        FORMATS[file.layers[name]["format"]].from_tensors(file.layer(name), name).dequantize()
    )
    assert torch.equal(weight.to(dtype=torch.float32).dequantize(), expected)


def test_it_is_never_requantized(weight):
    with pytest.raises(NotImplementedError, match="SVDQuant Quantize Checkpoint"):
        weight.requantize_from_float(torch.zeros(weight.shape), scale="recalculate")


def test_an_unknown_format_is_refused_by_name():
    with pytest.raises(ValueError, match="vq8"):
        layouts.pack(
            {"weight": torch.zeros(64, 32, dtype=torch.int8)}, {"format": "vq8"}, torch.bfloat16
        )


def test_the_model_s_state_dict_has_the_file_s_names_and_bits(model, quantized_file):
    file = checkpoint.open_quantized(quantized_file)
    state = model.model.diffusion_model.state_dict()
    for layer in file.layers:
        stored = file.layer(layer)
        assert {name for name in state if name.startswith(f"{layer}.")} == stored.keys()
        for name, tensor in stored.items():
            if name.endswith("comfy_quant"):
                said, expected = tensor_json(state[name]), tensor_json(tensor)
                if expected["format"] == "svdquant_w4a4":  # said also where it is false
                    expected.setdefault("act_unsigned", False)
                assert said == expected
            else:
                assert torch.equal(state[name].to(tensor.dtype), tensor), name


def test_a_state_dict_loads_back_bit_for_bit(model, quantized_file):
    from nibble.nodes.bridge.quantized import loading

    other = loading.load(quantized_file, verify=False).model.diffusion_model
    state = {
        name: tensor.clone() for name, tensor in model.model.diffusion_model.state_dict().items()
    }
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not missing
    assert not unexpected
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())


def test_memory_is_counted_as_stored_not_as_shown(model, quantized_file):
    linear = model.model.diffusion_model.get_submodule(W4A4)
    file = checkpoint.open_quantized(quantized_file)
    stored = sum(
        tensor.nbytes
        for name, tensor in file.layer(W4A4).items()
        if not name.endswith(("comfy_quant", "bias"))
    )
    counted = (
        comfy.model_management.module_size(linear) - linear.bias.nbytes - linear.comfy_quant.nbytes
    )
    assert counted == stored < linear.weight.numel()
