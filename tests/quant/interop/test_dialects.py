"""What other writers of the published packing do differently: diffusers' dialect, SDXL's U-Net,
smoothing that was fused upstream.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from compare import assert_same
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.interop.convert import convert, facts_of
from nibble.quant.interop.names import families
from nibble.quant.interop.opening import is_4bit, open_4bit
from nibble.quant.interop.unfuse_norms import unfused
from nibble.quant.weights.base import tensor_json
from nibble.quant.weights.formats import FORMATS
from nibble.quant.weights.fuse import join_rows, split_rows
from published_files import METADATA, RandomFlux, random_linear, svdquant
from published_others import LITE_CONFIG, LiteFlux, fused_flux, sdxl_modules

SVDQ = FORMATS["svdquant_w4a4"]


def saved(tensors, path, metadata=None):
    path.parent.mkdir(exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def assert_same_model(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        if name.endswith("comfy_quant"):
            assert tensor_json(tensors[name]) == tensor_json(tensor), name
        else:
            assert torch.equal(tensors[name].float(), tensor.float()), name


@pytest.fixture(scope="module")
def lite():
    return LiteFlux()


# ---- diffusers' dialect


@pytest.mark.parametrize("form", ["one file", "a file with metadata", "a folder", "parts"])
def test_diffusers_files_keep_their_smoothings_signs_and_order(lite, tmp_path, form):
    tensors = lite.lite()
    if form in ("one file", "a file with metadata"):
        path = saved(
            tensors,
            tmp_path / "flux-lite.safetensors",
            {"config": LITE_CONFIG} if "metadata" in form else None,
        )
    else:
        names, folder = sorted(tensors), tmp_path / "transformer"
        halves = [names] if form == "a folder" else [names[::2], names[1::2]]
        for i, half in enumerate(halves):
            part = f"-0000{i + 1}-of-00002" if len(halves) > 1 else ""
            path = saved(
                {name: tensors[name] for name in half},
                folder / f"diffusion_pytorch_model{part}.safetensors",
            )
        (folder / "config.json").write_text(LITE_CONFIG)
        path = path if form == "parts" else folder
    file = open_4bit(path)
    assert (file.kind, file.family) == ("Nunchaku Lite INT4 (diffusers)", "FLUX.1")
    assert file.layers["single_blocks.0.linear1"] == {
        "format": "svdquant_w4a4",
        "rank": 64,
        "smooth_rows": [128, 128, 128, 512],
    }
    assert file.layers["double_blocks.0.img_mlp.2"] == {"format": "svdquant_w4a4", "rank": 16}, (
        "signed, though behind a GELU"
    )
    assert_same_model(dict(file.tensors()), lite.nibble())
    for name in file.units:
        assert {(s.name, s.dtype, s.shape) for s in file.specs(name)} == {
            (k, t.dtype, tuple(t.shape)) for k, t in file.unit(name).items()
        }


def test_a_missing_part_of_a_diffusers_folder_is_named(lite, tmp_path):
    path = saved(
        dict(list(lite.lite().items())[:400]),
        tmp_path / "transformer" / "diffusion_pytorch_model-00001-of-00003.safetensors",
    )
    with pytest.raises(FileRefused, match="transformer has 1 of the 3 parts"):
        open_4bit(path)


def test_diffusers_files_convert_to_nibble_and_to_nothing_that_cannot_say_it(lite, tmp_path):
    path = saved(lite.lite(), tmp_path / "lite.safetensors")
    lines = dict(convert(path, tmp_path / "own.safetensors", "nibble"))
    assert lines["format"] == "Nunchaku Lite INT4 (diffusers) → Nibble"
    assert facts_of(path)["format"].startswith("Nunchaku Lite")
    open_quantized(tmp_path / "own.safetensors").verify()
    assert_same_model(load_file(tmp_path / "own.safetensors"), lite.nibble())
    with pytest.raises(
        FileRefused, match="q, k and v that differ in smoothing in (double|single)_blocks.0"
    ):
        convert(tmp_path / "own.safetensors", tmp_path / "n.safetensors", "nunchaku")
    with pytest.raises(FileRefused, match="joins parts of unequal smoothing in"):
        convert(tmp_path / "own.safetensors", tmp_path / "k.safetensors", "kitchen")


# ---- linears of several smoothings


def pieces(n=(64, 128, 192), k=128):
    return [
        SVDQ(
            *(
                part[key]
                for key in (
                    "weight",
                    "weight_scale",
                    "weight_proj_down",
                    "weight_proj_up",
                    "weight_smooth_factor",
                    "bias",
                )
            )
        )
        for part in (random_linear(rows, k, 40 + i) for i, rows in enumerate(n))
    ]


def test_a_composite_computes_what_its_pieces_do():
    parts, x = pieces(), torch.randn(3, 5, 128)
    whole = join_rows(parts)
    assert whole.smooth_rows == (64, 128, 192)
    assert whole.smooth_factor.shape == (3, 128)
    alone = torch.cat([part.forward(x) for part in parts], -1)
    # the low-rank branch is summed over more (zero) columns
    assert (whole.forward(x) - alone).norm() < 1e-5 * alone.norm()
    assert torch.equal(whole.dequantize(), torch.cat([part.dequantize() for part in parts]))


def test_a_composite_comes_apart_into_the_very_same_pieces():
    parts = pieces((128, 128))
    for one, other in zip(split_rows(join_rows(parts), [128, 128]), parts, strict=True):
        assert other.facts() == one.facts()
        for name in ("qweight", "scale", "proj_down", "proj_up", "smooth_factor", "bias"):
            assert_same(getattr(one, name).contiguous(), getattr(other, name))


def test_neighbours_that_smooth_alike_are_one_run():
    first, second, third = pieces((64, 64, 64))
    second.smooth_factor = first.smooth_factor.clone()
    whole = join_rows([first, second, third])
    assert whole.smooth_rows == (128, 64)
    assert whole.rows(0, 100).smooth_rows == ()
    assert whole.rows(100, 192).smooth_rows == (28, 64)
    again = SVDQ.from_tensors(whole.tensors("x"), "x")
    assert again.smooth_rows == (128, 64)
    assert torch.equal(again.dequantize(), whole.dequantize())


def test_smoothings_that_do_not_fit_are_refused():
    whole = join_rows(pieces((64, 128)))
    for change in (
        {"smooth_rows": (64, 64)},
        {"smooth_rows": (192,)},
        {"unsigned_from": 64},
        {"smooth_rows": ()},
    ):
        with pytest.raises(ValueError, match="smooth|unsigned_from"):
            SVDQ(**(whole._tensors() | {"smooth_rows": whole.smooth_rows} | change))


# ---- smoothing that was fused into the values


def test_fused_smoothing_is_put_back_so_that_loras_fit(tmp_path):
    flux, s = (
        RandomFlux(),
        2.0 ** torch.randint(-2, 3, (128,), generator=torch.Generator().manual_seed(0)),
    )
    plain = dict(flux.nibble())
    for name in [key for key in plain if key.endswith("_attn.proj.weight_smooth_factor")]:
        plain[name] = s.bfloat16()
    for name in [key for key in plain if key.endswith("linear2.weight_smooth_factor")]:
        plain[name] = torch.cat([s.bfloat16(), plain[name][128:]])
    file = open_4bit(saved(fused_flux(flux, s), tmp_path / "fused.safetensors"))
    state = dict(file.tensors())
    for name, tensor in plain.items():  # powers of two: no rounding anywhere
        assert name.endswith("comfy_quant") or torch.equal(state[name].float(), tensor.float()), (
            name
        )


def test_putting_it_back_rounds_scales_and_factors_once_more():
    """Against the file's own numbers in float64: at most one rounding to bfloat16, 2^-9, in each of
    a weight's scale and factors; smoothing itself is moved as it is.
    """
    draw = torch.Generator().manual_seed(0)
    s = torch.randn(128, generator=draw).exp().bfloat16()
    values = pieces((384,))[0]
    rows = torch.cat([torch.ones(256), s.float()]).double()[:, None]
    expected = values.dequantize().double() * rows
    back = unfused(values, s)
    error = (back.dequantize().double() - expected).norm() / expected.norm()
    assert 1e-4 < error < 2**-9
    assert torch.equal(back.qweight, values.qweight)
    assert torch.equal(back.scale[:, :256], values.scale[:, :256]), "q and k stay"

    out = SVDQ(**pieces((128,))[0]._tensors() | {"smooth_factor": torch.ones_like(s)})
    back = unfused(out, s)
    assert torch.equal(back.smooth_factor, s)
    assert torch.equal(back.qweight, out.qweight) and torch.equal(back.scale, out.scale)
    down = out.proj_down.double() / s.double()[:, None]
    assert ((back.proj_down.double() - down).abs() <= 2**-8 * down.abs()).all()


def test_smoothing_that_was_not_fused_is_left_alone(tmp_path):
    blocks, others = RandomFlux().nunchaku()
    assert not open_4bit(saved(blocks | others, tmp_path / "plain.safetensors"))._fused


# ---- SDXL


def test_sdxl_s_names_are_those_of_both_unets():
    family = next(family for family in families() if family.name == "SDXL")
    modules = sdxl_modules()
    assert {ours: recipe.parts[0].module for ours, recipe in family.resolve(modules).items()} == {
        ours: theirs for theirs, ours in modules.items()
    }
    block = "up_blocks.0.attentions.2.transformer_blocks.9"
    recipes = family.resolve(
        [f"{block}.attn1.to_qkv", f"{block}.attn2.to_k", f"{block}.ff.net.2", f"{block}.norm3"]
    )
    own = "output_blocks.2.1.transformer_blocks.9"
    assert recipes.keys() == {
        f"{own}.{name}"
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn2.to_k", "ff.net.2", "norm3")
    }
    assert recipes[f"{own}.attn1.to_v"].parts[0] == (f"{block}.attn1.to_qkv", 2, 3)


def test_another_unet_is_refused(tmp_path):
    tensors = svdquant(
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_qkv", random_linear(384, 128, 1)
    )
    path = saved(
        tensors | {"down_blocks.0.resnets.0.conv1.weight": torch.ones(4, 4, 3, 3)},
        tmp_path / "sd15.safetensors",
    )
    assert is_4bit(path)
    with pytest.raises(
        FileRefused,
        match=(
            "sd15.safetensors holds down_blocks.0.attentions.0.*no part of SDXL; choose a file of"
            " SDXL alone"
        ),
    ):
        open_4bit(path)


def test_own_files_of_several_smoothings_are_checked(lite, tmp_path):
    state = lite.nibble()
    name = "single_blocks.0.linear1.weight_smooth_factor"
    path = saved(state | {name: state[name][:3]}, tmp_path / "own.safetensors", METADATA)
    with pytest.raises(
        FileRefused,
        match="single_blocks.0.linear1.weight_smooth_factor is missing or has the shape",
    ):
        open_quantized(path)
