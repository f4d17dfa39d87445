"""The node and the command line make the same file of one model, recipe and set of prompts.

Two implementations of FLUX agree to float32's last digits, not beyond. So it is compared what they
draw and what they record; and from what one of them recorded, both make the same bytes.
"""

import importlib
import json
import shutil

import folder_paths
import pytest
import torch

from nibble.nodes.bridge.quantize import prompts as node_prompts
from nibble.nodes.bridge.quantize import record_inputs
from nibble.nodes.bridge.quantize.svdquant import SVDQuantRequest
from nibble.nodes.bridge.quantized import loading
from nibble.quant.calibration import pictures
from nibble.quant.files import prompts as prompts_file
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.svdquant.recipe import Recipe

diffusers = pytest.importorskip("nibble.quant.diffusers", reason="diffusers is not installed")
cli = importlib.import_module("nibble.__main__")
QUICK = dict(rank=16, solver="svd", rotation="off")
TYPED = ["--rank", "16", "--solver", "svd", "--rotation", "off"]
NAME = "flux-svdq-int4-r16.safetensors"


@pytest.fixture
def folder(tmp_path, monkeypatch, flux_file):
    """ComfyUI's folders of models and of prompts, with the 16-bit model."""
    for kind in (loading.FOLDER, node_prompts.FOLDER):
        places = ([str(tmp_path)], {".safetensors"})
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, places)
        folder_paths.filename_list_cache.pop(kind, None)
    shutil.copy(flux_file, tmp_path / "flux.safetensors")
    yield tmp_path
    for kind in (loading.FOLDER, node_prompts.FOLDER):
        folder_paths.filename_list_cache.pop(kind, None)


def positive(count: int) -> list:
    draw = torch.Generator().manual_seed(1)
    return [
        [
            torch.randn(1, 6 + i, 64, generator=draw),
            {"pooled_output": torch.randn(1, 64, generator=draw), "guidance": 2.5},
        ]
        for i in range(count)
    ]


LATENT = {"samples": torch.zeros(1, 16, 8, 12)}


def both(folder, monkeypatch, preset: str, asked: dict, typed: list[str]) -> dict[str, dict]:
    """Runs the node, then the command line with the node's statistics: road → {"recorded",
    "bytes", "calibration"}.
    """
    found: dict[str, dict] = {"node": {}, "terminal": {}}

    def kept(road, record, given=None):
        def recorded(*arguments, **named):
            found[road]["recorded"] = record(*arguments, **named)
            return given() if given else found[road]["recorded"]

        return recorded

    monkeypatch.setattr(record_inputs, "record", kept("node", record_inputs.record))
    monkeypatch.setattr(
        diffusers,
        "record_inputs",
        kept("terminal", diffusers.record_inputs, lambda: found["node"]["recorded"]),
    )
    recipe = Recipe.from_preset(preset, **QUICK, smoothing_grid=None)
    SVDQuantRequest(model_name="flux.safetensors", recipe=recipe, **asked).run()
    target = folder / "terminal.safetensors"
    arguments = ["quantize", str(folder / "flux.safetensors"), str(target), "--preset", preset]
    assert cli.main([*arguments, *TYPED, *typed]) == 0
    for road, path in (("node", folder / NAME), ("terminal", target)):
        found[road]["bytes"] = path.read_bytes()
        found[road]["calibration"] = open_quantized(path).fact("calibration")
    return found


def assert_the_same(found: dict[str, dict]) -> None:
    node, terminal = found["node"], found["terminal"]
    assert node["calibration"] == terminal["calibration"]
    assert node["recorded"].keys() == terminal["recorded"].keys()
    for name, ours in node["recorded"].items():
        theirs = terminal["recorded"][name]
        assert (ours.count, ours.pictures) == (theirs.count, theirs.pictures), name
        assert torch.equal(ours.owners, theirs.owners), name
        for moments in ("mean_square", "hessian"):
            one, other = getattr(ours, moments), getattr(theirs, moments)
            assert (one - other).norm() < 1e-3 * one.norm(), (name, moments)
    assert node["bytes"] == terminal["bytes"]


