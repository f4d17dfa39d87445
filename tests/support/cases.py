"""Shapes that tests and benches share, and the tensors of one linear for a shape.

Small cases are chosen for their edges (ragged M, one group, rank 0, N that no tile divides); FLUX
lists the real layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nibble.quant.weights.packing import dequantize_groups, pack_indices, unpack_int4


@dataclass(frozen=True)
class Case:
    """One linear: M tokens, K in, N out, R rank, and the options of its file. `db` is the SQNR
    floor of its quantized activations.
    """

    name: str
    M: int
    K: int
    N: int
    R: int = 8
    bias: bool = True
    act_unsigned: bool = False
    rotation: int = 0
    db: float = 15.0

    def __str__(self) -> str:
        return self.name

    def scaled(self, scale: float) -> Case:
        """The same layer with M, K and N shrunk by `scale`, K to whole groups."""
        k = max(64, round(self.K * scale / 64) * 64)
        n = max(1, round(self.N * scale))
        return replace(self, M=max(1, round(self.M * scale)), K=k, N=n, R=min(self.R, k))


SMALL = [
    Case("plain", 32, 256, 128),
    Case("one_group", 7, 64, 24, R=4),
    Case("ragged_tokens", 13, 192, 64),
    Case("odd_outputs", 5, 128, 37, R=3),
    Case("rank_zero", 9, 128, 40, R=0),
    Case("no_bias", 8, 128, 48, bias=False),
    Case("rank_zero_no_bias", 3, 64, 5, R=0, bias=False),
    Case("one_token", 1, 320, 96),
    Case("unsigned", 11, 192, 50, act_unsigned=True, db=22),
    Case("rotated", 10, 192, 50, rotation=64, db=18),
]

FLUX = [
    Case("double.img_attn.qkv", 4096, 3072, 9216, R=32),
    Case("double.img_attn.proj", 4096, 3072, 3072, R=32),
    Case("double.img_mlp.0", 4096, 3072, 12288, R=32),
    Case("double.img_mlp.2", 4096, 12288, 3072, R=32, act_unsigned=True),
    Case("double.txt_attn.qkv", 512, 3072, 9216, R=32),
    Case("single.linear1", 4608, 3072, 21504, R=32),
    Case("single.linear2", 4608, 15360, 3072, R=32),
    Case("single.linear1.rotated", 4608, 3072, 21504, R=32, rotation=64),
]

FLUX_MODULATION = [Case("double.img_mod", 1, 3072, 18432), Case("single.modulation", 1, 3072, 9216)]


def _loudness(case: Case) -> Tensor:
    """Six times louder on about five of K channels, (K,): what smoothing is for."""
    loud = torch.ones(case.K)
    loud[:: max(1, case.K // 5)] = 6
    return loud


def make_input(
    case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """Activations (M, K) with a few loud channels, as diffusion transformers have; after a GELU
    where codes are unsigned.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(case.M, case.K, generator=generator)
    x *= _loudness(case)
    x = torch.nn.functional.gelu(x) if case.act_unsigned else x
    return x.to(device, dtype)


