"""A stand-in for the compiled module: its interface of bare pointers over the reference, so that
flattening is tested without a compiler.
"""

import ctypes
import math
import sys

import torch

from nibble.kernels import reference
from nibble.kernels.backends import native
from nibble.kernels.backends.native import DTYPES
from nibble.kernels.reference import vq as reference_vq
from nibble.quant.weights.packing import pack_int4, unpack_int4

NAMES = {code: dtype for dtype, code in DTYPES.items()}
E4M3 = torch.float8_e4m3fn


def at(address: int, dtype: torch.dtype, *shape: int) -> torch.Tensor | None:
    """The memory at an address as a tensor; None for null. Results are written by copy_ into it."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    if address == 0:
        return None
    assert address % 16 == 0
    return torch.frombuffer(
        (ctypes.c_char * (count * dtype.itemsize)).from_address(address), dtype=dtype
    ).view(shape)


def rows_at(address: int, dtype: torch.dtype, m: int, k: int, stride: int) -> torch.Tensor:
    """(m, k) whose rows lie apart; the last one ends after k, not after the stride."""
    if not m or not k:
        return torch.empty(m, k, dtype=dtype)
    return at(address, dtype, (m - 1) * stride + k).as_strided((m, k), (stride, 1))


class StandIn:
    """Counts its calls in `calls`; `wide` makes activation codes 8-bit floats, as on Hopper."""

    ABI, __version__, DEVICES = native.ABI, "0-stand-in", ("cpu",)
    kind, name = "extension", native.MODULE
    WORKSPACE = 640
    BITS = {native.PACKED: 4, native.E4M3: 4, native.INT8: 8}

    def __init__(self, wide: bool = False):
        self.wide, self.calls = wide, []

    def codes(self, capability):
        return int(self.wide)

    def route(self, op, capability, M, N, K):
        return "plain torch", f"M={M}"

    def workspace_bytes(self, op, capability, M, N, K, R, codes=0):
        return self.WORKSPACE

    def _write_codes(self, address, codes, q, m, k, unsigned):
        if codes == native.INT8:
            at(address, torch.int8, m, k).copy_(q)
        elif codes:
            at(address, E4M3, m, k).copy_(unpack_int4(q, not unsigned))
        else:
            at(address, torch.int8, m, k // 2).copy_(q)

    def _read_codes(self, address, codes, m, k):
        if codes == native.E4M3:
            return pack_int4(at(address, E4M3, m, k).to(torch.int8))
        return at(address, torch.int8, m, k if codes else k // 2)

    def quantize_down(
        self,
        *,
        device,
        stream,
        threads,
        isa,
        M,
        K,
        R,
        x,
        x_stride,
        x_dtype,
        smooth,
        proj_down,
        param_dtype,
        act_unsigned,
        rotate,
        unsigned_from,
        codes,
        q,
        ascales,
        h,
    ):
        self.calls.append("quantize_down")
        assert (device, stream, threads) == (-1, 0, torch.get_num_threads())
        kind = NAMES[param_dtype]
        assert not self.wide or not unsigned_from
        found = reference.quantize_down(
            rows_at(x, NAMES[x_dtype], M, K, x_stride),
            at(smooth, kind, K),
            at(proj_down, kind, K, R),
            act_unsigned and not unsigned_from,
            64 * rotate,
            unsigned_from,
            self.BITS[codes],
        )
        self._write_codes(q, codes, found[0], M, K, act_unsigned)
        at(ascales, torch.float32, K // 64, M).copy_(found[1])
        at(h, torch.float32, M, R).copy_(found[2])

    def _product(
        self,
        M,
        N,
        K,
        R,
        codes,
        q,
        act_unsigned,
        ascales,
        h,
        h_stride,
        weight,
        weight_scale,
        proj_up,
        bias,
        kind,
    ):
        return (
            self._read_codes(q, codes, M, K),
            at(ascales, torch.float32, K // 64, M),
            rows_at(h, torch.float32, M, R, h_stride),
            at(weight, torch.int8, N, K // 2),
            at(weight_scale, kind, K // 64, N),
            at(proj_up, kind, N, R),
            at(bias, kind, N) if bias else None,
        )

    def gemm_w4a4_up(
        self,
        *,
        device,
        stream,
        threads,
        isa,
        M,
        N,
        K,
        R,
        codes,
        q,
        act_unsigned,
        unsigned_from,
        ascales,
        h,
        h_stride,
        weight,
        weight_scale,
        proj_up,
        bias,
        param_dtype,
        out,
        out_dtype,
        workspace,
        workspace_size,
    ):
        self.calls.append("gemm_w4a4_up")
        assert (
            workspace_size == self.WORKSPACE
            and at(workspace, torch.uint8, workspace_size).fill_(255) is not None
        )
        arguments = self._product(
            M,
            N,
            K,
            R,
            codes,
            q,
            act_unsigned,
            ascales,
            h,
            h_stride,
            weight,
            weight_scale,
            proj_up,
            bias,
            NAMES[param_dtype],
        )
        signs = (act_unsigned and not unsigned_from, unsigned_from, self.BITS[codes])
        at(out, NAMES[out_dtype], M, N).copy_(reference.gemm_w4a4_up(*arguments, *signs))

    def linear_w4a4(
        self,
        *,
        x,
        x_stride,
        x_dtype,
        smooth,
        proj_down,
        rotate,
        out,
        scratch=0,
        scratch_size=0,
        **rest,
    ):
        m, k, rank = rest["M"], rest["K"], rest["R"]
        q, ascales, h, work = (
            torch.empty(max(size, 1), dtype=torch.uint8)
            for size in (m * k, m * k // 16, m * rank * 4, self.WORKSPACE)
        )
        place = {name: rest.pop(name) for name in ("device", "stream", "threads", "isa")}
        between = {"q": q.data_ptr(), "ascales": ascales.data_ptr(), "h": h.data_ptr()}
        names = ("M", "K", "R", "param_dtype", "act_unsigned", "unsigned_from", "codes")
        shared = {name: rest[name] for name in names}
        self.quantize_down(
            **place,
            **shared,
            **between,
            x=x,
            x_stride=x_stride,
            x_dtype=x_dtype,
            smooth=smooth,
            proj_down=proj_down,
            rotate=rotate,
        )
        self.gemm_w4a4_up(
            **place,
            **rest,
            **between,
            h_stride=rank,
            out=out,
            out_dtype=x_dtype,
            workspace=work.data_ptr(),
            workspace_size=self.WORKSPACE,
        )

    def gemm_w4a4_up_gelu_quantize_down(
        self,
        *,
        device,
        stream,
        threads,
        isa,
        M,
        N,
        K,
        R,
        codes,
        q,
        act_unsigned,
        unsigned_from,
        ascales,
        h,
        h_stride,
        weight,
        weight_scale,
        proj_up,
        bias,
        param_dtype,
        mid_dtype,
        R2,
        smooth2,
        proj_down2,
        act_unsigned2,
        rotate2,
        codes2,
        q2,
        ascales2,
        h2,
        workspace,
        workspace_size,
    ):
        self.calls.append("gemm_w4a4_up_gelu_quantize_down")
        kind = NAMES[param_dtype]
        arguments = self._product(
            M,
            N,
            K,
            R,
            codes,
            q,
            act_unsigned,
            ascales,
            h,
            h_stride,
            weight,
            weight_scale,
            proj_up,
            bias,
            kind,
        )
        second = (
            at(smooth2, kind, N),
            at(proj_down2, kind, N, R2),
            act_unsigned,
            act_unsigned2,
            64 * rotate2,
            NAMES[mid_dtype],
            *(self.BITS[codes], self.BITS[codes2]),
        )
        found = reference.gemm_w4a4_up_gelu_quantize_down(*arguments, *second)
        self._write_codes(q2, codes2, found[0], M, N, act_unsigned2)
        at(ascales2, torch.float32, N // 64, M).copy_(found[1])
        at(h2, torch.float32, M, R2).copy_(found[2])

    def _w4a16(
        self,
        *,
        device,
        stream,
        threads,
        isa,
        M,
        N,
        K,
        x,
        x_dtype,
        weight,
        weight_scale,
        weight_zeros,
        bias,
        param_dtype,
        out,
    ):
        kind, groups = NAMES[param_dtype], K // 64
        zeros = at(weight_zeros, kind, groups, N) if weight_zeros else None
        y = reference.gemv_w4a16(
            at(x, NAMES[x_dtype], M, K),
            at(weight, torch.int8, N, K // 2),
            at(weight_scale, kind, groups, N),
            zeros,
            at(bias, kind, N) if bias else None,
        )
        at(out, NAMES[x_dtype], M, N).copy_(y)

    def gemv_w4a16(self, **arguments):
        self.calls.append("gemv_w4a16")
        self._w4a16(**arguments)

    def gemm_w4a16(self, **arguments):
        self.calls.append("gemm_w4a16")
        self._w4a16(**arguments)

    def gemm_vq(
        self,
        *,
        device,
        stream,
        threads,
        isa,
        M,
        N,
        K,
        bits,
        vector,
        x,
        x_dtype,
        indices,
        codebook,
        codebook_dtype,
        scale,
        bias,
        param_dtype,
        addend,
        addend_dtype,
        out,
        out_dtype,
    ):
        self.calls.append("gemm_vq")
        kind = NAMES[param_dtype]
        words = at(codebook, NAMES[codebook_dtype], 1 << bits, vector)
        scales, added = (
            at(scale, kind, N) if scale else None,
            (at(addend, NAMES[addend_dtype], M, N) if addend else None),
        )
        y = reference_vq.gemm_vq(
            at(x, NAMES[x_dtype], M, K).float(),
            at(indices, torch.uint8, N, K // vector * bits // 8),
            words,
            scales,
            at(bias, kind, N) if bias else None,
        )
        at(out, NAMES[out_dtype], M, N).copy_(y if added is None else y + added)


def install(monkeypatch, module: StandIn) -> None:
    """In place of the extension; it takes keywords, not a call's bytes."""
    monkeypatch.setitem(sys.modules, native.MODULE, module)
    monkeypatch.setattr(native, "Compiled", lambda door, kind, name: door)


def install_nothing(monkeypatch) -> None:
    """As if nothing were compiled for the CPU."""
    monkeypatch.setitem(sys.modules, native.MODULE, None)
    monkeypatch.setenv("NIBBLE_LIBRARY", "0")