def test_best_on_saved_prompts_is_the_same_file(folder, monkeypatch):
    asked = positive(3)
    path = node_prompts.save(asked, LATENT, "mine", overwrite=False)
    found = both(
        folder,
        monkeypatch,
        "best",
        {"positive": asked, "latent": LATENT, "steps": 2},
        ["--prompts", path, "--steps", "2"],
    )
    assert found["node"]["calibration"]["latent"] == [1, 16, 8, 12]
    assert_the_same(found)


def test_fast_on_noise_is_the_same_file(folder, monkeypatch):
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: True)
    monkeypatch.setattr(pictures, "TOKENS", 8)
    monkeypatch.setattr(pictures, "RANDOM_PIXELS", 64)
    found = both(folder, monkeypatch, "fast", {}, [])
    assert found["node"]["calibration"]["kind"] == pictures.RANDOM
    assert_the_same(found)


def test_fast_from_weights_alone_is_the_same_file(folder, monkeypatch):
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: False)
    recipe = Recipe.from_preset("fast", **QUICK)
    SVDQuantRequest(model_name="flux.safetensors", recipe=recipe).run()
    target = folder / "terminal.safetensors"
    source = folder / "flux.safetensors"
    arguments = ["quantize", str(source), str(target), "--memory-cap", "0.0001", *TYPED]
    assert cli.main(arguments) == 0
    ours, theirs = open_quantized(folder / NAME), open_quantized(target)
    assert [ours.unit(name).keys() for name in ours.units] == [
        theirs.unit(name).keys() for name in theirs.units
    ]
    for name in ours.units:
        for key, tensor in ours.unit(name).items():
            assert torch.equal(tensor, theirs.unit(name)[key]), key


def test_what_is_drawn_is_told_by_the_file_of_prompts(folder):
    asked = positive(2)
    stored = prompts_file.read(node_prompts.save(asked, LATENT, "", overwrite=False))
    assert (stored.size, stored.guidance) == ((8, 12), 2.5)
    for entry, tokens, pooled in zip(asked, stored.tokens, stored.pooled, strict=True):
        assert torch.equal(entry[0][0], tokens)
        assert torch.equal(entry[1]["pooled_output"][0], pooled)


@pytest.mark.parametrize("wanted, size", [((), [8, 12]), (("--width", "64"), [8, 8])])
def test_a_size_that_is_typed_goes_before_the_file_s(folder, wanted, size):
    path = node_prompts.save(positive(2), LATENT, "", overwrite=False)
    target = folder / "q.safetensors"
    arguments = ["quantize", str(folder / "flux.safetensors"), str(target), *TYPED]
    assert cli.main([*arguments, "--prompts", path, "--steps", "1", *wanted]) == 0
    calibration = json.loads(open_quantized(target).metadata["calibration"])
    assert calibration["latent"][2:] == size


class Clip:
    """A text encoder that counts."""

    def __init__(self):
        self.texts: list[str] = []

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        self.texts.append(text)
        return positive(1)


@pytest.mark.parametrize("given, added", [(0, 24), (1, 11), (11, 1), (12, 0), (30, 0)])
def test_a_text_encoder_adds_prompts_until_they_are_enough(given, added):
    clip = Clip()
    found = node_prompts.with_own(positive(given), clip)
    assert (len(found), len(set(clip.texts))) == (given + added, added)
    assert node_prompts.with_own(None, None) is None


def test_few_prompts_are_told_with_the_way_out(folder):
    recipe = Recipe.from_preset("best", **QUICK)
    asked = {"positive": positive(1), "latent": LATENT, "steps": 1}
    _, report = SVDQuantRequest(model_name="flux.safetensors", recipe=recipe, **asked).run()
    assert any("measured on 1 prompt, and 15 more" in n and "'clip'" in n for n in report.notes)


def test_the_noise_is_comfyui_s(folder):
    import comfy.sample

    latent = torch.zeros(1, 16, 4, 6)
    assert torch.equal(
        comfy.sample.prepare_noise(latent, 7 + 2), pictures.noise((1, 16, 4, 6), 7, 2)
    )


@pytest.mark.parametrize("steps", [1, 4, 7, 8, 30])
def test_the_times_are_comfyui_s(dense_model, steps):
    import comfy.samplers

    sampling = dense_model.get_model_object("model_sampling")
    theirs = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    torch.testing.assert_close(pictures.schedule(steps, 1.15), theirs, atol=2e-6, rtol=0)
