"""How many bits the activations of a loaded model get: the choice, the device's word, the file's,
and what stays as it was.
"""

import comfy.model_management
import pytest
import torch

from flux_loras import assert_changed_by, changes, lora_file, outputs, with_lora
from flux_runs import decibels, loaded, run
from nibble import kernels
from nibble.kernels import ActBits
from nibble.kernels.backends import choose
from nibble.nodes.bridge.quantized import activations, layouts, loading, mlp
from nibble.quant.weights.base import tensor_json
from random_flux import quantize


@pytest.fixture(scope="module")
def wide_file(flux_file):
    """The FLUX fitted for activations of 8 bits."""
    return quantize(flux_file, "wide.safetensors", act_bits=8)


def widths(patcher) -> set[int]:
    modules = patcher.model.diffusion_model.modules()
    weights = [module._parameters.get("weight") for module in modules]
    return {w.params.act_bits for w in weights if layouts.format_of(w) == "svdquant_w4a4"}


@pytest.fixture
def free_8(monkeypatch):
    """A device that loses nothing by 8 bits."""
    monkeypatch.setattr(kernels, "act_bits", lambda *asked: ActBits(8, "stand-in"))


@pytest.mark.parametrize(
    ("choice", "free", "narrow", "wide"),
    [("auto", 4, 4, 4), ("auto", 8, 8, 8), ("4 bit", 8, 4, 4), ("8 bit", 4, 8, 8)],
)
def test_the_choice(choice, free, narrow, wide, quantized_file, wide_file, monkeypatch):
    monkeypatch.setattr(kernels, "act_bits", lambda *asked: ActBits(free, "stand-in"))
    for path, bits in ((quantized_file, narrow), (wide_file, wide)):
        assert widths(loading.load(path, activations=choice)) == {bits}


@pytest.mark.parametrize(("backend", "expected"), [("cuda", {4, 8}), ("reference", {4})])
def test_a_file_of_both_widths_runs_as_it_was_fitted(backend, expected, flux_file, monkeypatch):
    path = quantize(flux_file, "both.safetensors", wide_share=0.5)
    monkeypatch.setattr(kernels, "act_bits", lambda *asked: ActBits(4, "stand-in"))
    monkeypatch.setattr(kernels, "which", lambda *asked, **more: (backend, "stand-in"))
    model = loading.load(path)
    assert widths(model) == expected
    assert widths(loading.load(path, activations="4 bit")) == {4}


def test_in_plain_torch_alone_the_file_decides(quantized_file, wide_file, monkeypatch):
    def plain(*asked):
        return choose.Choice("reference", "stand-in", None)

    monkeypatch.setattr("nibble.kernels.activations.choose", plain)
    assert widths(loading.load(quantized_file)) == {4}
    assert widths(loading.load(wide_file)) == {8}


@pytest.mark.parametrize("file", ["quantized_file", "rotated_file"])
def test_8_bits_are_closer_to_16(file, dense_model, request):
    path, exact = request.getfixturevalue(file), run(loaded(dense_model))
    four, eight = (
        decibels(exact, run(loaded(loading.load(path, activations=f"{bits} bit"))))
        for bits in (4, 8)
    )
    assert eight > four + 1


def test_a_file_fitted_for_8_bits_is_best_with_them(dense_model, wide_file, quantized_file):
    exact = run(loaded(dense_model))
    own = decibels(exact, run(loaded(loading.load(wide_file, activations="8 bit"))))
    other = decibels(exact, run(loaded(loading.load(quantized_file, activations="8 bit"))))
    assert own > other - 0.5


def test_a_lora_on_top_changes_its_layers_as_it_should(quantized_file):
    model = loaded(loading.load(quantized_file, activations="8 bit"))
    before, tensors = outputs(model), lora_file(model)
    loaded(with_lora(model, tensors))
    assert_changed_by(before, outputs(model), changes(tensors, 0.8), 0.02)


def test_an_mlp_runs_as_one_op_with_its_width(quantized_file, monkeypatch):
    plain = run(loaded(loading.load(quantized_file, activations="8 bit")))
    asked = []

    def noted(*arguments):
        asked.append(arguments[-2:])
        return fused(*arguments)

    fused = kernels.mlp_w4a4
    monkeypatch.setattr(kernels, "mlp_w4a4", noted)
    monkeypatch.setattr(kernels, "fuses_mlp", lambda *kinds: True)
    monkeypatch.setattr(mlp, "gains", lambda device: True)
    y = run(loaded(loading.load(quantized_file, activations="8 bit")))
    assert set(asked) == {(8, 8)}
    assert decibels(plain, y) > 25


def test_what_is_saved_is_what_the_file_said(quantized_file, wide_file):
    for path, said in ((quantized_file, {}), (wide_file, {"act_bits": 8})):
        for choice in activations.CHOICES:
            network = loading.load(path, activations=choice).model.diffusion_model
            linear = network.double_blocks[0].img_attn.qkv
            stored = tensor_json(linear.state_dict()["comfy_quant"])
            assert {k: v for k, v in stored.items() if k == "act_bits"} == said


def test_the_node_tells_what_it_chose_and_why(quantized_file, wide_file, free_8):
    label, words = activations.shown(loading.load(quantized_file), "auto")
    assert label == "activations"
    assert words.startswith("8 bit (") and "fitted for 4 bit; stand-in" in words
    assert "8 bit computed by" in words and "4 bit faster on RTX 20 to 40" in words
    words = activations.shown(loading.load(wide_file, activations="4 bit"), "4 bit")[1]
    assert words.startswith("4 bit (") and "fitted for 8 bit" in words


def test_a_model_without_such_layers_loads(codeword_file):
    assert widths(loading.load(codeword_file)) == set()


def test_the_model_is_loaded_again_with_the_same_choice(quantized_file):
    patcher = loading.load(quantized_file, activations="8 bit")
    factory, arguments = patcher.cached_patcher_init
    assert widths(factory(*arguments, disable_dynamic=True)) == {8}
    assert widths(patcher.clone()) == {8}
    comfy.model_management.unload_all_models()
    assert torch.isfinite(run(loaded(patcher))).all()
