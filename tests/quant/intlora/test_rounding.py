"""IntLoRA on a rounded 16-bit weight: the paper's algebra written out anew, and a base that is made
again from the weight, bit for bit.
"""

import dataclasses
import json

import pytest
import torch

from intlora_bases import K, N, factors, normal
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.safetensors import read_header
from nibble.quant.intlora import file, merge
from nibble.quant.intlora.adapter import Adapter, LayerAdapter
from nibble.quant.intlora.auxiliary import LAPLACE_SCALE, TABLE_SIGMA, laplace
from nibble.quant.intlora.factors import quantize
from nibble.quant.intlora.linear import Grid, separated
from nibble.quant.intlora.rounding import Rounding
from nibble.quant.intlora.train import AdapterOptions, adapter, attach

NAME = "blocks.0.proj"
WEIGHT = normal(N, K, size=0.03)


def layer_of(variant: str, bits: int) -> tuple[LayerAdapter, torch.Tensor]:
    """An adapter on the paper's grid, and the base's integers W_int as float64."""
    base, rule = separated(WEIGHT, variant, 3, NAME, Grid.of_paper(bits))
    layer = LayerAdapter(rule, base.digest(), factors(size=0.003), rounding=Rounding.of(base))
    return layer, base.integers().double()


def official_u(layer: LayerAdapter, w_int: torch.Tensor) -> torch.Tensor:
    """U = s + (R + A B) / W~_int, W~_int being W_int with 1 for 0."""
    s = layer.rounding.scale[0].double()[:, None]
    r = layer.rule.noise.matrix(K, torch.float64)
    return s + (r + layer.factors.delta()) / torch.where(w_int == 0, 1.0, w_int)


def merged(layer: LayerAdapter) -> torch.Tensor:
    return merge.merge(layer.rounded(WEIGHT), [(layer, 1.0)]).base.weight(torch.float64)


