"""The W4A4 ops through `nibble_kernels`: tensors into pointers.

Inside the whole linears activations stay in the form that the GPU's product reads fastest, in
scratch memory. Functions take the dtype that the parameters are brought to first. Arguments of a
native call that do not depend on the tokens are gathered once, by `quantizer_arguments` and
`product_arguments`; operands that had to be copied live in a local variable until the calls return.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..reference import GROUP
from . import native
from .native import DTYPES, E4M3, PACKED, WIDE, dense, dense_as, dense_rows, optional_as, row_stride

if TYPE_CHECKING:
    from ..params import (
        Activations,
        GeluArguments,
        GroupParams,
        ProductParams,
        QuantizeParams,
        W4A4Params,
    )

Arguments = dict[str, Any]
Signs = tuple[bool, int]


# ---- operands and arguments ----------------------------------------------------------------------


def quantizer_operands(p: QuantizeParams, dtype: torch.dtype) -> QuantizeParams:
    """Dense and of one dtype; the same tensors where they are so already."""
    return p._replace(
        smooth_factor=dense_as(p.smooth_factor, dtype), proj_down=dense_as(p.proj_down, dtype)
    )


def product_operands(p: ProductParams, dtype: torch.dtype) -> ProductParams:
    return p._replace(
        weight=dense(p.weight),
        weight_scale=dense_as(p.weight_scale, dtype),
        proj_up=dense_as(p.proj_up, dtype),
        bias=optional_as(p.bias, dtype),
    )


def layer_operands(p: W4A4Params, dtype: torch.dtype) -> W4A4Params:
    return p._replace(
        **quantizer_operands(p.quantizer, dtype)._asdict(),
        **product_operands(p.product, dtype)._asdict(),
    )


def quantizer_arguments(p: QuantizeParams, codes: int) -> Arguments:
    """`quantize_down`'s arguments but for its place, M, x and results."""
    k, rank = p.proj_down.shape
    return {
        "K": k,
        "R": rank,
        "smooth": p.smooth_factor.data_ptr(),
        "proj_down": p.proj_down.data_ptr(),
        "param_dtype": DTYPES[p.proj_down.dtype],
        "act_unsigned": p.act_unsigned or p.unsigned_from > 0,
        "rotate": p.rotation != 0,
        "unsigned_from": p.unsigned_from,
        "codes": codes,
    }


def product_arguments(
    p: ProductParams, codes: int, signs: Signs, h_stride: int | None = None
) -> Arguments:
    """A product's arguments but for its place, M, activations and results. `signs`: act_unsigned
    and unsigned_from of the activations. `h_stride`: floats from one row of h to the next, by
    default R.
    """
    n, rank = p.proj_up.shape
    return {
        "N": n,
        "K": p.weight.shape[1] * 2,
        "R": rank,
        "codes": codes,
        "act_unsigned": signs[0] or signs[1] > 0,
        "unsigned_from": signs[1],
        "h_stride": rank if h_stride is None else h_stride,
        "weight": p.weight.data_ptr(),
        "weight_scale": p.weight_scale.data_ptr(),
        "proj_up": p.proj_up.data_ptr(),
        "bias": native.address(p.bias),
        "param_dtype": DTYPES[p.weight_scale.dtype],
    }


def _workspace(op: str, device: torch.device, m: int, product: Arguments, rank: int) -> int:
    """Bytes of scratch that an op wants; `rank` is that of the h which it writes, if it does."""
    sizes = {name: product[name] for name in ("N", "K", "codes")}
    return native.on(device).workspace_bytes(
        op=op, capability=native.capability(device), M=m, R=rank, **sizes
    )


def public_codes(act_bits: int) -> int:
    """The form in which an op takes and gives codes of so many bits."""
    return native.INT8 if act_bits == 8 else PACKED


# ---- parts ---------------------------------------------------------------------------------------


