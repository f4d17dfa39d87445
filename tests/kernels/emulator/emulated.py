"""The emulated kernels as functions of torch tensors, with the reference's argument names and a
GPU's `capability`.

Results come in buffers filled with NaN bits beforehand, so an element that a kernel forgot is seen.
"""

from __future__ import annotations

import ctypes
import functools
import os

import torch
from torch import Tensor

from nibble.kernels.backends.cubins.structs import (
    W4A16,
    GemmNvfp4Up,
    GemmVQ,
    GemmW4A4Up,
    GemmW4A4UpGeluQuantizeDown,
    LinearW4A8,
    QuantizeDown,
    QuantizeNvfp4Down,
)

from . import build

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
PACKED, E4M3 = 0, 1

_size, _int = ctypes.c_int64, ctypes.c_int


class Target(ctypes.Structure):
    """Where an op runs."""

    _fields_ = [
        ("device", _int),
        ("stream", ctypes.c_void_p),
        ("capability", _int),
        ("threads", _int),
        ("isa", _int),
        ("waits", ctypes.c_bool),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The emulated kernels, built if need be, with their signatures declared. NIBBLE_SANITIZED
    names files to have alone, with sanitizers.
    """
    return declare(build.load(os.environ.get("NIBBLE_SANITIZED", "").split()))


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Gives the entry points their types, and checks that both sides lay their structs out
    alike.
    """
    lib.emulated_size.restype = lib.emulated_workspace_bytes.restype = ctypes.c_size_t
    lib.emulated_workspace_bytes.argtypes = [ctypes.c_char_p, *(_int, _int), *(_size,) * 4]
    lib.emulated_route.argtypes, lib.emulated_route.restype = (
        [ctypes.c_char_p, _int, _size, _size, _size],
        ctypes.c_char_p,
    )
    ops = {
        "quantize_down": QuantizeDown,
        "gemm_w4a4_up": GemmW4A4Up,
        "gemm_w4a4_up_gelu_quantize_down": GemmW4A4UpGeluQuantizeDown,
        "gemv_w4a16": W4A16,
        "gemm_w4a16": W4A16,
        "gemm_vq": GemmVQ,
        "linear_w4a8": LinearW4A8,
        "quantize_nvfp4_down": QuantizeNvfp4Down,
        "gemm_nvfp4_up": GemmNvfp4Up,
    }
    for op, struct in ops.items():
        entry = getattr(lib, f"emulated_{op}")
        entry.argtypes, entry.restype = (
            [ctypes.POINTER(struct), ctypes.POINTER(Target)],
            ctypes.c_char_p,
        )
    for struct in (Target, *ops.values()):
        assert ctypes.sizeof(struct) == lib.emulated_size(struct.__name__.encode()), (
            f"{struct.__name__} differs from nibble.h"
        )
    return lib


class Failed(RuntimeError):
    """What the kernel, its launcher or the emulator threw."""


def _call(op: str, arguments: ctypes.Structure, capability: int) -> None:
    error = getattr(library(), f"emulated_{op}")(
        ctypes.byref(arguments), ctypes.byref(Target(device=0, capability=capability, threads=1))
    )
    if error is not None:
        raise Failed(error.decode())


def seed(value: int) -> None:
    """Another order of warps."""
    library().emulated_seed(value)


def route(op: str, capability: int, m: int, n: int, k: int) -> str:
    """ "path: reason" of the router's choice."""
    return library().emulated_route(op.encode(), capability, m, n, k).decode()


def codes(capability: int) -> int:
    """PACKED or E4M3: the activation codes that the router wants for this GPU."""
    return library().emulated_codes(capability)


def _workspace(
    op: str, capability: int, m: int, n: int, k: int, r: int, form: int = PACKED
) -> Tensor | None:
    size = library().emulated_workspace_bytes(op.encode(), form, capability, m, n, k, r)
    return torch.full((size,), -1, dtype=torch.int8) if size else None


def _at(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.numel() == 0 or tensor.data_ptr() % 16 == 0, (
        "the bindings refuse unaligned tensors"
    )
    return None if tensor is None else tensor.data_ptr()


def _unset(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, -1 if dtype == torch.int8 else float("nan"), dtype=dtype)


def quantize_down(
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool = False,
    rotation: int = 0,
    unsigned_from: int = 0,
    *,
    capability: int,
    form: int = PACKED,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q, ascales, h); q is (M, K/2) int8, or (M, K) int8 holding the bits of e4m3 for
    form=E4M3. Rows of x may lie apart.
    """
    (m, k), r = x.shape, proj_down.shape[1]
    smooth_factor, proj_down = smooth_factor.contiguous(), proj_down.contiguous()
    x = x if x.stride(1) == 1 and x.stride(0) >= k else x.contiguous()
    q = _unset(m, k if form else k // 2, dtype=torch.int8)
    ascales, h = _unset(k // 64, m, dtype=torch.float32), _unset(m, r, dtype=torch.float32)
    _call(
        "quantize_down",
        QuantizeDown(
            m,
            k,
            r,
            _at(x),
            x.stride(0),
            DTYPES[x.dtype],
            _at(smooth_factor),
            _at(proj_down),
            DTYPES[proj_down.dtype],
            act_unsigned or unsigned_from > 0,
            bool(rotation),
            unsigned_from,
            form,
            _at(q),
            _at(ascales),
            _at(h),
        ),
        capability,
    )
    return q, ascales, h


def _product(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    act_unsigned: bool,
    form: int,
) -> GemmW4A4Up:
    """Everything but the result. `h` may be a slice of a wider one: its row stride is passed on."""
    m, (n, half) = q.shape[0], weight.shape
    stride = h.stride(0) if h.numel() else h.shape[1]
    return GemmW4A4Up(
        m,
        n,
        2 * half,
        proj_up.shape[1],
        form,
        _at(q),
        act_unsigned,
        0,
        _at(ascales),
        _at(h),
        stride,
        _at(weight),
        _at(weight_scale),
        _at(proj_up),
        _at(bias),
        DTYPES[weight_scale.dtype],
    )


def gemm_w4a4_up(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None = None,
    act_unsigned: bool = False,
    out_dtype: torch.dtype = torch.float32,
    unsigned_from: int = 0,
    *,
    capability: int,
    form: int = PACKED,
) -> Tensor:
    """(M, N) in `out_dtype`. Tensors must be contiguous (h: its rows)."""
    signs = act_unsigned or unsigned_from > 0
    arguments = _product(q, ascales, h, weight, weight_scale, proj_up, bias, signs, form)
    arguments.unsigned_from = unsigned_from
    out = _unset(arguments.M, arguments.N, dtype=out_dtype)
    workspace = _workspace(
        "gemm_w4a4_up", capability, arguments.M, arguments.N, arguments.K, arguments.R, form
    )
    arguments.out, arguments.out_dtype, arguments.workspace = (
        _at(out),
        DTYPES[out_dtype],
        _at(workspace),
    )
    _call("gemm_w4a4_up", arguments, capability)
    return out


def gemm_w4a4_up_gelu_quantize_down(
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    act_unsigned: bool,
    smooth2: Tensor,
    proj_down2: Tensor,
    act_unsigned2: bool,
    rotation2: int,
    mid_dtype: torch.dtype,
    *,
    capability: int,
    form: int = PACKED,
    form2: int = PACKED,
) -> tuple[Tensor, Tensor, Tensor]:
    """(q2, ascales2, h2) of the next layer."""
    op = "gemm_w4a4_up_gelu_quantize_down"
    first = _product(q, ascales, h, weight, weight_scale, proj_up, bias, act_unsigned, form)
    first.out_dtype = DTYPES[mid_dtype]
    m, n, r2 = first.M, first.N, proj_down2.shape[1]
    q2 = _unset(m, n if form2 else n // 2, dtype=torch.int8)
    ascales2, h2 = _unset(n // 64, m, dtype=torch.float32), _unset(m, r2, dtype=torch.float32)
    workspace = _workspace(op, capability, m, n, first.K, r2, form)
    _call(
        op,
        GemmW4A4UpGeluQuantizeDown(
            first,
            r2,
            _at(smooth2),
            _at(proj_down2),
            act_unsigned2,
            bool(rotation2),
            form2,
            _at(q2),
            _at(ascales2),
            _at(h2),
            _at(workspace),
        ),
        capability,
    )
    return q2, ascales2, h2


def w4a16(
    op: str,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    capability: int,
) -> Tensor:
    """`op` is "gemv_w4a16" or "gemm_w4a16". (M, N) in x.dtype."""
    (m, k), n = x.shape, weight.shape[0]
    out = _unset(m, n, dtype=x.dtype)
    _call(
        op,
        W4A16(
            m,
            n,
            k,
            _at(x),
            DTYPES[x.dtype],
            _at(weight),
            _at(weight_scale),
            _at(weight_zeros),
            _at(bias),
            DTYPES[weight_scale.dtype],
            _at(out),
        ),
        capability,
    )
    return out


def gemm_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    addend: Tensor | None = None,
    *,
    capability: int,
) -> Tensor:
    """(M, N) in x.dtype. Scale and bias are of one dtype."""
    (m, k), n, (words, vector) = x.shape, indices.shape[0], codebook.shape
    out = _unset(m, n, dtype=x.dtype)
    kind = next((DTYPES[tensor.dtype] for tensor in (scale, bias) if tensor is not None), 0)
    _call(
        "gemm_vq",
        GemmVQ(
            m,
            n,
            k,
            words.bit_length() - 1,
            vector,
            _at(x),
            DTYPES[x.dtype],
            _at(indices),
            _at(codebook),
            DTYPES[codebook.dtype],
            _at(scale),
            _at(bias),
            kind,
            _at(addend),
            0 if addend is None else DTYPES[addend.dtype],
            _at(out),
            DTYPES[x.dtype],
        ),
        capability,
    )
    return out