@pytest.mark.parametrize("bits", [4, 8])
def test_mul_is_the_papers_formula(bits):
    """W' = s_bar (U_int . W_int), U_int = clamp(round(U / s_bar) + z_bar, 0, 2^b - 1) - z_bar."""
    layer, w_int = layer_of("mul", bits)
    s_bar = layer.rounding.scale[0].double() * layer.rule.u_scale.double()
    z_bar = layer.rule.u_zero.double()[:, None]
    levels = (official_u(layer, w_int) / s_bar[:, None]).round() + z_bar
    u_int = levels.clamp(0, 2**layer.rule.bits - 1) - z_bar
    assert (levels.amin() < 0 or levels.amax() > 255) or bits == 8, "some are clamped"
    expected = s_bar[:, None] * (u_int * w_int)
    assert torch.allclose(merged(layer), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
def test_shift_is_the_papers_formula_in_units_of_the_scale(bits):
    """W' = sign(V) 2^round(log2 |V|) W_int; with V = U / s, and exponents more than the window
    below a row's largest raised to it.
    """
    layer, w_int = layer_of("shift", bits)
    s = layer.rounding.scale[0].double()[:, None]
    v = official_u(layer, w_int) / s
    e = v.abs().log2().round()
    top = torch.where(w_int == 0, -torch.inf, e).amax(1, keepdim=True)
    e = torch.maximum(e, top - layer.rule.window)
    expected = s * v.sign() * 2**e * w_int
    assert torch.allclose(merged(layer), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
def test_adaptation_and_quantization_are_separated(bits):
    """Before U is quantized, U . W_int = Q[W - R] + R + A B wherever W_int is not 0."""
    layer, w_int = layer_of("mul", bits)
    s, r = layer.rounding.scale[0].double()[:, None], layer.rule.noise.matrix(K, torch.float64)
    rounded = ((WEIGHT.double() - r) / s).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert torch.equal(rounded, w_int)
    product = official_u(layer, w_int) * w_int
    expected = torch.where(w_int == 0, 0.0, s * w_int + r + layer.factors.delta())
    assert torch.allclose(product, expected, atol=1e-12)
    assert 0 < (w_int == 0).double().mean() < {4: 0.3, 8: 0.03}[bits]


def test_the_variance_of_r_is_matched_with_the_papers_exponent():
    """R* = r^1.5 R, r = sigma_W / sigma_R, R of a Laplace distribution of scale 0.5."""
    layer, _ = layer_of("mul", 4)
    original = laplace(range(N), K, 3, NAME).double() * (LAPLACE_SCALE * 2**0.5 / TABLE_SIGMA)
    assert original.std() == pytest.approx(0.5**0.5, rel=0.02)
    r = WEIGHT.double().square().mean(1, keepdim=True).sqrt() / 0.5**0.5
    found = layer.rule.noise.matrix(K, torch.float64)
    assert torch.allclose(found, r**1.5 * original, rtol=1e-5)


@pytest.mark.parametrize("variant", ["mul", "shift", "shift_add"])
@pytest.mark.parametrize("grid", [Grid.of_paper(4), Grid.of_paper(8), Grid(4, 64, odd=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_is_made_again_from_the_weight(variant, grid, dtype, monkeypatch):
    monkeypatch.setattr("nibble.quant.intlora.rounding.BLOCK", 5 * K)  # rows in blocks
    weight = WEIGHT.to(dtype)
    base, rule = separated(weight, variant, 3, NAME, grid)
    layer = LayerAdapter(rule, base.digest(), factors(), rounding=Rounding.of(base))
    again = layer.rounded(weight)
    assert torch.equal(again.integers(), base.integers()) and again.digest() == layer.base
    assert layer.rounded(weight + 0.01).digest() != layer.base


def test_blocks_of_rows_change_no_bit(monkeypatch):
    whole = [separated(WEIGHT, variant, 3, NAME) for variant in ("mul", "shift")]
    monkeypatch.setattr("nibble.quant.intlora.rounding.BLOCK", 7 * K)
    for (base, rule), variant in zip(whole, ("mul", "shift"), strict=True):
        other, other_rule = separated(WEIGHT, variant, 3, NAME)
        assert base.digest() == other.digest()
        assert torch.equal(rule.noise.scale, other_rule.noise.scale)
        assert variant == "shift" or torch.equal(rule.u_scale, other_rule.u_scale)


@pytest.mark.parametrize(
    "variant, bits, odd, percent",
    [
        ("mul", 8, False, 2.6),
        ("mul", 4, False, 12.5),
        ("mul", 4, True, 10.8),
        ("shift", 8, False, 11.7),
        ("shift", 4, False, 16.8),
        ("shift", 4, True, 15.7),
    ],
)
def test_what_rounding_costs_before_anything_is_learned(variant, bits, odd, percent):
    """Relative error of W' at A B = 0, of a Gaussian weight; the help page has these figures."""
    weight = normal(512, 1024, size=0.02)
    grid = dataclasses.replace(Grid.of_paper(bits), odd=odd)
    base, rule = separated(weight, variant, 0, "x", grid)
    nothing = quantize(torch.zeros(512, 2), normal(2, 1024, size=1.0))
    layer = LayerAdapter(rule, base.digest(), nothing, rounding=Rounding.of(base))
    found = merge.merge(base, [(layer, 1.0)]).base.weight()
    assert 100 * (found - weight).norm() / weight.norm() == pytest.approx(percent, abs=0.3)


# ---- in a file


def trained_file(path, variant: str = "mul"):
    model = torch.nn.Sequential(torch.nn.Linear(K, N))
    layers = attach(model, ["0"], AdapterOptions(variant, 4, grid=Grid.of_paper(4)))
    made = adapter(layers)
    file.save(made, path)
    return model, made


@pytest.mark.parametrize("variant", ["mul", "shift", "shift_add"])
def test_a_file_holds_how_its_base_is_made_and_none_of_its_integers(tmp_path, variant):
    model, made = trained_file(tmp_path / "a.safetensors", variant)
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata["intlora_version"] == "2"
    described = json.loads(header.metadata["layers"])["0"]
    assert described["base_bits"] == 4 and described.get("seed", 0) == 0
    read = file.read(tmp_path / "a.safetensors").layers["0"]
    assert torch.equal(read.rounding.scale, made.layers["0"].rounding.scale)
    weight = object.__getattribute__(model[0], "replaced").weight
    assert read.rounded(weight).digest() == read.base
    size = sum(tensor.nbytes for tensor in read.tensors().values())
    assert size < 0.5 * weight.numel(), "of these, codes alone would be half a byte a weight"


def test_an_adapter_of_integers_keeps_its_version(tmp_path):
    layer, _ = layer_of("mul", 4)
    file.save(
        Adapter({NAME: dataclasses.replace(layer, rounding=None)}), tmp_path / "a.safetensors"
    )
    assert read_header(tmp_path / "a.safetensors").metadata["intlora_version"] == "1"


@pytest.mark.parametrize(
    "changes, said",
    [({"base_bits": 5}, "to 4 or 8 bits, not to 5"), ({"base_bits": []}, "to 4 or 8 bits")],
)
def test_damaged_roundings_are_refused(tmp_path, monkeypatch, changes, said):
    described = file._described
    monkeypatch.setattr(file, "_described", lambda layer: described(layer) | changes)
    trained_file(tmp_path / "a.safetensors")
    with pytest.raises(FileRefused, match=said):
        file.read(tmp_path / "a.safetensors")


def test_the_scale_of_another_shape_is_refused(tmp_path):
    layer, _ = layer_of("mul", 4)
    wrong = dataclasses.replace(layer, rounding=Rounding(4, torch.ones(1, N - 1)))
    file.save(Adapter({NAME: wrong}), tmp_path / "a.safetensors")
    with pytest.raises(FileRefused, match="base_scale has another shape"):
        file.read(tmp_path / "a.safetensors")
