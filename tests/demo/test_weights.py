"""What is shipped: small, obedient, and still so at 4 bits."""

import json

import pytest

from nibble.demo import pictures, run
from nibble.quant import diffusers as models
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.svdquant.recipe import Recipe

PROMPTS, SEEDS = 10, range(2)


@pytest.fixture(scope="module")
def full():
    return run.draw(pictures.load_flux(), pictures.load_vae(), PROMPTS, SEEDS)[0]


def test_the_weights_are_at_most_25_megabytes():
    assert sum(path.stat().st_size for path in pictures.WEIGHTS.glob("*/*")) <= 25e6


def test_sixteen_bit_pictures_show_what_was_asked(full):
    scores = run.compare(full, full, PROMPTS, SEEDS)
    assert scores["colour"] >= 0.95
    assert scores["place"] >= 0.95
    assert scores["all"] >= 0.85


def test_fast_four_bit_pictures_stay_close(full, tmp_path):
    target = tmp_path / "demo.safetensors"
    report = run.quantize(target, Recipe.from_preset("fast"))
    drawn = run.draw(
        models.load_quantized(target, full.dtype), pictures.load_vae(), PROMPTS, SEEDS
    )[0]
    scores, reference = (run.compare(p, full, PROMPTS, SEEDS) for p in (drawn, full))
    assert scores["psnr"] > 32
    assert scores["ssim"] > 0.97
    assert scores["all"] >= reference["all"] - 0.1
    assert report.bytes_after < report.bytes_before / 2
    assert (
        json.loads(open_quantized(target).metadata["calibration"])["kind"] == "random conditioning"
    )
