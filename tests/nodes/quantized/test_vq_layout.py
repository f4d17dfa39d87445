"""A layer of codewords is one tensor: of the 16-bit shape, computed as the format says, with a LoRA
in its branch.
"""

import comfy.memory_management
import comfy.model_management
import comfy.sd
import pytest
import torch

from codewords import relative
from nibble.nodes.bridge.quantized import layouts, lora
from nibble.quant.weights.vq import VQWeight


@pytest.fixture(params=[dict(), dict(scale=False), dict(rank=16), dict(rotation=64)], ids=str)
def weight(request) -> VQWeight:
    """A random 3-bit layer, 256 outputs of 128 inputs, in each of the format's forms."""
    options = {"scale": True, "rank": 0, "rotation": 0} | request.param
    draw = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 256, (256, 48), generator=draw, dtype=torch.uint8)

    def random(*shape):
        return torch.randn(*shape, generator=draw) * 0.1

    down, up = (
        (random(128, options["rank"]), random(256, options["rank"]))
        if options["rank"]
        else (None, None)
    )
    return VQWeight(
        indices,
        random(64, 2).half(),
        random(256).half() if options["scale"] else None,
        down,
        up,
        rotation=options["rotation"],
    )


def packed(weight: VQWeight, dtype=torch.float32):
    tensors = {key.removeprefix("a."): tensor for key, tensor in weight.tensors("a").items()}
    tensors.pop("a.comfy_quant", None)
    return layouts.pack(tensors, weight.facts(), dtype)


def test_a_layer_is_one_tensor_of_the_16_bit_shape_and_streams_whole(weight):
    tensor = packed(weight)
    assert tensor.shape == (256, 128)
    assert torch.equal(tensor.dequantize(), weight.dequantize())
    buffer = torch.empty(comfy.memory_management.vram_aligned_size(tensor), dtype=torch.uint8)
    view = comfy.memory_management.interpret_gathered_like([tensor], buffer)[0]
    view.copy_(tensor)
    assert torch.equal(view.dequantize(), weight.dequantize())
    assert view.params.codebook.data_ptr() - buffer.data_ptr() in range(len(buffer)), (
        "the codebook lies in the streamed buffer"
    )


def test_a_layer_computes_what_the_format_says_and_saves_what_it_was_made_of(weight):
    tensor, x = packed(weight), torch.randn(5, 128, generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        layouts.linear(x, tensor, None),
        weight.forward(x) if weight.scale is not None else packed_forward(weight, x),
    )
    stored = layouts.stored_tensors(tensor, "a.weight") | {
        "a.comfy_quant": layouts.settings_tensor(tensor)
    }
    again = VQWeight.from_tensors(stored, "a")
    assert torch.equal(again.indices, weight.indices)
    assert torch.equal(again.codebook, weight.codebook)
    assert again.facts() == weight.facts()


def packed_forward(weight: VQWeight, x: torch.Tensor) -> torch.Tensor:
    """The same with the scale of ones that a layer without one has in memory."""
    return VQWeight(
        weight.indices, weight.codebook, torch.ones(256).half(), rotation=weight.rotation
    ).forward(x)


def test_a_lora_joins_the_branch_and_leaves_codes_and_codebook_alone(weight):
    tensor = packed(weight)
    draw = torch.Generator().manual_seed(4)
    delta = torch.randn(256, 4, generator=draw) @ torch.randn(4, 128, generator=draw) * 0.02
    patched = lora.absorb_dense(tensor, weight.dequantize() + delta)
    assert patched._qdata is tensor._qdata or torch.equal(patched._qdata, tensor._qdata)
    assert torch.equal(patched.params.codebook, tensor.params.codebook)
    assert patched.params.proj_up.shape[1] == weight.rank + 16
    x = torch.randn(5, 128, generator=draw)
    assert relative(layouts.linear(x, patched, None), x @ (weight.dequantize() + delta).T) < 2e-2
    assert (
        relative(layouts.linear(x, patched, None) - layouts.linear(x, tensor, None), x @ delta.T)
        < 2e-2
    )
