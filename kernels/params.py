"""The parameters of each op as one record, so that a new one is named once.

Fields come in the order of the op's schema, with the schema's defaults: `W4A4Params(*arguments)`
takes what torch's dispatcher passes after x. Letters for shapes are explained in the docstring of
`kernels`; parameters may be of any float dtype unless a comment says otherwise. act_unsigned: codes
are 0..15; unsigned_from, where it is not 0: those from that column on are, and act_unsigned is
False. act_bits: 4, or 8 for codes -127..127 of the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class QuantizeParams(NamedTuple):
    """What `quantize_down` takes besides x."""

    smooth_factor: Tensor  # (K,)
    proj_down: Tensor  # (K, R)
    act_unsigned: bool = False
    rotation: int = 0
    unsigned_from: int = 0
    act_bits: int = 4


class Activations(NamedTuple):
    """Quantized tokens: the result of `quantize_down`, and how its codes are read."""

    q: Tensor  # int8 (M, K/2), of 8 bits (M, K); between compiled ops on Hopper e4m3 (M, K)
    ascales: Tensor  # (K/64, M)
    h: Tensor  # (M, R)
    act_unsigned: bool = False
    unsigned_from: int = 0
    act_bits: int = 4


class ProductParams(NamedTuple):
    """What `gemm_w4a4_up` multiplies activations with."""

    weight: Tensor  # int8 (N, K/2)
    weight_scale: Tensor  # (K/64, N)
    proj_up: Tensor  # (N, R)
    bias: Tensor | None = None  # (N,)


class GemmArguments(NamedTuple):
    """`gemm_w4a4_up`, flat as in its schema."""

    q: Tensor
    ascales: Tensor
    h: Tensor
    weight: Tensor
    weight_scale: Tensor
    proj_up: Tensor
    bias: Tensor | None = None
    act_unsigned: bool = False
    out_dtype: torch.dtype | None = None
    unsigned_from: int = 0
    act_bits: int = 4

    @property
    def activations(self) -> Activations:
        return Activations(*self[:3], self.act_unsigned, self.unsigned_from, self.act_bits)

    @property
    def product(self) -> ProductParams:
        return ProductParams(*self[3:7])


class GeluArguments(NamedTuple):
    """`gemm_w4a4_up_gelu_quantize_down`, flat as in its schema; a 2 marks the second layer's."""

    q: Tensor
    ascales: Tensor
    h: Tensor
    weight: Tensor
    weight_scale: Tensor
    proj_up: Tensor
    bias: Tensor | None
    smooth_factor2: Tensor  # (N,)
    proj_down2: Tensor  # (N, R2)
    act_unsigned: bool = False
    act_unsigned2: bool = False
    rotation2: int = 0
    mid_dtype: torch.dtype | None = None
    act_bits: int = 4
    act_bits2: int = 4

    @property
    def activations(self) -> Activations:
        return Activations(*self[:3], self.act_unsigned, 0, self.act_bits)

    @property
    def product(self) -> ProductParams:
        return ProductParams(*self[3:7])

    @property
    def second(self) -> QuantizeParams:
        return QuantizeParams(*self[7:9], self.act_unsigned2, self.rotation2, 0, self.act_bits2)


class W4A4Params(NamedTuple):
    """A whole SVDQuant linear: `linear_w4a4`."""

    weight: Tensor  # int8 (N, K/2)
    weight_scale: Tensor  # (K/64, N)
    smooth_factor: Tensor  # (K,)
    proj_down: Tensor  # (K, R)
    proj_up: Tensor  # (N, R)
    bias: Tensor | None = None  # (N,)
    act_unsigned: bool = False
    rotation: int = 0
    unsigned_from: int = 0
    act_bits: int = 4

    @property
    def quantizer(self) -> QuantizeParams:
        return QuantizeParams(self.smooth_factor, self.proj_down, *self[6:])

    @property
    def product(self) -> ProductParams:
        return ProductParams(*self[:2], *self[4:6])


class GroupParams(NamedTuple):
    """Several SVDQuant linears of one x that share its smoothing: `linear_w4a4_grouped`."""

    smooth_factor: Tensor
    weight: Sequence[Tensor]
    weight_scale: Sequence[Tensor]
    proj_down: Sequence[Tensor]
    proj_up: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    act_unsigned: bool = False
    rotation: int = 0
    act_bits: int = 4

    @property
    def layers(self) -> list[W4A4Params]:
        smooth, *lists = self[:6]
        flags = (self.act_unsigned, self.rotation, 0, self.act_bits)
        return [
            W4A4Params(weight, scale, smooth, down, up, bias, *flags)
            for weight, scale, down, up, bias in zip(*lists, strict=True)
        ]


class MLPParams(NamedTuple):
    """`mlp_w4a4`, flat as in its schema; a 2 marks the second layer's."""

    weight: Tensor
    weight_scale: Tensor
    smooth_factor: Tensor
    proj_down: Tensor
    proj_up: Tensor
    bias: Tensor | None
    weight2: Tensor
    weight_scale2: Tensor
    smooth_factor2: Tensor
    proj_down2: Tensor
    proj_up2: Tensor
    bias2: Tensor | None
    act_unsigned: bool = False
    rotation: int = 0
    act_unsigned2: bool = False
    rotation2: int = 0
    act_bits: int = 4
    act_bits2: int = 4

    @property
    def first(self) -> W4A4Params:
        return W4A4Params(*self[:6], *self[12:14], 0, self.act_bits)

    @property
    def second(self) -> W4A4Params:
        return W4A4Params(*self[6:12], *self[14:16], 0, self.act_bits2)


class W4A16Params(NamedTuple):
    """A linear whose weights alone have 4 bits: `gemv_w4a16`, `gemm_w4a16`, `linear_w4a16`."""

    weight: Tensor  # int8 (N, K/2)
    weight_scale: Tensor  # (K/64, N)
    weight_zeros: Tensor | None = None  # (K/64, N)
    bias: Tensor | None = None  # (N,)


class W4A8Params(NamedTuple):
    """A linear of 4-bit weights read as int8 and activations of 8 bits: `linear_w4a8`."""

    weight: Tensor  # int8 (N, K/2)
    weight_scale: Tensor  # int8 (K/g, N)
    weight_channel_scale: Tensor  # (N,)
    weight_table: Tensor  # int8 (16,)
    smooth_factor: Tensor  # (K,)
    proj_down: Tensor | None = None  # (K, R)
    proj_up: Tensor | None = None  # (N, R)
    bias: Tensor | None = None  # (N,)
    rotation: int = 0


class NVFP4Params(NamedTuple):
    """A linear of 4-bit floats with a low-rank branch: `linear_nvfp4`."""

    weight: Tensor  # int8 (N, K/2)
    weight_scale: Tensor  # e4m3 (N, K/16)
    weight_scale_2: Tensor  # (N,)
    smooth_factor: Tensor  # (K,)
    proj_down: Tensor  # (K, R)
    proj_up: Tensor  # (N, R)
    bias: Tensor | None = None  # (N,)
    rounded: bool = False


class VQParams(NamedTuple):
    """A codebook linear: `linear_vq`; `gemm_vq` takes neither the projections nor a rotation."""

    indices: Tensor  # uint8 (N, K/D * log2(C) / 8)
    codebook: Tensor  # (C, D)
    scale: Tensor | None = None  # (N,)
    proj_down: Tensor | None = None  # (K, R)
    proj_up: Tensor | None = None  # (N, R)
    bias: Tensor | None = None  # (N,)
    rotation: int = 0


def float_dtypes(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """The dtypes by which a backend is chosen; None for a parameter that is absent."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)
