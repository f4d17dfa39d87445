"""What files will hold, counted by hand from their shapes; and `python -m nibble plan`."""

import importlib
import json

import pytest
import torch
from safetensors.torch import save_file

from nibble.quant.cli.plan import card_bytes, encoder, model, vae_weights
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.files.memory import published, weights
from nibble.quant.files.memory.comfyui import GIB
from nibble.quant.files.memory.decoders import KL, decoder_of
from nibble.quant.svdquant.quantize import quantize_checkpoint
from nibble.quant.svdquant.recipe import Recipe

cli = importlib.import_module("nibble.__main__")
SHAPES = flux1_shapes(1, 1, 128, 64, 64)
T5 = {
    "shared.weight": (32000, 1024),
    "encoder.block.0.layer.0.SelfAttention.q.weight": (1024, 1024),
    "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (32, 64),
    "encoder.block.0.layer.0.layer_norm.weight": (1024,),
    "encoder.block.0.layer.1.DenseReluDense.wi_0.weight": (4096, 1024),
    "encoder.block.0.layer.1.DenseReluDense.wo.weight": (1024, 4096),
}


def saved(path, shapes, dtype=torch.bfloat16):
    draw = torch.Generator().manual_seed(0)
    tensors = {
        name: (torch.randn(shape, generator=draw) * 0.05).to(dtype)
        for name, shape in shapes.items()
    }
    save_file(tensors, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A small FLUX in 16 bits and in 4, a text encoder, a VAE and a LoRA."""
    folder = tmp_path_factory.mktemp("files")
    source = saved(folder / "flux.safetensors", SHAPES)
    recipe = Recipe.from_preset("fast", rank=16, solver="svd", smoothing_grid=1)
    quantize_checkpoint(source, folder / "flux-4bit.safetensors", recipe)
    saved(folder / "encoder.safetensors", T5, torch.float16)
    saved(folder / "vae.safetensors", {"decoder.conv_in.weight": (8, 16, 3, 3)}, torch.float32)
    lora = {"a.lora_down.weight": (8, 128), "a.lora_up.weight": (128, 8), "a.alpha": ()}
    saved(folder / "lora.safetensors", lora, torch.float32)
    return folder


def test_what_comfyui_does_not_load_of_a_vae_is_not_counted(tmp_path):
    """Mage-Flow's file brings the encoder that its latents were made like."""
    shapes = {
        "student.dconv_encoder.proj_out.weight": (256, 384, 1, 1),
        "pipeline.y_embedder.decoder.weight": (8, 8),
        "pipeline.y_embedder.encoder.weight": (64, 64),
        "pipeline.y_embedder.bottleneck.weight": (64, 64),
    }
    found = weights.vae_of(saved(tmp_path / "mage.safetensors", shapes))
    assert found.numbers == 256 * 384 + 64
    # 1000 numbers for each of 16 x 16 pixels of a position (comfy/sd.py)
    assert found.decoder.bytes(1, (1024, 1024), 2) == 2 * 1000 * 64 * 64 * 256


def test_a_text_encoder_is_counted_matrix_by_matrix(files):
    found = weights.encoder_of(files / "encoder.safetensors")
    large, small = 1024 * (1024 + 4096 + 4096), 32000 * 1024 + 32 * 64 + 1024
    assert found.bytes == 2 * (large + small)
    assert (found.hidden, found.widest, found.largest) == (1024, 4096, 4096 * 1024)
    assert found.bytes_4 is None  # under a gigabyte
    # 1024 + 4096 + 1024 rows of 4-bit weights; 32000 words are 8-bit rows
    table, rest = 32000 * 1024, 32 * 64 + 1024
    four = large // 2 + large // 32 + 4 * 6144
    assert weights._four_bit(T5) == four + table + 4 * 32000 + 2 * rest


def test_published_t5_is_within_its_2_9_gb_at_4_bits():
    found = weights.published_encoder("t5-xxl")
    assert found.bytes_4 == pytest.approx(2.597e9, rel=0.001)  # its file of real shapes: 2.598 GB
    assert found.bytes_4 < 2.9e9


def test_a_vae_and_a_lora(files):
    vae = weights.vae_of(files / "vae.safetensors")
    assert (vae.numbers, vae.decoder) == (8 * 16 * 9, KL)
    lora = weights.lora_of(files / "lora.safetensors")
    assert (lora.bytes, lora.rank) == (2 * (2 * 8 * 128 + 1), 8)


def test_a_vae_of_sound_is_not_guessed():
    assert decoder_of({"decoder.layers.1.layers.0.beta": (1,)}) is None


def test_what_is_predicted_of_a_16_bit_model_is_what_its_4_bit_file_holds(files):
    dense, made = (
        model(str(files / name)) for name in ("flux.safetensors", "flux-4bit.safetensors")
    )
    assert dense.bytes == sum(2 * torch.Size(shape).numel() for shape in SHAPES.values())
    assert made.four_bit is None
    assert made.widest == dense.four_bit.widest
    assert made.modulation == pytest.approx(dense.four_bit.modulation, rel=0.05)
    assert made.sampler == dense.sampler == published.Sampler(3.1, (8, 1), 2)


def test_modulation_is_that_of_layers_that_give_more_than_they_read(files):
    """img_mod and txt_mod of 6 x 128 outputs, a single block's of 3, the last layer's of 2: codes
    of half a byte, a bfloat16 scale for 64 of them and a bfloat16 bias.
    """
    outputs = (6 + 6 + 3 + 2) * 128
    made = model(str(files / "flux-4bit.safetensors"))
    assert made.modulation == outputs * (128 // 2 + 128 // 64 * 2 + 2)


def test_a_model_of_no_known_name_is_planned_by_comfyuis_default():
    assert published.sampler_of({"what.weight": (1, 1)}, "x") == published.DEFAULT


def test_models_of_sound_are_refused():
    shapes = {"lyric_proj.weight": (1, 1)}
    with pytest.raises(FileRefused, match=r"song.safetensors makes sound, and the plan knows"):
        published.sampler_of(shapes, "song.safetensors")


@pytest.mark.parametrize("name", published.models())
def test_a_published_model_can_be_planned(name):
    found = model(name)
    assert found.four_bit.bytes < found.bytes
    row = published.models()[name]
    for part in row["encoders"]:
        encoder(part)
    if "vae" in row:
        vae_weights(row["vae"])


def test_cards_are_sold_in_gib():
    assert card_bytes("8 GB") == card_bytes("8") == card_bytes("8gb") == 8 * GIB
    assert card_bytes("CPU") is None
    with pytest.raises(ValueError, match="is no size of a graphics card"):
        card_bytes("big")


# ---- the command


def run(capsys, *arguments) -> str:
    assert cli.main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_flux_and_its_t5_fit_into_8_gb_by_the_plan(capsys):
    """The goal: FLUX.1 dev at a megapixel, T5 included, never over 7.5 GB nor 16 GB of RAM."""
    told = json.loads(run(capsys, "flux1-dev", "--card", "8 GB", "--json"))
    assert [stage["name"] for stage in told["stages"]] == ["encode", "sample", "decode"]
    assert max(stage["peak"] for stage in told["stages"]) < 7.5e9
    assert max(stage["ram_peak"] for stage in told["stages"]) < 16e9
    on = [switch["name"] for switch in told["switches"] if switch["on"]]
    assert on == ["4-bit model", "text encoder at 4 bits", "modulation in RAM"]
    assert told["verdict"] == "fits, with 3 of the switches"


def test_files_are_planned_in_words(capsys, files):
    named = [files / f"{name}.safetensors" for name in ("flux-4bit", "encoder", "vae", "lora")]
    out = run(
        capsys, named[0], "--encoder", named[1], "--vae", named[2], "--lora", named[3],
        "--width", 512, "--card", "6 GB",
    )  # fmt: skip
    assert "encode: " in out
    assert "of the card's 5.37 GB" in out
    assert "lora.safetensors" in out
    assert out.splitlines()[-1] == "fits as it is"


@pytest.mark.parametrize(
    "model, left_out",
    [
        ("flux1-dev", []),
        ("mage-flow", []),
        ("wan2.2-ti2v-5b", []),
        ("minimax-h3", ["no text encoder is named", "no VAE is named"]),
        ("mochi", ["no VAE is named"]),
        ("z-image-pixel", []),  # makes pixels: there is nothing to decode
    ],
)
def test_the_plan_says_which_stage_it_leaves_out(capsys, model, left_out):
    told = json.loads(run(capsys, model, "--card", "8 GB", "--json"))
    assert [note.partition(";")[0] for note in told["notes"]] == left_out


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["flux3"], "flux3 is no file and no model that the plan knows"),
        (["flux1-dev", "--encoder", "t6"], "t6 is no file and no text encoder"),
        (["flux1-dev", "--card", "0"], "is no size of a graphics card"),
        (["flux1-dev", "--width", "0"], "give numbers above 0"),
        (["not-there.safetensors"], "not-there.safetensors"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_sentence(capsys, arguments, complaint):
    assert cli.main(["plan", *arguments]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nibble: ")]
    assert len(lines) == 1
    assert complaint in lines[0]


def test_an_encoder_that_is_none_is_refused(capsys, files):
    arguments = ["plan", "flux1-dev", "--encoder", str(files / "vae.safetensors")]
    assert cli.main(arguments) == 1
    assert "no text encoder" in capsys.readouterr().err
