"""`python -m nibble bench --env`: facts and a row for every op, whatever is installed."""

import json

import pytest
import torch

from nibble.__main__ import main
from nibble.kernels import environment, ops
from nibble.kernels.backends import choose


def test_every_op_has_a_row_for_each_dtype():
    found = environment.describe((1, 64, 64))
    rows = {(row["op"], row["device"], row["dtype"]) for row in found["ops"]}
    assert {
        (op, "cpu", dtype) for op in ops.SCHEMAS for dtype in ("bfloat16", "float16", "float32")
    } <= rows
    assert all(row["backend"] in choose.NAMES and row["reason"] for row in found["ops"])
    assert {"python", "torch", "CPU", "nibble_kernels", "Triton", "comfy_kitchen"} <= found[
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
