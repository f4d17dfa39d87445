"""Calibrations as files: written whole, read back, found by the model, refused with a reason; and
what is said of another schedule.
"""

import json

import comfy.samplers
import folder_paths
import numpy as np
import pytest
import torch

from caching_runs import STEPS, conditioning
from nibble.accel.caching.extrapolate import Reuse
from nibble.nodes.bridge.caching import calibration_file
from nibble.nodes.bridge.caching.measure import Measurement, measure
from nibble.nodes.bridge.host import fingerprint
from nibble.nodes.bridge.host.progress import Progress
from nibble.quant.files.errors import FileRefused


def sigmas(model, steps: int = STEPS) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "simple", steps
    )


@pytest.fixture
def calibration(dense_model):
    return measure(
        Measurement(
            model=dense_model,
            positive=conditioning(3),
            negative=None,
            cfg=1.0,
            sampler=comfy.samplers.sampler_object("euler"),
            sigmas=sigmas(dense_model),
            latent={"samples": torch.zeros(1, 16, 8, 8)},
            seed=5,
            model_name="random-flux",
        ),
        Progress("calibrating"),
    )


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
    path = calibration_file.save_calibration(calibration, "flux")
    assert path.name == "flux_00001.json"
    assert calibration_file.save_calibration(calibration, "flux").name == "flux_00002.json"
    assert calibration_file.calibration_files()[0] == "flux_00002.json"
    found = calibration_file.find(dense_model)
    assert found.curves == calibration.curves
    assert np.allclose(found.grams, calibration.grams, atol=1e-7)
    assert found.polynomial == calibration.polynomial
    assert calibration_file.open_calibration("flux_00001.json").run == calibration.run
    assert calibration_file.find(model) is None  # the 4-bit form of the same model is another model
    with pytest.raises(FileRefused, match="not in ComfyUI's"):
        calibration_file.open_calibration("gone.json")
    with pytest.raises(ValueError, match="name of a file"):
        calibration_file.save_calibration(calibration, "../flux")


def broken(change, facts):
    facts = json.loads(json.dumps(facts))
    change(facts)
    return facts


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda f: f.update(format="nibble-cache/2"), "newer Nibble"),
        (lambda f: f.update(format="smoothcache/1"), "not nibble-cache"),
        (lambda f: f.pop("format"), "is not a calibration"),
        (lambda f: f.pop("grams"), "damaged"),
        (lambda f: f["smoothcache"]["single"]["mean"][0].pop(), "damaged"),
        (lambda f: f.update(grams=[[[1.0]]]), "damaged"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(calibration, tmp_path, change, reason):
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(broken(change, json.loads(calibration.to_json()))))
    with pytest.raises(FileRefused, match=reason):
        calibration_file.load(path)


def test_text_that_is_not_json_is_refused_and_passed_over(dense_model, folder):
    (folder / "notes.json").write_text("not json")
    with pytest.raises(FileRefused, match="notes.json is not a calibration"):
        calibration_file.load(folder / "notes.json")
    assert calibration_file.find(dense_model) is None


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


def test_what_differs_from_the_measured_run_is_said(calibration, dense_model):
    assert not [
        note for note in calibration.fits(sigmas(dense_model), "euler") if "measured with" in note
    ]
    assert "this run has 6" in calibration.fits(sigmas(dense_model, 6), "euler")[0]
    assert "scheduler" in calibration.fits(torch.linspace(1, 0, STEPS + 1) ** 2, "euler")[0]
    assert "uses heun" in calibration.fits(sigmas(dense_model), "heun")[0]
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
