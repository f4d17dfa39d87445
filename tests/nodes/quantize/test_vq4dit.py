"""VQ in ComfyUI: from a model to a file, measured, calibrated, interrupted; and bad input."""

import errno
import hashlib
import json
import os
import shutil

import comfy.memory_management
import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from codewords import LAYER
from nibble.nodes.bridge.quantize import job as quantizing
from nibble.nodes.bridge.quantize import record_inputs
from nibble.nodes.bridge.quantize import vq4dit as vq
from nibble.nodes.bridge.quantized import loading
from nibble.quant.calibration import pictures
from nibble.quant.files import checkpoint, writer
from nibble.quant.files.errors import FileRefused


def request(
    preset: str = "fast", bits: int = 3, changes: dict | None = None, **options
) -> vq.VQRequest:
    few = {"steps": 12, "codewords": 16, "vector": 2}
    quick = {"fast": {}, "vq4dit": few, "best": few | {"turns": 1}}[preset]
    recipe = vq.recipe_of(preset, bits, **(quick | (changes or {})))
    return vq.VQRequest(
        **(
            {"model_name": "flux.safetensors", "recipe": recipe, "latent": SMALL, "steps": 2}
            | options
        )
    )


SMALL = {"samples": torch.zeros(1, 16, 8, 8)}


@pytest.fixture
def unmeasured(monkeypatch):
    """No memory to run the 16-bit model: weights alone, which is quick."""
    monkeypatch.setattr(record_inputs, "fits_in_memory", lambda nbytes: False)


def prompts(count: int) -> list:
    draw = torch.Generator().manual_seed(1)
    return [
        [
            torch.randn(1, 6, 64, generator=draw),
            {"pooled_output": torch.randn(1, 64, generator=draw), "guidance": 3.5},
        ]
        for _ in range(count)
    ]


# ---- making a file


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_fast_is_measured_on_noise_where_the_model_fits_and_written_beside_its_source(
    folder, monkeypatch
):
    monkeypatch.setattr(pictures, "RANDOM_PIXELS", 64)
    name, report = request().run()
    assert name == "flux-vq3-fast.safetensors"
    assert report.notes == [quantizing.ON_NOISE]
    assert (
        checkpoint.open_quantized(folder / name).fact("calibration")["kind"]
        == "random conditioning"
    )
    assert not comfy.model_management.current_loaded_models
    began = report.rows
    assert [row.db for row in request().run()[1].rows] == [row.db for row in began]


@pytest.mark.parametrize("preset", ["vq4dit", "best"])
def test_calibration_runs_under_comfyui_s_inference_mode_and_leaves_the_model_untouched(
    folder, preset
):
    with torch.inference_mode():
        patcher = comfy.sd.load_diffusion_model(str(folder / "flux.safetensors"))
        before = {
            key: tensor.clone()
            for key, tensor in patcher.model.diffusion_model.state_dict().items()
        }
        name, report = request(preset, model=patcher, filename="mine", positive=prompts(2)).run()
    after = patcher.model.diffusion_model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before.keys() == after.keys()
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in patcher.model.modules()
    )
    assert any("block" in row.why and "→" in row.why for row in report.rows)
    assert checkpoint.open_quantized(folder / name).fact("calibration")["kind"] == "prompts"
    assert comfy.model_management.in_training is False


def test_zero_data_calibration_interrupted_goes_on_to_the_same_file(folder, monkeypatch):
    monkeypatch.setattr(vq, "TEACHER_PROMPTS", 2)
    name, _ = request("best", filename="whole").run()
    seen = []

    class Watched(vq.LiveBlocks):
        def __call__(self, error):
            seen.append(error)
            if len(seen) == first and error.number == 1:
                comfy.model_management.interrupt_current_processing(True)

    first = 6
    monkeypatch.setattr(vq, "LiveBlocks", Watched)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        request("best", filename="parts").run()
    assert not (folder / "parts.safetensors").exists()
    assert (folder / "parts.safetensors.partial").exists()
    assert len(seen) == first
    request("best", filename="parts").run()
    assert {error.number for error in seen[first:]} == {1, 2}, (
        "the finished block is not calibrated again"
    )
    assert digest(folder / "parts.safetensors") == digest(folder / name)


def test_a_calibrated_preset_without_memory_for_the_model_says_what_to_do(folder, unmeasured):
    with pytest.raises(ValueError, match="does not fit in memory.*'fast'"):
        request("best").run()
    assert [path.name for path in folder.iterdir()] == ["flux.safetensors"]


