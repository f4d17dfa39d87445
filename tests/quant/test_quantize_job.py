"""One quantization job: planned once, its target opened once, whoever asks for it."""

import importlib

import pytest
import torch
from safetensors.torch import save_file

from calls import planned_and_opened_once
from nibble.quant.calibration.statistics import InputStats
from nibble.quant.cli import methods
from nibble.quant.files.checkpoint import open_quantized
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.known_shapes import flux1_shapes
from nibble.quant.job.checkpoint_run import LayerQuantizer
from nibble.quant.job.measurement import Measurement
from nibble.quant.svdquant import recipe as svdquant
from nibble.quant.vq4dit import recipe as vq

RECIPES = {
    "svdquant": svdquant.Recipe.from_preset("fast", rank=16, smoothing_grid=1, iterations=1),
    "vq": vq.Recipe.from_preset("fast", codewords=16, vector=4, turns=0),
}
OTHER_RECIPES = {
    "svdquant": svdquant.Recipe.from_preset("fast", rank=16, smoothing_grid=1, iterations=2),
    "vq": vq.Recipe.from_preset("fast", codewords=4, vector=4, turns=0),
}
COMMANDS = {
    "svdquant": ["--rank", "16", "--solver", "svd", "--rotation", "off"],
    "vq": ["--method", "vq", "--codewords", "16", "--vector", "4"],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    draw = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "m.safetensors"
    shapes = flux1_shapes(1, 1, 128, 64, 64)
    save_file(
        {
            name: (torch.randn(shape, generator=draw) * 0.05).bfloat16()
            for name, shape in shapes.items()
        },
        path,
    )
    return path


@pytest.mark.parametrize("method", RECIPES)
def test_a_job_plans_once_and_opens_its_target_once(source, tmp_path, method):
    target = tmp_path / "q.safetensors"
    for recipe, works in ((RECIPES, True), (RECIPES, False), (OTHER_RECIPES, True)):
        with planned_and_opened_once(target, LayerQuantizer.run) as calls:
            job = methods.prepare(source, target, recipe[method])
            job.write(Measurement({"kind": "weights only"}))
        assert bool(calls["run"]) == works
        assert open_quantized(target).fact("recipe")["preset"] == "fast"


@pytest.mark.parametrize("method", RECIPES)
def test_the_command_plans_once_and_opens_its_target_once(source, tmp_path, method):
    main = importlib.import_module("nibble.__main__").main
    target = tmp_path / "q.safetensors"
    command = ["quantize", str(source), str(target), "--memory-cap", "0", *COMMANDS[method]]
    for options in ([], [], ["--seed", "1", "--overwrite"]):
        with planned_and_opened_once(target):
            assert main([*command, *options]) == 0
    assert open_quantized(target).fact("recipe")["seed"] == 1


@pytest.mark.parametrize("method", RECIPES)
def test_a_target_is_the_same_result_only_with_the_same_measurement(source, tmp_path, method):
    target, measured = tmp_path / "q.safetensors", Measurement({"kind": "prompts", "prompts": 3})
    methods.prepare(source, target, RECIPES[method]).write(measured)
    job = methods.prepare(source, target, RECIPES[method])
    assert job.existing_report(measured.provenance).rows == job.existing_report().rows != []
    assert job.existing_report({"kind": "prompts", "prompts": 4}) is None
    assert methods.prepare(source, target, OTHER_RECIPES[method]).existing is None
    copied = tmp_path / "other-name.safetensors"
    copied.write_bytes(source.read_bytes())
    assert methods.prepare(copied, target, RECIPES[method]).existing is None


def test_another_program_s_file_is_refused_before_anything_is_measured(source, tmp_path):
    target = tmp_path / "q.safetensors"
    save_file({"x": torch.zeros(1)}, target)
    with pytest.raises(FileRefused, match="was not made by Nibble"):
        methods.prepare(source, target, RECIPES["svdquant"])


def overflowed(source, name, value):
    """A source in which one weight holds a value, and what a model measured with it reads."""
    from safetensors.torch import load_file

    state = load_file(source)
    state[name].view(-1)[3] = value
    stats = InputStats.empty(128, samples=8)
    stats.update(torch.full((2, 128), float("nan")))
    return state, Measurement({"kind": "prompts"}, lambda layer: stats)


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize(
    "value, words",
    [
        (float("nan"), "broken.safetensors holds NaN or infinity in single_blocks.0.linear2"),
        (1.0, "broken.safetensors overflowed while it was measured: double_blocks.0"),
    ],
)
def test_inputs_that_are_not_finite_are_told_with_the_tensor_that_is_the_cause(
    source, tmp_path, method, value, words
):
    state, measurement = overflowed(source, "single_blocks.0.linear2.weight", value)
    path, target = tmp_path / "broken.safetensors", tmp_path / "q.safetensors"
    save_file(state, path)
    job = methods.prepare(path, target, RECIPES[method])
    with pytest.raises(FileRefused, match=words):
        job.write(measurement)
    assert [file.name for file in tmp_path.iterdir()] == ["broken.safetensors"]
