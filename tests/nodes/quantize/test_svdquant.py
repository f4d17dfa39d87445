"""From a file or a MODEL socket to a 4-bit file: what is measured, what is read, where it is
written.
"""

import os
import shutil
import time

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file

from calls import planned_and_opened_once
from nibble.nodes.bridge.host import charts
from nibble.nodes.bridge.host.progress import Progress
from nibble.nodes.bridge.quantize import patched_weights, record_inputs, sources, vq4dit
from nibble.nodes.bridge.quantize.svdquant import SVDQuantRequest
from nibble.nodes.bridge.quantized import loading
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.files import checkpoint, safetensors
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.source import Source, StateDictSource
from nibble.quant.job.checkpoint_run import LayerQuantizer
from nibble.quant.svdquant.recipe import Recipe

QUICK = dict(rank=16, solver="svd", rotation="off")
LAYERS = [
    "double_blocks.0.img_attn.qkv",
    "single_blocks.1.linear2",
    "single_blocks.1.modulation.lin",
]


@pytest.fixture
def folder(tmp_path, monkeypatch, flux_file):
    """ComfyUI's diffusion_models folder, with the 16-bit model in it; quick: without random
    conditioning, models are not measured.
    """
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: False)
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, loading.FOLDER, ([str(tmp_path)], {".safetensors"})
    )
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    shutil.copy(flux_file, tmp_path / "flux.safetensors")
    yield tmp_path
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)


def request(**changes) -> SVDQuantRequest:
    return SVDQuantRequest(
        **(
            {"model_name": "flux.safetensors", "recipe": Recipe.from_preset("fast", **QUICK)}
            | changes
        )
    )


def prompts(count: int) -> list:
    draw = torch.Generator().manual_seed(1)

    def entry():
        return [
            torch.randn(1, 6, 64, generator=draw),
            {"pooled_output": torch.randn(1, 64, generator=draw), "guidance": 3.5},
        ]

    return [entry() for _ in range(count)]


def recording(patcher, count: int = 2) -> record_inputs.Recording:
    latent = {"samples": torch.zeros(1, 16, 8, 8)}
    pictures = record_inputs.pictures_of(patcher, prompts(count), latent, 2, 0)
    return record_inputs.Recording(patcher, pictures)


# ---- measuring


def test_every_named_layer_is_measured_on_all_but_the_held_out_pictures(dense_model):
    stats = record_inputs.record(recording(dense_model), LAYERS, 1 << 30, Progress("measuring"))
    assert {name: found.count for name, found in stats.items()} == {
        LAYERS[0]: 12 * 2 * 16,
        LAYERS[1]: 12 * 2 * 22,
        LAYERS[2]: 12 * 2,
    }
    assert {found.pictures for found in stats.values()} == {16}
    assert all(found.mean_square.min() > 0 for found in stats.values())


def test_several_passes_under_a_small_cap_give_the_same_statistics(dense_model):
    whole = record_inputs.record(recording(dense_model), LAYERS, 1 << 30, Progress("measuring"))
    parts = record_inputs.record(
        recording(dense_model), LAYERS, InputStats.bytes_needed(640), Progress("measuring")
    )
    for name in LAYERS:
        assert torch.equal(whole[name].hessian, parts[name].hessian)
        assert torch.equal(whole[name].samples, parts[name].samples)


def test_random_conditioning_has_the_model_s_own_widths(dense_model):
    pictures = record_inputs.random_pictures(dense_model, seed=0)
    tokens, extras = pictures.prompts[0][0]
    assert tokens.shape[-1] == 64
    assert extras["pooled_output"].shape[-1] == 64
    assert pictures.latent.shape == (1, 16, 32, 32)
    assert not torch.equal(tokens, pictures.prompts[1][0][0])
    again, other = (
        record_inputs.random_pictures(dense_model, seed=seed).provenance() for seed in (0, 1)
    )
    assert pictures.provenance() == again != other


def test_a_model_whose_text_input_is_unknown_gets_a_reason(dense_model):
    del dense_model.model.diffusion_model.txt_in
    refusal = record_inputs.random_pictures(dense_model, seed=0)
    assert "does not know how" in refusal.reason
    assert refusal.note == f"{refusal.reason}, so the weights alone were used"