def _new_activations(device: torch.device, m: int, p: QuantizeParams) -> tuple:
    k, rank = p.proj_down.shape
    return (
        torch.empty((m, k * p.act_bits // 8), dtype=torch.int8, device=device),
        torch.empty((k // GROUP, m), dtype=torch.float32, device=device),
        torch.empty((m, rank), dtype=torch.float32, device=device),
    )


def quantize_down(
    dtype: torch.dtype, x: Tensor, p: QuantizeParams, isa: int = 0, codes: int = PACKED
) -> tuple[Tensor, Tensor, Tensor]:
    """codes: how those of 4 bits are stored."""
    p, x, (m, k) = quantizer_operands(p, dtype), dense_rows(x), x.shape
    codes = native.INT8 if p.act_bits == 8 else codes
    q, ascales, h = _new_activations(x.device, m, p)
    if codes == E4M3:
        q = torch.empty((m, k), dtype=WIDE, device=x.device)
    native.on(x.device).quantize_down(
        **native.place(x.device, isa),
        **quantizer_arguments(p, codes),
        M=m,
        x=x.data_ptr(),
        x_stride=row_stride(x),
        x_dtype=DTYPES[x.dtype],
        q=q.data_ptr(),
        ascales=ascales.data_ptr(),
        h=h.data_ptr(),
    )
    return q, ascales, h


def _activation_operands(act: Activations) -> Activations:
    return act._replace(
        q=dense(act.q),
        ascales=dense_as(act.ascales, torch.float32),
        h=dense_as(act.h, torch.float32),
    )


def gemm_w4a4_up(
    dtype: torch.dtype, act: Activations, p: ProductParams, out_dtype: torch.dtype, isa: int = 0
) -> Tensor:
    device, m = act.q.device, act.q.shape[0]
    p, act = product_operands(p, dtype), _activation_operands(act)
    codes, signs = public_codes(act.act_bits), (act.act_unsigned, act.unsigned_from)
    if act.q.dtype is WIDE:
        codes = E4M3
    product = product_arguments(p, codes, signs)
    needed = _workspace("gemm_w4a4_up", device, m, product, product["R"])
    workspace, (work,) = native.scratch(device, needed)
    out_kind = out_dtype if out_dtype in DTYPES else torch.float32
    out = torch.empty((m, product["N"]), dtype=out_kind, device=device)
    native.on(device).gemm_w4a4_up(
        **native.place(device, isa),
        **product,
        M=m,
        q=act.q.data_ptr(),
        ascales=act.ascales.data_ptr(),
        h=act.h.data_ptr(),
        out=out.data_ptr(),
        out_dtype=DTYPES[out.dtype],
        workspace=work,
        workspace_size=needed,
    )
    return out.to(out_dtype)


def _second_arguments(p: QuantizeParams, mid_dtype: torch.dtype, codes: int) -> Arguments:
    """The second layer's part of the fused op, but for its results."""
    return {
        "mid_dtype": DTYPES[mid_dtype],
        "R2": p.proj_down.shape[1],
        "smooth2": p.smooth_factor.data_ptr(),
        "proj_down2": p.proj_down.data_ptr(),
        "act_unsigned2": p.act_unsigned,
        "rotate2": p.rotation != 0,
        "codes2": codes,
    }


def gemm_w4a4_up_gelu_quantize_down(
    dtype: torch.dtype, a: GeluArguments, isa: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """`a.mid_dtype` must be given."""
    device, m = a.q.device, a.q.shape[0]
    act, p = _activation_operands(a.activations), product_operands(a.product, dtype)
    second = quantizer_operands(a.second, dtype)
    assert a.mid_dtype is not None
    product = product_arguments(p, public_codes(act.act_bits), (act.act_unsigned, 0))
    rank2 = second.proj_down.shape[1]
    op = "gemm_w4a4_up_gelu_quantize_down"
    needed = _workspace(op, device, m, product, rank2)
    workspace, (work,) = native.scratch(device, needed)
    q2, ascales2, h2 = _new_activations(device, m, second)
    native.on(device).gemm_w4a4_up_gelu_quantize_down(
        **native.place(device, isa),
        **product,
        **_second_arguments(second, a.mid_dtype, public_codes(second.act_bits)),
        M=m,
        q=act.q.data_ptr(),
        ascales=act.ascales.data_ptr(),
        h=act.h.data_ptr(),
        q2=q2.data_ptr(),
        ascales2=ascales2.data_ptr(),
        h2=h2.data_ptr(),
        workspace=work,
        workspace_size=needed,
    )
    return q2, ascales2, h2


# ---- whole layers --------------------------------------------------------------------------------


class LinearCall:
    """One linear, flattened: the native call's arguments but for the tokens'.

    p: dense, aligned and of one dtype (`layer_operands`). Holds addresses and no tensor, so it is
    valid as long as whoever calls it makes sure that p's memory is what it was.
    """

    def __init__(self, p: W4A4Params, device: torch.device, isa: int = 0):
        self.device, self.isa, self.on_gpu = device, isa, device.type != "cpu"
        self.module = native.on(device)
        self.outputs = len(p.weight)
        gpu, codes = native.capability(device), native.codes_of(device, p.act_bits)
        quantizer = quantizer_arguments(p.quantizer, codes)
        product = product_arguments(p.product, codes, (p.act_unsigned, p.unsigned_from))
        del product["h_stride"]
        self.arguments: Arguments = {**quantizer, **product}
        self.op = native.layer_op(device, "linear_w4a4", self.arguments)
        self.sizes = {"capability": gpu, "codes": codes}
        self.sizes |= {name: self.arguments[name] for name in "NKR"}
        # Tokens of the last call, and the scratch that so many want.
        self.last = (-1, 0)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., K) on `device`, dense (a matrix: its rows) and aligned -> (..., N) in x.dtype."""
        leading = x.shape[:-1]
        m = leading.numel()
        out = x.new_empty((*leading, self.outputs))
        tokens: Arguments = {"M": m, "x": x.data_ptr(), "x_dtype": DTYPES[x.dtype]}
        tokens["x_stride"] = row_stride(x)
        if self.on_gpu:
            # `scratch` lives until the call has returned; a GPU's work is ordered by its stream.
            scratch = self._scratch(x, m)
            tokens |= {"scratch": scratch.data_ptr(), "scratch_size": scratch.numel()}
        self.op(out=out.data_ptr(), **tokens, **native.place(self.device, self.isa))
        return out

    def _scratch(self, x: Tensor, m: int) -> Tensor:
        """Memory from torch's allocator, so that a CUDA graph can capture the call. On the CPU the
        call has its own.
        """
        last = self.last
        if last[0] != m:
            last = self.last = m, self.module.linear_w4a4_bytes(M=m, **self.sizes)
        return x.new_empty(last[1], dtype=torch.uint8)


def linear_w4a4(dtype: torch.dtype, x: Tensor, p: W4A4Params, isa: int = 0) -> Tensor:
    operands = layer_operands(p, dtype)  # copies live until the call has returned
    return LinearCall(operands, x.device, isa)(dense_rows(x))


def linear_w4a4_grouped(
    dtype: torch.dtype, x: Tensor, p: GroupParams, isa: int = 0
) -> list[Tensor]:
    """One quantization for all, and one h in which each layer has its columns."""
    device, (m, k), x = x.device, x.shape, dense_rows(x)
    codes = native.codes_of(device, p.act_bits)
    place, extension, kind = native.place(device, isa), native.on(device), DTYPES[x.dtype]
    layers = [layer_operands(layer, dtype) for layer in p.layers]
    down = _side_by_side([layer.proj_down for layer in layers])
    quantizer = layers[0].quantizer._replace(proj_down=down)
    width = down.shape[1]
    signs = (p.act_unsigned, 0)
    products = [product_arguments(layer.product, codes, signs, width) for layer in layers]
    needed = max(_workspace("gemm_w4a4_up", device, m, a, a["R"]) for a in products)
    # `owner` is read nowhere: it keeps the scratch memory alive until the calls have returned.
    owner, (q, ascales, h, work) = native.scratch(
        device, *native.activation_bytes(m, k, width, codes), needed
    )
    extension.quantize_down(
        **place,
        **quantizer_arguments(quantizer, codes),
        M=m,
        x=x.data_ptr(),
        x_stride=row_stride(x),
        x_dtype=kind,
        q=q,
        ascales=ascales,
        h=h,
    )
    outs = []
    for product in products:
        out = torch.empty((m, product["N"]), dtype=x.dtype, device=device)
        outs.append(out)
        extension.gemm_w4a4_up(
            **place,
            **product,
            M=m,
            q=q,
            ascales=ascales,
            h=h,
            out=out.data_ptr(),
            out_dtype=kind,
            workspace=work,
            workspace_size=needed,
        )
        h += 4 * _aligned_rank(product["R"])
    return outs


def _aligned_rank(rank: int) -> int:
    """Columns that a layer takes in a shared h, so that the next one's start at 16 bytes."""
    return (rank + 3) // 4 * 4


def _side_by_side(projections: list[Tensor]) -> Tensor:
    """(K, R) each -> (K, sum of aligned R), with columns of zeros between."""
    padded = []
    for down in projections:
        padded.append(down)
        gap = _aligned_rank(down.shape[1]) - down.shape[1]
        if gap:
            padded.append(down.new_zeros((down.shape[0], gap)))
    return torch.cat(padded, 1)


def mlp_w4a4(
    dtype: torch.dtype, x: Tensor, first: W4A4Params, second: W4A4Params, isa: int = 0
) -> Tensor:
    """For devices of which `native.fuses` is true, and layers of one act_bits."""
    device, (m, k), x = x.device, x.shape, dense_rows(x)
    codes = native.codes_of(device, first.act_bits)
    place, extension, kind = native.place(device, isa), native.on(device), DTYPES[x.dtype]
    first, second = layer_operands(first, dtype), layer_operands(second, dtype)
    (n, rank), (n2, rank2) = first.proj_up.shape, second.proj_up.shape
    up = product_arguments(first.product, codes, (first.act_unsigned, 0))
    last = product_arguments(second.product, codes, (second.act_unsigned, 0))
    fused_bytes = _workspace("gemm_w4a4_up_gelu_quantize_down", device, m, up, rank2)
    last_bytes = _workspace("gemm_w4a4_up", device, m, last, rank2)
    # The owners are read nowhere: they keep the scratch memory alive until the calls have returned.
    owner, (q, ascales, h, work) = native.scratch(
        device, *native.activation_bytes(m, k, rank, codes), max(fused_bytes, last_bytes)
    )
    owner2, (q2, ascales2, h2) = native.scratch(
        device, *native.activation_bytes(m, n, rank2, codes)
    )
    out = torch.empty((m, n2), dtype=x.dtype, device=device)
    tokens: Arguments = {"M": m, "q": q, "ascales": ascales, "h": h}
    tokens2: Arguments = {"q2": q2, "ascales2": ascales2, "h2": h2}
    extension.quantize_down(
        **place,
        **tokens,
        **quantizer_arguments(first.quantizer, codes),
        x=x.data_ptr(),
        x_stride=row_stride(x),
        x_dtype=kind,
    )
    extension.gemm_w4a4_up_gelu_quantize_down(
        **place,
        **tokens,
        **tokens2,
        **up,
        **_second_arguments(second.quantizer, x.dtype, codes),
        workspace=work,
        workspace_size=fused_bytes,
    )
    extension.gemm_w4a4_up(
        **place,
        **last,
        M=m,
        q=q2,
        ascales=ascales2,
        h=h2,
        out=out.data_ptr(),
        out_dtype=kind,
        workspace=work,
        workspace_size=last_bytes,
    )
    return out
