"""The doors of 4-bit floats: what compiled code refuses before anything runs, and tensors into
pointers, with the reference behind them.
"""

import pytest
import torch

from nibble.kernels.backends import native, native_nvfp4
from nibble.kernels.backends.compiled import Compiled
from nibble.kernels.params import NVFP4Params
from nibble.kernels.reference import nvfp4 as reference
from stand_in import at, rows_at

BASE = 1 << 12
PLACE = dict(device=-1, stream=0, threads=1, isa=0)
SIZES = dict(M=2, K=64, R=4, q=BASE, ascales=BASE, h=BASE, param_dtype=2)
CALLS = {
    "quantize_nvfp4_down": PLACE
    | SIZES
    | dict(x=BASE, x_stride=64, x_dtype=2, smooth=BASE, proj_down=BASE, rounded=False),
    "gemm_nvfp4_up": PLACE
    | SIZES
    | dict(N=64, weight=BASE, weight_scale=BASE, weight_scale_2=BASE, proj_up=BASE, bias=0)
    | dict(out=BASE, out_dtype=2),
}


@pytest.mark.parametrize(
    ("op", "change", "words"),
    [
        ("quantize_nvfp4_down", {}, "there is no such kernel for the CPU"),
        ("quantize_nvfp4_down", {"K": 32}, "K=32 is not a multiple of the group size 64"),
        ("quantize_nvfp4_down", {"ascales": 8}, "ascales is not aligned to 16 bytes"),
        ("quantize_nvfp4_down", {"x_stride": 63}, "rows of x would overlap"),
        ("quantize_nvfp4_down", {"param_dtype": 0}, "float16 or bfloat16, not float32"),
        ("gemm_nvfp4_up", {}, "there is no such kernel for the CPU"),
        ("gemm_nvfp4_up", {"weight_scale_2": 0}, "weight_scale_2 is null and has 64 elements"),
        ("gemm_nvfp4_up", {"N": -1}, "N is negative"),
        ("gemm_nvfp4_up", {"out_dtype": 3}, "out_dtype=3"),
    ],
)
def test_wrong_values_are_named(built_library, op, change, words):
    compiled = Compiled(built_library, "library", "CPU library")
    with pytest.raises(ValueError, match=words):
        getattr(compiled, op)(**CALLS[op] | change)


class StandIn:
    """The two ops in plain torch, from bare pointers."""

    def quantize_nvfp4_down(self, **a):
        m, k, r = a["M"], a["K"], a["R"]
        x = rows_at(a["x"], torch.bfloat16, m, k, a["x_stride"]).float()
        codes, scale = reference.quantize_nvfp4(
            x / at(a["smooth"], torch.bfloat16, k).float(), a["rounded"]
        )
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
        at(a["q"], torch.uint8, m, k // 2).copy_(packed)
        at(a["ascales"], torch.uint8, m, k // 16).copy_(scale.view(torch.uint8))
        down = at(a["proj_down"], torch.bfloat16, k, r).float()
        at(a["h"], torch.float32, m, r).copy_(x @ down)

    def gemm_nvfp4_up(self, **a):
        m, n, k, r = (a[name] for name in "MNKR")

        def numbers(codes, scale, rows):
            bytes_of = at(a[scale], torch.uint8, rows, k // 16).view(torch.float8_e4m3fn)
            codes = at(a[codes], torch.int8, rows, k // 2)
            return reference.decoded_weight(codes, bytes_of, torch.float32)

        y = numbers("q", "ascales", m) @ numbers("weight", "weight_scale", n).t()
        y *= at(a["weight_scale_2"], torch.float32, n)
        up = at(a["proj_up"], torch.bfloat16, n, r).float()
        y += at(a["h"], torch.float32, m, r) @ up.t() + at(a["bias"], torch.bfloat16, n).float()
        at(a["out"], torch.bfloat16, m, n).copy_(y)


def test_a_linear_reaches_both_kernels(monkeypatch):
    """Columns of a wider x, scales of a column in bfloat16, a weight that is a slice."""
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(5, 256, generator=draw).bfloat16()
    codes = torch.randint(-128, 128, (72, 128), generator=draw, dtype=torch.int8)
    scale = (torch.rand(72, 8, generator=draw) + 0.1).to(torch.float8_e4m3fn)
    branch = [torch.randn(*s, generator=draw).bfloat16() for s in ((128, 8), (72, 8), (72,))]
    column, smooth = torch.rand(72, generator=draw), torch.rand(128, generator=draw) + 0.5
    p = NVFP4Params(codes[:, 32:96], scale, column.bfloat16(), smooth.bfloat16(), *branch, True)
    monkeypatch.setattr(native, "on", lambda device: StandIn())
    found = native_nvfp4.linear_nvfp4(torch.bfloat16, wide[:, 64:192], p)
    wanted = reference.linear_nvfp4(wide[:, 64:192], *p)
    assert torch.allclose(found.float(), wanted.float(), rtol=0.01, atol=0.05)
    tried = native_nvfp4.tried.__wrapped__
    monkeypatch.setattr(native, "serving", lambda device: (None, "a stand-in"))
    assert tried(torch.device("cpu")) == (True, "the compiled product of 4-bit floats; a stand-in")