def test_measuring_stops_when_the_user_presses_stop(dense_model):
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        record_inputs.record(recording(dense_model), LAYERS, 1 << 30, Progress("measuring"))
    assert not any(module._forward_pre_hooks for module in dense_model.model.modules()), (
        "no hook is left behind"
    )


# ---- reading a MODEL


def test_a_connected_model_s_weights_are_the_file_s(dense_model, flux_file):
    live, file = StateDictSource(patched_weights.PatchedWeights(dense_model)), Source(flux_file)
    assert (
        live.shapes.items()
        >= {name: shape for name, shape in file.shapes.items() if "norm" not in name}.items()
    )
    for name in LAYERS:
        assert torch.equal(live.weight(name), file.weight(name))
        assert torch.equal(live.bias(name), file.bias(name))


@pytest.mark.parametrize("loaded", [False, True])
def test_patches_are_read_in_float32_whether_or_not_they_are_merged_now(
    dense_model, flux_file, loaded
):
    patched, delta = dense_model.clone(), torch.full((384, 128), 1e-4)
    patched.add_patches({f"diffusion_model.{LAYERS[0]}.weight": ("diff", (delta,))}, 0.5)
    if loaded:
        comfy.model_management.load_models_gpu([patched])
    live = StateDictSource(patched_weights.PatchedWeights(patched))
    expected = load_file(flux_file)[f"{LAYERS[0]}.weight"].float() + 0.5 * delta
    assert torch.allclose(live.weight(LAYERS[0]), expected, atol=1e-8)
    assert (
        live.fingerprint != StateDictSource(patched_weights.PatchedWeights(dense_model)).fingerprint
    )


def test_a_connected_4_bit_model_is_refused(model):
    with pytest.raises(FileRefused, match="quantized by Nibble already"):
        patched_weights.PatchedWeights(model)


# ---- the whole job


def test_the_file_is_written_beside_its_source_and_listed_by_the_loader(folder):
    name, _ = request().run()
    assert name == "flux-svdq-int4-r16.safetensors"
    assert (folder / name).exists()
    assert loading.quantized_files() == [name]
    assert sources.listed() == ["flux.safetensors"]


def test_fast_measures_a_model_that_fits_on_random_conditioning(folder, monkeypatch):
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: True)
    name, report = request().run()
    assert report.notes == ["inputs were measured on noise and random conditioning"]
    assert (
        checkpoint.open_quantized(folder / name).fact("calibration")["kind"]
        == "random conditioning"
    )


def test_a_model_too_large_to_run_is_quantized_from_its_weights_and_says_so(folder):
    name, report = request().run()
    assert "weights alone" in report.notes[0]
    assert checkpoint.open_quantized(folder / name).fact("calibration") == {"kind": "weights only"}


def test_a_second_run_does_not_even_load_the_model(folder, monkeypatch):
    _, first = request().run()
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", lambda *_: pytest.fail("loaded"))
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: True)
    _, second = request().run()
    assert [row.db for row in second.rows] == [row.db for row in first.rows]


@pytest.mark.parametrize("method", ["svdquant", "vq"])
def test_a_request_plans_once_and_opens_its_target_once(folder, method):
    if method == "vq":
        recipes = [
            vq4dit.recipe_of("fast", 3, codewords=16, vector=4, seed=seed) for seed in (0, 1)
        ]
        kind = vq4dit.VQRequest
    else:
        recipes = [Recipe.from_preset("fast", **QUICK, seed=seed) for seed in (0, 1)]
        kind = SVDQuantRequest
    for recipe, works in ((recipes[0], True), (recipes[0], False), (recipes[1], True)):
        asked = kind(model_name="flux.safetensors", recipe=recipe, filename="mine", overwrite=True)
        with planned_and_opened_once(folder / "mine.safetensors", LayerQuantizer.run) as calls:
            asked.run()
        assert bool(calls["run"]) == works


