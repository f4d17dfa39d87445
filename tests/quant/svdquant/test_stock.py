"""The formats of stock ComfyUI: their bytes against decoders written from the formats' own words,
their grids, and GPTQ on them.
"""

import json

import pytest
import torch

from nibble.quant.calibration.statistics import InputStats
from nibble.quant.files.safetensors import read_header, read_tensor
from nibble.quant.svdquant.gptq import gptq_on, nearest_on
from nibble.quant.svdquant.published_grids import E2M1, E2M1Grid, Int8, Lookup8, e4m3
from nibble.quant.svdquant.stock.fit import quantize_layer
from nibble.quant.svdquant.stock.formats import FORMATS, regular_hadamard, tiled_scales
from nibble.quant.svdquant.stock.quantize import StockJob
from nibble.quant.svdquant.stock.recipe import StockRecipe

N, K = 144, 256


@pytest.fixture
def weight():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.fixture
def stats():
    """Inputs of a few strong directions, with a mean."""
    draw = torch.Generator().manual_seed(1)
    mixed = torch.randn(24, K, generator=draw)
    seen = InputStats.empty(K, samples=256)
    seen.update(
        torch.randn(512, 24, generator=draw) @ mixed + torch.randn(512, K, generator=draw) + 0.5
    )
    return seen


def fitted(form, weight, stats, preset="best"):
    recipe = StockRecipe.from_preset(preset, format=form)
    return quantize_layer(weight, torch.zeros(len(weight)), stats, FORMATS[form], recipe)