def make_w4a4(
    case: Case, dtype: torch.dtype = torch.bfloat16, seed: int = 1, device: str = "cpu"
) -> dict[str, Tensor | None]:
    """Random parameters of `linear_w4a4`, under its argument names, floats in `dtype`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    groups = case.K // 64
    parameters = {
        "weight": torch.randint(
            -128, 128, (case.N, case.K // 2), generator=generator, dtype=torch.int8
        ),
        "weight_scale": (normal(groups, case.N).abs() + 0.5) * 0.01,
        "smooth_factor": _loudness(case) * (torch.rand(case.K, generator=generator) + 0.75),
        "proj_down": normal(case.K, case.R) * case.K**-0.5,
        "proj_up": normal(case.N, case.R) * 0.3,
        "bias": normal(case.N) if case.bias else None,
    }
    return {name: _place(tensor, dtype, device) for name, tensor in parameters.items()}


def make_w4a16(
    case: Case, dtype: torch.dtype = torch.bfloat16, seed: int = 1, device: str = "cpu"
) -> dict[str, Tensor | None]:
    """Random parameters of `linear_w4a16`, under its argument names, floats in `dtype`."""
    parameters = make_w4a4(case, dtype, seed, device)
    zeros = (
        torch.randn(case.K // 64, case.N, generator=torch.Generator().manual_seed(seed + 1)) * 0.01
    )
    kept = {name: parameters[name] for name in ("weight", "weight_scale", "bias")}
    # symmetric layers lack zero points
    return kept | {"weight_zeros": zeros.to(device, dtype) if case.bias else None}


def make_w4a8(
    case: Case,
    dtype: torch.dtype = torch.bfloat16,
    group: int = 32,
    seed: int = 1,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Random parameters of `linear_w4a8`, under its argument names, floats in `dtype` but the
    channels' scales, which are float32 as in files. group: columns that share a scale.
    """
    layer = make_w4a4(case, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-127, 128, shape, generator=generator).to(torch.int8)

    parameters = {
        "weight": layer["weight"],
        "weight_scale": numbers(case.K // group, case.N),
        "weight_channel_scale": torch.randn(case.N, generator=generator) * 0.001,
        "weight_table": numbers(16),
        "smooth_factor": layer["smooth_factor"],
        "proj_down": layer["proj_down"] if case.R else None,
        "proj_up": layer["proj_up"] if case.R else None,
        "bias": layer["bias"],
    }
    return {
        name: None if tensor is None else tensor.to(device) for name, tensor in parameters.items()
    }


VQ_LAYOUTS = {"1.5 bit": (6, 4), "2 bit": (8, 4), "3 bit": (6, 2), "4 bit": (8, 2)}
"""Bits of an index and sub-vector length: the layouts that every backend has."""


def make_vq(
    case: Case,
    bits: int = 8,
    vector: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 1,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Random parameters of `linear_vq`, under its argument names, floats in `dtype` but for the
    codebook, which files hold in float16.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    indices = torch.randint(
        0, 1 << bits, (case.N, case.K // vector), generator=generator, dtype=torch.int32
    )
    parameters = {
        "codebook": normal(1 << bits, vector),
        "scale": (normal(case.N).abs() + 0.5) * 0.1 if case.bias else None,
        "proj_down": normal(case.K, case.R) * case.K**-0.5 if case.R else None,
        "proj_up": normal(case.N, case.R) * 0.3 if case.R else None,
        "bias": normal(case.N) if case.bias else None,
    }
    kept = {
        name: _place(
            tensor,
            torch.float16 if name == "codebook" and dtype != torch.float64 else dtype,
            device,
        )
        for name, tensor in parameters.items()
    }
    return {"indices": pack_indices(indices, bits).to(device)} | kept


def plain_w4a4(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    parameters: dict[str, Tensor | None],
    unsigned: bool,
    dtype: torch.dtype,
) -> Tensor:
    """What plain torch makes of given codes when all its operands are in `dtype`: the yardstick of
    an op's error.
    """
    act = (
        unpack_int4(q, not unsigned).float().unflatten(-1, (-1, 64))
        * ascales.float().t()[..., None]
    )
    dense = dequantize_groups(unpack_int4(parameters["weight"]), parameters["weight_scale"])
    bias = None if parameters["bias"] is None else parameters["bias"].to(dtype)
    return (
        torch.nn.functional.linear(act.flatten(-2).to(dtype), dense.to(dtype), bias)
        + h.to(dtype) @ parameters["proj_up"].to(dtype).t()
    )


def options(case: Case) -> dict[str, bool | int]:
    """The two options of a W4A4 file, as keyword arguments."""
    return {"act_unsigned": case.act_unsigned, "rotation": case.rotation}


def _place(tensor: Tensor | None, dtype: torch.dtype, device: str) -> Tensor | None:
    if tensor is None:
        return None
    return tensor.to(device) if tensor.dtype == torch.int8 else tensor.to(device, dtype)
