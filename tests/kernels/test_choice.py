"""Which code runs an op and why, what is said where none is compiled, and two copies of the package
in one process.
"""

import importlib.util
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from cases import SMALL, make_input, make_w4a4
from nibble.kernels import ops, which
from nibble.kernels.backends import choose, kitchen, native, triton
from nibble.kernels.ops import register, w4a4, w4a16
from stand_in import install_nothing

ROOT = Path(__file__).resolve().parents[2]
PLAIN = SMALL[0]


# ---- which code runs -----------------------------------------------------------------------------


@pytest.fixture
def forget():
    """Clears what is remembered about installed modules, before and after."""
    caches = (choose.choose, choose._say, native.module, native.serving, native._gpu)
    caches += (triton.module, triton.serving, triton.gpu)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_missing_extension_is_logged_once_with_what_to_install(forget, caplog, monkeypatch):
    install_nothing(monkeypatch)
    with caplog.at_level(logging.INFO, "nibble"):
        for _ in range(3):
            backend, reason = which("linear_w4a4", "cpu")
    assert backend == "reference" and "nibble_kernels" in reason and "cpu" in reason
    assert len(caplog.records) == 1 and "pip install ./kernels" in caplog.text


def test_an_extension_of_another_interface_is_not_used(forget, monkeypatch):
    monkeypatch.setitem(sys.modules, native.MODULE, types.SimpleNamespace(ABI=native.ABI + 1))
    monkeypatch.setenv("NIBBLE_LIBRARY", "0")
    backend, reason = which("gemv_w4a16", "cpu")
    assert backend == "reference" and f"has interface {native.ABI + 1}" in reason


def test_which_refuses_an_unknown_op():
    with pytest.raises(ValueError, match="unknown op 'gemm'"):
        which("gemm", "cpu")


@pytest.mark.parametrize(
    ("op", "capability", "state", "use", "words"),
    [
        ("linear_w4a4", (8, 6), {}, True, "native on compute capability 8.6"),
        ("linear_w4a4", (9, 0), {}, False, "emulated on compute capability 9.0"),
        ("linear_w4a4", (12, 0), {}, False, "emulated"),
        ("gemv_w4a16", (12, 0), {}, True, "native"),
        ("linear_w4a4", (7, 5), {}, False, "needs compute capability 8.0"),
        ("linear_w4a4", (8, 6), {"disabled": True}, False, "disabled by the host"),
        (
            "linear_w4a4",
            (8, 6),
            {"available": False, "unavailable_reason": "no driver"},
            False,
            "no driver",
        ),
        (
            "linear_w4a4",
            (8, 6),
            {"capabilities": []},
            False,
            "has no quantize_svdquant_w4a4 and scaled_mm_svdquant_w4a4",
        ),
    ],
)
def test_comfy_kitchen_is_chosen_by_gpu_and_with_a_reason(op, capability, state, use, words):
    everything = [function for functions in kitchen._OPS.values() for function in functions]
    cuda = {
        "available": True,
        "disabled": False,
        "unavailable_reason": None,
        "capabilities": everything,
    } | state
    module = types.SimpleNamespace(list_backends=lambda: {"cuda": cuda})
    chosen, reason = kitchen._decide_for_nvidia(module, op, capability)
    assert chosen == use and words in reason


# ---- a second copy of the package ----------------------------------------------------------------


def test_a_second_copy_of_the_package_uses_the_ops_of_the_first(monkeypatch):
    room = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "nibble_again", room / "__init__.py", submodule_search_locations=[str(room)]
    )
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "nibble_again", again)
    spec.loader.exec_module(again)
    second = sys.modules["nibble_again.ops.w4a4"]
    assert second is not w4a4 and second.linear_w4a4_op is w4a4.linear_w4a4_op
    x, parameters = make_input(PLAIN).requires_grad_(), make_w4a4(PLAIN)
    assert torch.equal(again.linear_w4a4(x, **parameters), ops.linear_w4a4(x, **parameters))
    again.linear_w4a4(x, **parameters).sum().backward()
    for name in [name for name in sys.modules if name.startswith("nibble_again.")]:
        monkeypatch.delitem(sys.modules, name)


def test_a_second_copy_with_other_schemas_refuses_to_load():
    with pytest.raises(ImportError, match="keep only one of the two installations"):
        register.register("gemv_w4a16", "(Tensor x) -> Tensor", w4a16.gemv_w4a16, w4a16.gemv_w4a16)
