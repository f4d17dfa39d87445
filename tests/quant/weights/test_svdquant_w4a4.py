"""The stored forms: names on disk, what they stand for, and the refusals."""

import json

import pytest
import torch

from nibble.kernels.reference import SHIFT, hadamard64
from nibble.quant.weights.awq_w4a16 import W4A16Weight
from nibble.quant.weights.base import json_tensor, tensor_json
from nibble.quant.weights.formats import FORMATS
from nibble.quant.weights.modules import SVDQuantLinear, W4A16Linear, as_module
from nibble.quant.weights.packing import pack_int4
from nibble.quant.weights.svdquant_w4a4 import SVDQuantWeight

OPTIONS = {
    "plain": {},
    "unsigned": {"act_unsigned": True},
    "rotated": {"rotation": 64},
    "8 bits": {"act_bits": 8},
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def svdquant(
    n: int = 48, k: int = 128, rank: int = 16, bias: bool = True, **options
) -> SVDQuantWeight:
    g = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g).mul(0.1).bfloat16()

    codes = torch.randint(-8, 8, (n, k), generator=g, dtype=torch.int8)
    factors = normal(k, rank), normal(n, rank)
    return SVDQuantWeight(
        pack_int4(codes),
        normal(k // 64, n),
        *factors,
        normal(k).exp(),
        normal(n) if bias else None,
        **options,
    )


def w4a16(n: int = 48, k: int = 128) -> W4A16Weight:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (n, k), generator=g, dtype=torch.int8)
    scale, zeros = (torch.randn(k // 64, n, generator=g).mul(0.1).bfloat16() for _ in range(2))
    return W4A16Weight(pack_int4(codes), scale, zeros, torch.randn(n, generator=g).bfloat16())


def same(a, b) -> bool:
    a, b = a.tensors("x"), b.tensors("x")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


ALL = [*(svdquant(**o) for o in OPTIONS.values()), svdquant(bias=False), w4a16()]


@pytest.mark.parametrize("weight", ALL, ids=[*OPTIONS, "no bias", "w4a16"])
def test_tensors_round_trip_under_comfyui_names(weight):
    stored = weight.tensors("blocks.0.proj")
    assert {
        "blocks.0.proj.weight",
        "blocks.0.proj.weight_scale",
        "blocks.0.proj.comfy_quant",
    } <= stored.keys()
    facts = json.loads(bytes(stored["blocks.0.proj.comfy_quant"].tolist()))
    assert same(FORMATS[facts["format"]].from_tensors(stored, "blocks.0.proj"), weight)
    assert weight.nbytes == sum(
        t.nbytes for name, t in stored.items() if not name.endswith("comfy_quant")
    )


@pytest.mark.parametrize("weight", ALL, ids=[*OPTIONS, "no bias", "w4a16"])
def test_rows_and_cat_are_inverse(weight):
    assert same(
        type(weight).cat([weight.rows(0, 16), weight.rows(16, 20), weight.rows(20, 48)]), weight
    )


def test_pieces_of_different_linears_are_not_joined():
    other = svdquant()
    other.proj_down = other.proj_down * 2
    with pytest.raises(ValueError, match="one proj_down"):
        SVDQuantWeight.cat([svdquant(), other])


@every_option
def test_rows_compute_those_outputs(options):
    weight, x = svdquant(**options), torch.randn(5, 128)
    torch.testing.assert_close(weight.rows(8, 24).forward(x), weight.forward(x)[:, 8:24])


@every_option
def test_dequantized_matrix_is_the_op_on_inputs_that_four_bits_hold_exactly(options):
    """One hot coordinate of the quantized space a token: its code is 7 (15) and the others 0, so
    activations lose nothing.
    """
    weight = svdquant(**options)
    hot = torch.eye(128)
    smooth = weight.smooth_factor.float()
    x = (hadamard64(hot) if weight.rotation else hot) * smooth
    # the shift itself needs a code too: a row that is -SHIFT but for one coordinate
    if weight.act_unsigned:
        x = x - SHIFT
    wanted = x @ weight.dequantize().T + weight.effective_bias()
    torch.testing.assert_close(weight.forward(x), wanted, rtol=1e-4, atol=1e-4)


def test_dequantized_w4a16_is_the_op():
    weight = w4a16()
    torch.testing.assert_close(
        weight.forward(torch.eye(128)),
        weight.dequantize().T + weight.effective_bias(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_wrong_files_are_refused_in_words():
    stored = svdquant().tensors("a")
    with pytest.raises(ValueError, match="a lacks weight_proj_up"):
        SVDQuantWeight.from_tensors(
            {n: t for n, t in stored.items() if n != "a.weight_proj_up"}, "a"
        )
    with pytest.raises(
        ValueError, match="'svdquant_w4a4'; 'awq_w4a16' was expected|'awq_w4a16' was expected"
    ):
        W4A16Weight.from_tensors(stored, "a")
    with pytest.raises(ValueError, match="uses sparkle"):
        SVDQuantWeight.from_tensors(
            stored | {"a.comfy_quant": json_tensor({"format": "svdquant_w4a4", "sparkle": 1})}, "a"
        )
    with pytest.raises(ValueError, match="says rank 32, its factors have 16"):
        SVDQuantWeight.from_tensors(
            stored | {"a.comfy_quant": json_tensor({"format": "svdquant_w4a4", "rank": 32})}, "a"
        )


def test_shapes_that_do_not_fit_are_refused():
    parts = vars(svdquant())
    with pytest.raises(ValueError, match="scale has the shape"):
        SVDQuantWeight(**parts | {"scale": parts["scale"].T})
    with pytest.raises(ValueError, match="K=96 is not a multiple of the group size 64"):
        SVDQuantWeight(
            torch.zeros(4, 48, dtype=torch.int8),
            torch.zeros(1, 4),
            torch.zeros(96, 16),
            torch.zeros(4, 16),
            torch.ones(96),
        )
    with pytest.raises(ValueError, match="excludes act_unsigned"):
        svdquant(rotation=64, act_unsigned=True)
    with pytest.raises(ValueError, match="dtypes are fixed"):
        svdquant().to(torch.float16)


@pytest.mark.parametrize("weight", ALL, ids=[*OPTIONS, "no bias", "w4a16"])
def test_modules_hold_the_names_on_disk_and_compute_the_same(weight):
    module, x = as_module(weight), torch.randn(3, 128)
    assert torch.equal(module(x), weight.forward(x))
    assert {f"m.{name}" for name in module.state_dict()} == weight.tensors("m").keys()
    assert same(module.quantized(), weight)
    fresh = as_module(weight.to("cpu"))
    fresh.load_state_dict(module.state_dict())
    assert tensor_json(fresh.comfy_quant) == weight.facts()


def test_a_state_dict_with_other_options_is_refused():
    with pytest.raises(ValueError, match="rotation"):
        SVDQuantLinear(svdquant()).load_state_dict(
            SVDQuantLinear(svdquant(rotation=64)).state_dict()
        )


@every_option
def test_training_reaches_factors_bias_and_input(options):
    module, x = (
        SVDQuantLinear(svdquant(**options), train=True),
        torch.randn(6, 128, requires_grad=True),
    )
    assert {name for name, _ in module.named_parameters()} == {
        "weight_proj_down",
        "weight_proj_up",
        "bias",
    }
    grad = torch.randn(6, 48)
    module(x).backward(grad)
    weight = module.quantized()
    torch.testing.assert_close(x.grad, grad @ weight.dequantize().detach(), rtol=1e-3, atol=1e-3)
    down = weight.proj_down.detach().float()
    torch.testing.assert_close(
        weight.proj_up.grad.float(), grad.T @ (x.detach() @ down), rtol=2e-2, atol=2e-2
    )
    torch.testing.assert_close(module.bias.grad.float(), grad.sum(0), rtol=2e-2, atol=2e-2)
    assert not any(p.requires_grad for p in W4A16Linear(w4a16()).parameters())