def test_best_measures_the_prompts_and_a_second_run_measures_nothing(folder, monkeypatch):
    best, latent = (
        Recipe.from_preset("best", **QUICK, smoothing_grid=2),
        {"samples": torch.zeros(1, 16, 8, 8)},
    )
    task = request(recipe=best, positive=prompts(2), latent=latent, steps=2)
    _, first = task.run()
    made = [row for row in first.rows if row.action == "w4a4"]
    assert all("GPTQ" in row.why or "data-free" in row.why for row in made)
    assert {row.on for row in made} == {"pictures"}
    monkeypatch.setattr(record_inputs, "record", lambda *_: pytest.fail("measured again"))
    _, second = task.run()
    assert [row.db for row in second.rows] == [row.db for row in first.rows]


def test_best_without_prompts_says_what_to_connect(folder):
    with pytest.raises(ValueError, match="Connect .* to 'positive'"):
        request(recipe=Recipe.from_preset("best", **QUICK)).run()


def test_an_existing_file_of_other_options_needs_overwrite(folder):
    name, _ = request(filename="mine").run()
    old = (folder / name).read_bytes()
    other = Recipe.from_preset("fast", **QUICK, seed=1)
    with pytest.raises(FileRefused, match="overwrite"):
        request(filename="mine", recipe=other).run()
    assert (folder / name).read_bytes() == old
    request(filename="mine", recipe=other, overwrite=True).run()
    assert (folder / name).read_bytes() != old


@pytest.mark.parametrize("name", ["../escape", "/etc/escape", "sub/../../escape"])
def test_a_target_outside_the_folder_is_refused(folder, name):
    with pytest.raises(FileRefused, match="cannot be a file's name"):
        request(filename=name).run()


def test_a_read_only_home_sends_the_file_to_the_next_folder(folder, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("other")
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths,
        loading.FOLDER,
        ([str(folder), str(other)], {".safetensors"}),
    )
    access = os.access
    monkeypatch.setattr(
        os,
        "access",
        lambda path, mode: (
            folder not in (path, *getattr(path, "parents", ())) and access(path, mode)
        ),
    )
    name, _ = request().run()
    assert (other / name).exists()


def test_memory_is_given_back(folder):
    request().run()
    assert not comfy.model_management.current_loaded_models


# ---- listing and showing


def test_listing_a_folder_of_hundreds_reads_each_header_once(folder, monkeypatch, quantized_file):
    for i in range(200):
        (
            os.link(quantized_file, folder / f"model-{i}.safetensors")
            if i % 2
            else (folder / f"other-{i}.safetensors").write_bytes(b"x" * 100)
        )
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    assert len(loading.quantized_files()) == 100
    monkeypatch.setattr(safetensors, "_open", lambda path: pytest.fail("read again"))
    began = time.monotonic()
    assert len(loading.quantized_files()) == 100
    assert time.monotonic() - began < 0.5


def test_the_charts_have_the_agreed_shape(folder):
    name, report = request().run()
    chart = charts.layers_chart(report, name, "subtitle")
    assert chart.keys() == {
        "kind",
        "title",
        "subtitle",
        "summary",
        "bytes_before",
        "bytes_after",
        "rows",
    }
    assert all(
        row.keys()
        == {"name", "action", "why", "db", "bytes_before", "bytes_after", "seconds", "on"}
        for row in chart["rows"]
    )
    model = loading.load(folder / name)
    facts = charts.model_chart(
        checkpoint.open_quantized(folder / name), loading.vram_needed(model), model.load_device
    )
    assert facts["kind"] == "facts"
    assert all(len(pair) == 2 for pair in facts["summary"])
    assert loading.vram_needed(model)[0] == model.model_size()
    assert loading.vram_needed(model)[1] > 1e6


def test_the_node_runs_again_where_its_source_is_another_file(folder):
    from nibble.nodes.svdquant import NibbleQuantizeSVDQuant as node

    asked = {"model_name": "flux.safetensors", "filename": "", "rank": 16, "preset": "fast"}
    before = node.fingerprint_inputs(**asked)
    request().run()
    assert node.fingerprint_inputs(**asked) == before
    os.utime(folder / "flux.safetensors", (0, 0))
    assert node.fingerprint_inputs(**asked) != before
