"""The W4A4 ops through Triton's interpreter, on the CPU, in a process of its own: an environment
variable, read when Triton is imported, makes every kernel of the process interpreted.

    TRITON_INTERPRET=1 python tests/kernels/triton_interpreted.py RESULTS.pt

The interpreter has no inline assembly and multiplies bfloat16 wrongly, so numbers are float16 and
float32, and bytes come apart by shifts.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import checkout  # noqa: E402, F401
from cases import SMALL, Case, make_input, make_w4a4, options  # noqa: E402
from nibble.kernels import reference  # noqa: E402
from nibble.kernels.params import (  # noqa: E402
    Activations,
    GeluArguments,
    GroupParams,
    QuantizeParams,
    W4A4Params,
)

CASES = [
    *SMALL,
    Case("rank_16", 33, 192, 130, R=16),
    Case("rank_33_unsigned", 70, 128, 70, R=33, act_unsigned=True),
    Case("rank_160", 40, 128, 96, R=160),
    Case("rank_300", 5, 64, 8, R=300),
    Case("rank_33_rotated", 40, 128, 66, R=33, rotation=64),
]
WAYS = ("integers", "magic", "floats")
"""In which GPUs multiply codes: NVIDIA's newest and AMD's, 8.x and 12.x, 10.3."""
DTYPES = (torch.float16, torch.float32)
MIDDLE = Case("middle", 6, 128, 192, R=5)
SECOND = Case("second", 6, 192, 40, R=17)
BOTH = Case("both", 33, 320, 70, R=17)
RANKS = (5, 32, 0)


def layer(case: Case, dtype: torch.dtype) -> W4A4Params:
    return W4A4Params(**make_w4a4(case, dtype), **options(case))


def mixed(dtype: torch.dtype) -> tuple[Tensor, W4A4Params]:
    """x in one dtype, parameters in the other."""
    other = DTYPES[dtype == DTYPES[0]]
    return make_input(MIDDLE, dtype), layer(MIDDLE, other)


def group(dtype: torch.dtype) -> GroupParams:
    """Layers of several ranks and sizes that share their smoothing."""
    layers = [layer(Case("", 6, 128, 40 + rank, R=rank, bias=rank != 32), dtype) for rank in RANKS]
    lists = ([getattr(each, name) for each in layers] for name in GroupParams._fields[1:6])
    return GroupParams(layers[0].smooth_factor, *lists)


def gelu_arguments(dtype: torch.dtype) -> GeluArguments:
    p, second = layer(MIDDLE, dtype), layer(SECOND, dtype)
    q, ascales, h = reference.quantize_down(make_input(MIDDLE, dtype), *p.quantizer)
    return GeluArguments(
        q, ascales, h, *p.product, second.smooth_factor, second.proj_down, mid_dtype=dtype
    )


def signs_of_both(dtype: torch.dtype) -> tuple[Tensor, W4A4Params]:
    """x of which only the first columns are read, and a layer whose codes turn unsigned."""
    wide = make_input(Case("", 33, 448, 1), dtype)
    return wide[:, :320], layer(BOTH, dtype)._replace(unsigned_from=192)


def eight_bits(dtype: torch.dtype) -> tuple[Tensor, W4A4Params]:
    """A layer whose activations turn from signed to shifted, all in codes of 8 bits."""
    x, p = signs_of_both(dtype)
    return x, p._replace(act_bits=8)


def random_bits(dtype: torch.dtype) -> tuple[Tensor, QuantizeParams]:
    """x of every kind of number: subnormal, huge, infinite, NaN; and rows that are ties."""
    generator = torch.Generator().manual_seed(5)
    integers, digits = (torch.int32, 31) if dtype == torch.float32 else (torch.int16, 15)
    bits = torch.randint(-(2**digits), 2**digits, (48, 128), generator=generator)
    x = bits.to(integers).view(dtype)
    steps = torch.randint(-14, 15, (16, 128), generator=generator)
    x[16:32] = (steps * torch.logspace(-4, 3, 16, base=2)[:, None]).to(dtype)
    x[3:6] = 0
    x[4, 5], x[5, 70] = float("inf"), -float("inf")
    smooth = torch.randn(128, generator=generator)
    return x, QuantizeParams(smooth, torch.zeros(128, 0))


def products(act: Activations, p: W4A4Params) -> dict[str, Tensor]:
    """One product in each of WAYS."""
    import triton.language as tl

    from nibble.kernels.backends import triton_w4a4

    plain = triton_w4a4.way(None)
    ways = {"integers": plain, "magic": plain._replace(magic=True)}
    ways["floats"] = plain._replace(floats=tl.float32)
    found = {}
    for name in WAYS:
        triton_w4a4.way = lambda there, way=ways[name]: way
        found[name] = triton_w4a4.gemm_w4a4_up(act, p.product, torch.float32)
    triton_w4a4.way = lambda there: plain
    return found


def main(path: str) -> None:
    from nibble.kernels.backends import triton_w4a4

    results = {}
    for dtype in DTYPES:
        for case in CASES:
            x, p = make_input(case, dtype), layer(case, dtype)
            quantized = triton_w4a4.quantize_down(x, p.quantizer)
            act = Activations(*reference.quantize_down(x, *p.quantizer), p.act_unsigned)
            results[case.name, dtype] = {
                "quantized": quantized,
                "products": products(act, p),
                "linear": triton_w4a4.linear_w4a4(x, p),
            }
        results["group", dtype] = triton_w4a4.linear_w4a4_grouped(
            make_input(MIDDLE, dtype), group(dtype)
        )
        results["gelu", dtype] = triton_w4a4.gemm_w4a4_up_gelu_quantize_down(gelu_arguments(dtype))
        x, p = mixed(dtype)
        results["mixed", dtype] = triton_w4a4.quantize_down(x, p.quantizer)
        x, p = signs_of_both(dtype)
        results["both", dtype] = {
            "quantized": triton_w4a4.quantize_down(x, p.quantizer),
            "linear": triton_w4a4.linear_w4a4(x, p),
        }
        x, p = eight_bits(dtype)
        act = reference.quantize_down(x, *p.quantizer)
        results["eight", dtype] = {
            "quantized": triton_w4a4.quantize_down(x, p.quantizer),
            "products": products(Activations(*act, unsigned_from=p.unsigned_from, act_bits=8), p),
            "linear": triton_w4a4.linear_w4a4(x, p),
        }
        for unsigned in (False, True):
            x, p = random_bits(dtype)
            p = p._replace(act_unsigned=unsigned)
            results["bits", dtype, unsigned] = triton_w4a4.quantize_down(x, p)
    torch.save(results, path)


if __name__ == "__main__":
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's, of NaN and infinity
    main(sys.argv[1])
