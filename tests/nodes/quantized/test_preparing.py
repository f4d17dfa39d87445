"""GPU kernels are made ready when a model is loaded, with a line under its node. What is compiled,
and when, is tested in tests/kernels/test_preparation.py.
"""

import pytest
import torch

from nibble import kernels
from nibble.kernels.preparation import Layer
from nibble.nodes.bridge.host import progress
from nibble.nodes.bridge.quantized import loading, preparing

FLOATS = frozenset({torch.bfloat16})


def test_the_layers_of_a_model_are_told_once(quantized_file):
    model = loading.load(quantized_file, activations="4 bit").model.diffusion_model
    layers = preparing.layers_of(model, torch.bfloat16)
    assert len(layers) == len(set(layers))
    assert Layer("linear_w4a4", (384, 128), FLOATS, 16) in layers  # qkv
    assert Layer("mlp_w4a4", (512, 128), FLOATS, 16) in layers
    assert Layer("linear_w4a4", (128, 512), FLOATS, 16, act_unsigned=True) in layers
    assert {layer.op for layer in layers} == {"linear_w4a4", "mlp_w4a4", "linear_w4a16"}


def test_codewords_are_told_by_their_layout(codeword_file):
    model = loading.load(codeword_file).model.diffusion_model
    layers = preparing.layers_of(model, torch.float16)
    assert {(layer.bits, layer.vector) for layer in layers if layer.op == "linear_vq"} == {(6, 2)}


def test_weights_that_are_read_as_int8_are_told_by_their_16_bit_parameters(table_file):
    """Their scales are whole numbers, and float32 for a row."""
    model = loading.load(table_file).model.diffusion_model
    layers = preparing.layers_of(model, torch.bfloat16)
    assert Layer("linear_w4a8", (384, 128), FLOATS, 16, rotated=True) in layers  # qkv
    assert {layer.op for layer in layers} == {"linear_w4a8", "linear_w4a16"}


def test_loading_prepares_and_says_so_in_the_node(quantized_file, monkeypatch):
    lines, asked = [], []

    class Server:
        client_id = "client"

        def send_sync(self, event, told, client):
            lines.append((event, told["node"], told["title"], told["count"]))

    def prepare(device, dtype, layers, said):
        asked.append((device, dtype))
        for done in range(3):
            said(done, 2, "gemm_w4a4<...>")
        return 2

    monkeypatch.setattr(kernels, "prepare", prepare)
    monkeypatch.setattr(progress, "PromptServer", type("P", (), {"instance": Server()}))
    monkeypatch.setattr(progress, "running_node", lambda: "7")
    patcher = loading.load(quantized_file)
    assert asked == [(patcher.load_device, patcher.model.get_dtype_inference())]
    assert (progress.PROGRESS_EVENT, "7", "preparing GPU kernels, once", 2) in lines


def test_a_kernel_that_does_not_compile_does_not_stop_the_loading(
    quantized_file, monkeypatch, caplog
):
    def prepare(*given):
        raise kernels.CompileError("gemm_w4a4 does not compile")

    monkeypatch.setattr(kernels, "prepare", prepare)
    assert loading.load(quantized_file) is not None
    assert "gemm_w4a4 does not compile" in caplog.text


def test_the_running_node_is_comfyui_s():
    utils = pytest.importorskip("comfy_execution.utils")
    assert progress.running_node() is None
    with utils.CurrentNodeContext("prompt", "12"):
        assert progress.Progress("reading").node_id == "12"
        assert progress.Progress("reading", "3").node_id == "3"