def by_hand(form, tensors):
    """Row 0 of a file's layer, number by number, in the rotated space."""
    if form == "int8_convrot":
        return [float(c) * float(tensors["weight_scale"][0, 0]) for c in tensors["weight"][0]]
    out = []
    for k in range(K):
        byte = int(tensors["weight"][0, k // 2]) & 255
        if form == "asym_w4a8_int8":
            code = byte >> 4 if k % 2 else byte & 15
            level = float(tensors["weight_codebook"][code])
            level = round(level * float(tensors["weight_s_rel"][0, k // 16]))
            out.append(level * float(tensors["weight_s_channel"][0]))
        else:
            code = byte & 15 if k % 2 else byte >> 4
            group, sign = k // 16, -1 if code & 8 else 1
            place = group // 4 * 512 + group % 4  # row 0: r % 32 and r // 32 are 0
            scale = float(tensors["weight_scale"].reshape(-1)[place])
            out.append(sign * E2M1[code & 7] * scale * float(tensors["weight_scale_2"]))
    return out


@pytest.mark.parametrize("form", list(FORMATS))
def test_bytes_mean_what_the_format_says(form, weight, stats):
    tensors, db, _ = fitted(form, weight, stats)
    row = torch.tensor(by_hand(form, tensors))
    turned = FORMATS[form].rotated(weight)[0]
    assert (row - turned).norm() < (0.02 if form == "int8_convrot" else 0.25) * turned.norm()
    assert db > 18
    specs = {spec.name: (spec.dtype, spec.shape) for spec in FORMATS[form].specs(N, K)}
    assert {
        name: (t.dtype, tuple(t.shape)) for name, t in tensors.items() if name in specs
    } == specs
    assert tensors.keys() - specs.keys() == {"bias", "comfy_quant"}


@pytest.mark.parametrize("form", list(FORMATS))
def test_recorded_inputs_pay(form, weight, stats):
    assert fitted(form, weight, stats)[1] > fitted(form, weight, stats, "fast")[1] + 0.3


def test_rotation_is_its_own_inverse_and_regular():
    turn = regular_hadamard(64)
    assert torch.allclose(turn @ turn, torch.eye(64), atol=1e-6)
    assert torch.equal(turn, turn.T)
    assert turn.sum(1).unique().numel() == 1  # every row has the same sum


def test_tiled_scales_lie_where_the_matrix_unit_reads_them():
    scale = torch.arange(200 * 6).reshape(200, 6).float()
    tiled = tiled_scales(scale)
    assert tiled.shape == (256, 8)
    flat = tiled.flatten()
    for row, group in ((0, 0), (31, 3), (32, 1), (127, 5), (199, 4)):
        tile = (row // 128) * 2 + group // 4
        r = row % 128
        assert flat[tile * 512 + r % 32 * 16 + r // 32 * 4 + group % 4] == scale[row, group]
    assert flat.sum() == scale.sum()


@pytest.mark.parametrize("kind", ["lookup8", "e2m1", "int8"])
def test_what_lies_on_a_grid_is_not_changed(kind):
    draw = torch.Generator().manual_seed(2)
    row = torch.rand(8, generator=draw) + 0.5
    scale = e4m3(torch.rand(4, 1, 8, generator=draw) * 50 + 40)
    table = torch.linspace(-1, 1, 16)
    grid = {"lookup8": Lookup8(row, table), "e2m1": E2M1Grid(row), "int8": Int8(row)}[kind]
    codes = torch.randint(0, 16, (4, 16, 8), generator=draw)
    codes[:, 0] = 15  # each group reaches its largest value
    values = grid.values(codes, scale)
    found = grid.values(grid.codes(values, scale), scale)
    assert torch.allclose(found, values)
    importance = torch.ones(4, 16, 1)
    again = grid.scales(values, importance)
    assert torch.allclose(grid.values(grid.codes(values, again), again), values, rtol=1e-5)


def test_gptq_without_correlations_is_rounding_to_nearest(weight):
    grid = FORMATS["nvfp4"].grid(weight)
    hessian = torch.eye(K).reshape(1, K, K)
    steered = gptq_on(grid, weight, hessian).dense()
    nearest = nearest_on(grid, weight, torch.ones(K)).dense()
    assert torch.allclose(steered, nearest, atol=1e-6)


def test_a_hessian_of_blocks_that_no_rotation_fits_is_joined(stats):
    """K = 1280: blocks of 320 beside rotations of 256."""
    draw = torch.Generator().manual_seed(3)
    seen = InputStats.empty(1280, samples=64)
    seen.update(torch.randn(128, 1280, generator=draw))
    assert seen.hessian.shape == (4, 320, 320)
    layer = torch.randn(64, 1280, generator=draw) * 0.05
    assert fitted("asym_w4a8_int8", layer, seen)[1] > 18


def test_whole_file(tmp_path):
    from safetensors.torch import save_file

    from random_flux import flux_state

    source, target = tmp_path / "m.safetensors", tmp_path / "t.safetensors"
    save_file(flux_state(), source)
    recipe = StockRecipe.from_preset("fast", keep=("single_blocks.0.*",))
    report = StockJob.prepare(source, target, recipe).write()
    assert {row.action for row in report.rows} == {"w4a8", "keep"}
    header = read_header(target)
    facts = json.loads(bytes(read_tensor(header, "double_blocks.0.img_mlp.0.comfy_quant").tolist()))
    assert facts["format"] == "asym_w4a8_int8"
    assert "single_blocks.0.linear1.comfy_quant" not in header.tensors
    predicted = StockJob.predict(
        {name: info.shape for name, info in read_header(source).tensors.items()}, recipe, "m"
    )
    assert abs(predicted.bytes_after - report.bytes_after) < 20_000
    again = StockJob.prepare(source, target, recipe)
    assert again.existing_report({}).rows == again.write().rows


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"format": "int3"}, "format='int3' is not one of asym_w4a8_int8"),
        ({"modulation": "w4a16"}, "modulation='w4a16'"),
        ({"keep": "a.*"}, "not a list of name patterns"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_choices_are_refused_in_words(choices, words):
    with pytest.raises(ValueError, match=words):
        StockRecipe.from_preset("fast", **choices)