def test_under_a_budget_layers_get_different_bits_and_the_file_fits(folder, unmeasured):
    name, _ = request(changes=dict(budget_gb=0.00088)).run()
    file = checkpoint.open_quantized(folder / name)
    assert file.size <= 0.88e6
    assert len({(layer["codewords"], layer["vector"]) for layer in file.layers.values()}) > 1


# ---- bad input: clear words, nothing half-written


def test_k_that_is_no_multiple_of_the_vector_stays_in_16_bit_and_says_so(folder, unmeasured):
    _, report = request(changes=dict(codewords=64, vector=3)).run()
    whys = {row.name: row.why for row in report.rows}
    assert "K=128 is not a multiple of the sub-vector length 3" in whys[LAYER]


def test_nan_quantized_input_and_existing_files_are_refused_and_leave_nothing(
    folder, unmeasured, codeword_file, flux_file
):
    shutil.copy(codeword_file, folder / "codes.safetensors")
    state = load_file(flux_file)
    state[f"{LAYER}.weight"][3, 5] = float("nan")
    save_file(state, folder / "broken.safetensors")
    (folder / "taken.safetensors").write_bytes(codeword_file.read_bytes())
    folder_paths.filename_list_cache.pop(loading.FOLDER, None)
    before = sorted(folder.iterdir())
    for options, said in (
        ({"model_name": "broken.safetensors"}, "NaN"),
        ({"model_name": "codes.safetensors"}, "codes.safetensors"),
        ({"filename": "taken"}, "overwrite"),
        ({"filename": "../out"}, "leads out of the folder"),
    ):
        with pytest.raises(ValueError, match=said):
            request(**options).run()
    with torch.inference_mode(), pytest.raises(FileRefused, match="quantized by Nibble already"):
        request(model=loading.load(codeword_file)).run()
    assert sorted(folder.iterdir()) == before


def test_a_full_disk_is_told_before_the_work_starts(folder, unmeasured, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer.os, "posix_fallocate", full)
    with pytest.raises(FileRefused, match="full"):
        request().run()
    assert not list(folder.glob("*vq3*"))


def rewritten(path, target, change) -> None:
    """A copy of a file of codewords with its tensors changed; its checksums are left out."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if "checksum" not in key}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    change(tensors)
    save_file(tensors, target, metadata)


@pytest.mark.parametrize(
    "said, change",
    [
        (
            "weight_codebook",
            lambda t: t.update(
                {f"{LAYER}.weight_codebook": torch.zeros(48, 2, dtype=torch.float16)}
            ),
        ),
        (
            "weight_codebook",
            lambda t: t.update(
                {f"{LAYER}.weight_codebook": torch.zeros(64, 3, dtype=torch.float16)}
            ),
        ),
        (
            "weight_scale",
            lambda t: t.update({f"{LAYER}.weight_scale": torch.zeros(3, dtype=torch.float16)}),
        ),
        (
            "not uint8",
            lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"].view(torch.int8)}),
        ),
        (
            LAYER,
            lambda t: t.update(
                {
                    f"{LAYER}.comfy_quant": torch.tensor(
                        list(json.dumps({"format": "vq", "codewords": 100, "vector": 2}).encode()),
                        dtype=torch.uint8,
                    )
                }
            ),
        ),
    ],
    ids=["codewords", "vector", "scale", "dtype", "codes out of range"],
)
def test_a_damaged_file_of_codewords_is_refused_by_name(folder, codeword_file, said, change):
    from nibble.nodes import vq4dit as nodes

    rewritten(codeword_file, folder / "bad.safetensors", change)
    told = nodes.NibbleLoadVQ.validate_inputs("bad.safetensors")
    assert isinstance(told, str)
    assert "bad.safetensors" in told
    assert said in told


@pytest.mark.parametrize(
    "inputs, said",
    [
        (dict(codewords=100, vector=2), "power of two"),
        (dict(codewords=64), "go together"),
        (dict(codewords=64, vector=2, budget_gb=1.0), "budget_gb"),
    ],
)
def test_the_node_refuses_options_that_do_not_go_together(inputs, said):
    from nibble.nodes import vq4dit as nodes

    asked = dict(
        preset="fast",
        bits="3",
        codewords=0,
        vector=0,
        candidates=0,
        calibration_steps=0,
        keep_layers="",
        budget_gb=0.0,
        rotation=False,
        modulation="vq",
        seed=0,
    )
    with pytest.raises(ValueError, match=said):
        nodes.NibbleQuantizeVQ.execute(**(asked | inputs))
