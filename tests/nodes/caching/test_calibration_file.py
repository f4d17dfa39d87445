"""Calibrations in ComfyUI's folder: found by the model, passed over where they cannot be used,
written by one run at a time; and what is said of another schedule.
"""

import json

import comfy.model_management
import comfy.samplers
import folder_paths
import numpy as np
import pytest
import torch

from caching_runs import STEPS, conditioning
from nibble.accel.caching.extrapolate import Reuse
from nibble.nodes.bridge.caching import calibration_file
from nibble.nodes.bridge.caching.calibrate import CalibrationJob, calibrate
from nibble.nodes.bridge.caching.measure import Measurement, measure
from nibble.nodes.bridge.host import fingerprint
from nibble.nodes.bridge.host.progress import Progress
from nibble.quant.files import atomic
from nibble.quant.files.errors import FileRefused


def sigmas(model, steps: int = STEPS) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", steps
    )


@pytest.fixture
def setup(dense_model):
    return Measurement(
        model=dense_model,
        positive=conditioning(3),
        negative=None,
        cfg=1.0,
        sampler=comfy.samplers.sampler_object("euler"),
        sigmas=sigmas(dense_model),
        latent={"samples": torch.zeros(1, 16, 8, 8)},
        seed=5,
        model_name="random-flux",
    )


