"""A merged layer of its own: it computes what the quantized layer and the adapter do, and its
tensors come back.
"""

import pytest
import torch

from intlora_bases import K, adapters, normal, svdquant, w4a16
from nibble.quant.intlora.merge import change
from nibble.quant.intlora.merged_weight import MergedWeight
from nibble.quant.intlora.variants import ShiftAdd
from nibble.quant.merge.integer_grid import IntBase

WEIGHTS = {
    "svdquant": svdquant,
    "rotated": lambda: svdquant(rotation=64),
    "unsigned": lambda: svdquant(act_unsigned=True),
    "w4a16": w4a16,
}
every_weight = pytest.mark.parametrize("kind", list(WEIGHTS))


@every_weight
@pytest.mark.parametrize("variant", ["shift_add", "mul", "shift"])
def test_it_computes_base_and_change(kind, variant):
    weight = WEIGHTS[kind]()
    base = IntBase.of(weight)
    uses = [(adapters(base)[variant], 1.0)]
    merged, notes = MergedWeight.of(weight, uses)
    x = normal(5, K, size=1.0)
    dense = weight.dequantize() + change(base, uses)
    torch.testing.assert_close(merged.dequantize(), dense, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        merged.forward(x), x @ dense.T + weight.effective_bias(), rtol=1e-3, atol=1e-3
    )
    assert not notes
    assert merged.base.bits == 16
    assert merged.shape == weight.shape


@every_weight
def test_tensors_round_trip(kind):
    weight = WEIGHTS[kind]()
    merged, _ = MergedWeight.of(weight, [(adapters(IntBase.of(weight))["shift_add"], 1.0)])
    stored = merged.tensors("a.b")
    back = MergedWeight.from_tensors(stored, "a.b")
    assert back.tensors("a.b").keys() == stored.keys()
    assert all(torch.equal(back.tensors("a.b")[name], tensor) for name, tensor in stored.items())
    assert merged.nbytes == sum(
        tensor.nbytes for name, tensor in stored.items() if "comfy_quant" not in name
    )


def test_without_adapters_the_weight_is_that_of_the_base():
    weight = w4a16()
    merged, _ = MergedWeight.of(weight, [])
    assert torch.equal(merged.dequantize(), weight.dequantize())
    assert merged.base.bits == 8


def test_lowered_k_is_noted_and_wrong_tensors_refused():
    weight = w4a16()
    base = IntBase.of(weight)
    use = adapters(base, size=0.03)["shift_add"]
    merged, notes = MergedWeight.of(weight, [(type(use)(ShiftAdd(12), use.base, use.factors), 1.0)])
    assert "k was lowered" in notes[0]
    assert merged.base.bits == 16
    stored = merged.tensors("a")
    with pytest.raises(ValueError, match="int8 for 16 bits"):
        MergedWeight.from_tensors(stored | {"a.weight": stored["a.weight"].to(torch.int8)}, "a")
    with pytest.raises(ValueError, match="'intlora_merged'"):
        MergedWeight.from_tensors(w4a16().tensors("a"), "a")
    with pytest.raises(ValueError, match="lacks its weight or scale"):
        MergedWeight.from_tensors(
            {name: tensor for name, tensor in stored.items() if name != "a.weight_scale"}, "a"
        )
