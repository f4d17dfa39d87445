"""`python -m nibble bench --env`: facts and a row for every op, whatever is installed."""

import json

import pytest
import torch

from nibble.__main__ import main
from nibble.kernels import environment, ops
from nibble.kernels.backends import choose, native


def test_every_op_has_a_row_for_each_dtype():
    found = environment.describe((1, 64, 64))
    rows = {(row["op"], row["device"], row["dtype"]) for row in found["ops"]}
    assert {
        (op, "cpu", dtype) for op in ops.SCHEMAS for dtype in ("bfloat16", "float16", "float32")
    } <= rows
    assert all(row["backend"] in choose.NAMES and row["reason"] for row in found["ops"])
    assert {"python", "torch", "CPU", "compiled", "Triton", "comfy_kitchen"} <= found[
        "facts"
    ].keys()
    assert torch.__version__ in environment.table(found)


def test_the_command_prints_and_writes(tmp_path, capsys):
    assert (
        main(["bench", "--env", "--json", str(tmp_path / "env.json"), "--shape", "4", "128", "64"])
        == 0
    )
    assert json.loads((tmp_path / "env.json").read_text())["shape"] == {"M": 4, "N": 128, "K": 64}
    printed = capsys.readouterr().out
    assert "M=4, N=128, K=64" in printed and "linear_w4a4_grouped" in printed


def test_a_wrong_option_is_wrong_usage(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "--env", "--shape", "4"])
    assert "--shape" in capsys.readouterr().err


class Kernels:
    """A stand-in for what serves a GPU: its one line, and the extension without CUDA."""

    DEVICES, kind, name = ("cpu",), "extension", "nibble_kernels"

    def on(self, index):
        return self

    way = "89, compiled here by NVRTC 12.9; the package carries no cubins"


KERNELS = Kernels()


@pytest.mark.parametrize(
    ("served", "extension", "words"),
    [
        (None, None, "no compiled kernels: cuda:0 is an AMD GPU"),
        (Kernels(), None, f"cubins: {Kernels.way}; nibble_kernels is not installed"),
        (Kernels(), Kernels(), f"cubins: {Kernels.way}; this nibble_kernels was built for cpu"),
        (KERNELS, KERNELS, "extension: nibble_kernels 0.7 is installed"),
    ],
)
def test_a_device_s_way_to_kernels_is_one_line(monkeypatch, served, extension, words):
    why = f"nibble_kernels {'is not' if extension is None else '0.7 is'} installed"
    monkeypatch.setattr(native, "serving", lambda device: (served, "cuda:0 is an AMD GPU"))
    monkeypatch.setattr(native, "module", lambda: (extension, why))
    assert environment.way(torch.device("cuda", 0)) == words