@pytest.fixture
def calibration(setup):
    return measure(setup, Progress("calibrating"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setitem(
        folder_paths.folder_names_and_paths, calibration_file.FOLDER, ([str(tmp_path)], {".json"})
    )
    return tmp_path


def test_a_calibration_holds_what_the_rules_need(calibration, dense_model):
    assert set(calibration.curves) == {
        "step",
        "double",
        "double.attn",
        "double.img_mlp",
        "double.txt_mlp",
        "single",
    }
    assert all(
        len(row) == STEPS - k
        for curve in calibration.curves.values()
        for k, row in enumerate(curve.mean, 1)
    )
    assert calibration.grams.shape == (1, STEPS, STEPS)
    assert np.allclose(calibration.grams, calibration.grams.transpose(0, 2, 1))
    assert calibration.feature == "modulated"
    assert calibration.polynomial.x_max > calibration.polynomial.x_min > 0
    assert len(calibration.teacache["points"]) == STEPS - 1
    assert calibration.run["sampler"] == "euler"
    assert calibration.run["latent"] == [1, 16, 8, 8]
    mask = calibration.mask(5, calibration.sigmas, Reuse(1))
    assert sum(mask) == 5
    assert mask[0]
    assert mask[-1]


def test_the_step_curve_is_the_velocitys_relative_change(calibration):
    """|v_1 - v_0|_2 from the inner products bounds the L1 curve within the ratio of the norms."""
    gram = calibration.grams[0]
    relative = np.sqrt(gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]) / np.sqrt(gram[1, 1])
    assert calibration.curves["step"].mean[0][0] == pytest.approx(relative, rel=0.5)


def test_saved_found_and_read_back(calibration, dense_model, model, folder):
    calibration.save(folder / "flux.json")
    assert calibration_file.calibration_files() == ["flux.json"]
    found = calibration_file.find(dense_model)
    assert found.curves == calibration.curves
    assert np.allclose(found.grams, calibration.grams, atol=1e-7)
    assert found.polynomial == calibration.polynomial
    assert calibration_file.open_calibration("flux.json").run == calibration.run
    assert calibration_file.find(model) is None  # the 4-bit form of the same model is another model
    with pytest.raises(FileRefused, match="not in ComfyUI's"):
        calibration_file.open_calibration("gone.json")


def test_a_bad_neighbour_is_passed_over_with_one_line(calibration, dense_model, folder, caplog):
    calibration.save(folder / "flux.json")
    bad = {
        "no-model.json": json.dumps({"format": "nibble-cache/1", "model": {}}),
        "list.json": json.dumps({"format": "nibble-cache/1", "model": []}),
        "deep.json": "[" * 100_000,
        "notes.json": "not json",
    }
    for name, content in bad.items():
        (folder / name).write_text(content)
    (folder / "nowhere.json").symlink_to(folder / "gone")
    (folder / "folder.json").mkdir()
    for _ in range(2):
        assert calibration_file.find(dense_model).name == "flux.json"
    lines = [record.getMessage() for record in caplog.records if "passed over" in record.message]
    assert sorted(line.split(": ")[1].split(" ")[0] for line in lines) == sorted(bad)


def test_a_file_that_another_run_is_writing_is_not_measured(dense_model, folder, setup):
    with (
        atomic.exclusive(folder / "flux.json"),
        pytest.raises(FileRefused, match="flux.json is being written by another run"),
    ):
        calibrate(CalibrationJob(setup, "flux"))
    assert calibrate(CalibrationJob(setup, "flux"))[0] == "flux.json"
    written = (folder / "flux.json").read_bytes()
    assert calibrate(CalibrationJob(setup, "flux", overwrite=True))[0] == "flux.json"
    assert (folder / "flux.json").read_bytes() == written, "equal runs are equal bytes"
    assert [path.name for path in folder.iterdir()] == ["flux.json"]


def test_a_fingerprint_survives_loras_and_tells_weights_apart(dense_model, model, flux_file):
    import comfy.sd

    again = comfy.sd.load_diffusion_model(str(flux_file))
    print_ = fingerprint.fingerprint(dense_model)
    assert fingerprint.fingerprint(again) == print_
    assert fingerprint.fingerprint(dense_model.clone()) == print_
    with torch.no_grad():
        # as an applied LoRA would
        again.model.diffusion_model.double_blocks[0].img_mlp[0].weight.add_(1.0)
    assert fingerprint.fingerprint(again) == print_
    assert fingerprint.fingerprint(model) != print_
    assert fingerprint.weights_of(dense_model) == fingerprint.PLAIN != fingerprint.weights_of(model)


@pytest.mark.parametrize("in_bits", [16, 4])
def test_a_lora_in_memory_is_no_part_of_a_models_identity(request, in_bits):
    """One on the biases and norms that the fingerprint reads, while it is on the weights."""
    loaded = request.getfixturevalue("dense_model" if in_bits == 16 else "model")
    before = fingerprint.fingerprint(loaded)
    patched = loaded.clone()
    vectors = {
        name: ("diff", (torch.ones(value.shape),))
        for name, value in loaded.model.named_parameters()
        if name.startswith("diffusion_model.") and value.ndim == 1
    }
    patched.add_patches(vectors, 1.0)
    comfy.model_management.load_models_gpu([patched], force_patch_weights=True)
    name = next(iter(vectors)).removeprefix("diffusion_model.")
    live = dict(loaded.model.diffusion_model.named_parameters())[name]
    kept = dict(fingerprint.unpatched(patched))[name]
    assert not torch.equal(live.float(), kept.float()), "the LoRA is on the weights"
    assert fingerprint.fingerprint(patched) == before
    assert fingerprint.fingerprint(loaded) == before
    assert fingerprint.patches_fingerprint(patched) != fingerprint.patches_fingerprint(loaded)
    comfy.model_management.unload_all_models()
    assert fingerprint.fingerprint(loaded) == before


def test_what_differs_from_the_measured_run_is_said(calibration, dense_model):
    assert not [
        note
        for note in calibration.fits(sigmas(dense_model).tolist(), "euler")
        if "measured with" in note
    ]
    assert "this run has 6" in calibration.fits(sigmas(dense_model, 6).tolist(), "euler")[0]
    assert (
        "scheduler" in calibration.fits((torch.linspace(1, 0, STEPS + 1) ** 2).tolist(), "euler")[0]
    )
    assert "uses heun" in calibration.fits(sigmas(dense_model).tolist(), "heun")[0]
    assert sum(calibration.mask(10, sigmas(dense_model, 20).tolist(), Reuse(1))) == pytest.approx(
        10, abs=1
    )


def test_a_schedule_too_short_is_refused(dense_model):
    with pytest.raises(ValueError, match="too few to calibrate"):
        measure(
            Measurement(
                model=dense_model,
                positive=conditioning(3),
                negative=None,
                cfg=1.0,
                sampler=comfy.samplers.sampler_object("euler"),
                sigmas=sigmas(dense_model, 4),
                latent={"samples": torch.zeros(1, 16, 8, 8)},
                seed=5,
            ),
            Progress("calibrating"),
        )
