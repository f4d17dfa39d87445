"""Tensors into pointers: what stands between an op and the compiled module.

Makes operands dense and aligned (copied only where they are not), brings the floating-point
parameters of a layer to one dtype, allocates results and scratch with torch, so that torch's
allocator owns all memory and a CUDA graph can capture every op, and passes torch's current stream
or thread count. Nothing is kept between calls and nothing waits for the GPU.

One dtype a layer: the parameters' own where they agree; where they differ float32 on the CPU, which
holds each of them exactly, and x's on a GPU. Its kernels multiply 16-bit parameters, so a layer
with float32 or float64 among them is left to the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from . import native
from .reference import GROUP, hadamard64
from .reference_vq import index_bits

OPS = (
    "quantize_down",
    "gemm_w4a4_up",
    "gemm_w4a4_up_gelu_quantize_down",
    "gemv_w4a16",
    "gemm_w4a16",
    "gemm_vq",
)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HALVES = (torch.float16, torch.bfloat16)
ISAS = {"best": 0, "portable": 1, "avx2": 2, "avx512_vnni": 3}
PACKED, E4M3 = 0, 1
WIDE = torch.float8_e4m3fn
OLDEST_GPU = 75
GPU_LAYOUTS = ((8, 4), (6, 2), (8, 2))
"""(bits of an index, sub-vector length) that GPU kernels are made for: 2, 3 and 4 bits a weight."""


# ---- what the module can take --------------------------------------------------------------------


def serves(
    ops: Sequence[str], device: torch.device, dtype: torch.dtype, parameters: tuple
) -> tuple[torch.dtype | None, str]:
    """(dtype to bring a layer's parameters to, or None if the module cannot run these ops on such
    tensors; why).

    `parameters`: the dtypes of the layer's floating-point parameters, None for one that is absent.
    """
    module, why = native.module()
    if module is None:
        return None, why
    name = native.MODULE
    if device.type not in module.DEVICES:
        return (
            None,
            f"this {name} was built for {' and '.join(module.DEVICES)}, not for {device.type}",
        )
    if dtype not in DTYPES:
        return None, f"{name} computes in float32, float16 and bfloat16, not {dtype}"
    missing = [op for op in ops if not hasattr(module, op)]
    if missing:
        return None, f"this {name} lacks {' and '.join(missing)}"
    if device.type == "cuda":
        try:
            found = capability(device)
        # a driver older than the module's CUDA, or a GPU of another make behind torch's "cuda"
        except (RuntimeError, ValueError) as error:
            return None, f"{name} cannot use {device}: {error}"
        if found < OLDEST_GPU:
            return (
                None,
                f"{name} needs compute capability {OLDEST_GPU / 10}, and {device} has {found / 10}",
            )
    kinds = set(parameters) - {None}
    if device.type == "cpu":
        return (kinds.pop() if len(kinds) == 1 and kinds <= set(DTYPES) else torch.float32), why
    if not kinds <= set(HALVES):
        return (
            None,
            (
                f"{name}'s GPU kernels take parameters in float16 or bfloat16, not"
                f" {', '.join(sorted(map(str, kinds - set(HALVES))))}"
            ),
        )
    if len(kinds) > 1 and dtype not in HALVES:
        return None, f"{name}'s GPU kernels take parameters of one dtype, and these are mixed"
    return (kinds.pop() if len(kinds) == 1 else dtype), why


def route(op: str, device: torch.device, shape: tuple[int, int, int]) -> str:
    """The path that the module takes for (M, N, K) on a device, and why, in words."""
    path, reason = native.module()[0].route(op, capability(device), *shape)
    return f"{path} ({reason})" if reason else path


def capability(device: torch.device) -> int:
    """10 * major + minor of a GPU; 0 for the CPU."""
    return 0 if device.type == "cpu" else _gpu(_index(device))[0]


def fuses(device: torch.device) -> bool:
    """Whether an MLP runs through the fused op. It takes and gives packed codes; where the product
    reads another form faster (Hopper, whose fast product also has no such epilogue) two linears
    with a GELU between them are ahead on paper; not yet measured.
    """
    return device.type == "cpu" or _gpu(_index(device))[1] == PACKED


@functools.lru_cache(maxsize=64)
def _gpu(index: int) -> tuple[int, int]:
    """(capability, form of activation codes that its product reads fastest)."""
    module = native.module()[0]
    found = module.capability(index)
    return found, module.codes(found)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# ---- operands ------------------------------------------------------------------------------------


def _place(device: torch.device, isa: int) -> tuple[tuple[int, int, int, int], int, int]:
    """((device, stream, threads, isa), capability, form of codes) of a call."""
    if device.type == "cpu":
        return (-1, 0, torch.get_num_threads(), isa), 0, PACKED
    index = device.index
    return (index, _stream(index), 1, isa), *_gpu(index)


# What torch.compile's generated code calls; the public way makes a Stream object first, which takes
# a microsecond more.
_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)


def _dense(tensor: Tensor) -> Tensor:
    """Contiguous and aligned to 16 bytes: the tensor itself where it is so already."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def _as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tensor is None:
        return None
    return _dense(tensor if tensor.dtype is dtype else tensor.to(dtype))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _scratch(device: torch.device, *sizes: int) -> tuple[Tensor, list[int]]:
    """One allocation cut into pieces of so many bytes, each aligned to 256: (its owner, their
    addresses).
    """
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += (size + 255) & ~255
    owner = torch.empty(end + 255, dtype=torch.uint8, device=device)
    base = (owner.data_ptr() + 255) & ~255
    return owner, [base + start for start in starts]


def _scratch_of_activations(
    device: torch.device, m: int, k: int, rank: int, codes: int, workspace: int = 0
) -> tuple[Tensor, list[int]]:
    """Room for codes, ascales, h and a workspace."""
    return _scratch(
        device, m * k // (2 if codes == PACKED else 1), m * k // GROUP * 4, m * rank * 4, workspace
    )


# ---- ops, with the reference's arguments after the parameters' dtype -----------------------------


def quantize_down(
    dtype: torch.dtype,
    x: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    act_unsigned: bool,
    rotation: int,
    isa: int = 0,
    codes: int = PACKED,
):
    device, (m, k), rank = x.device, x.shape, proj_down.shape[1]
    place, _, _ = _place(device, isa)
    x, smooth, down = _dense(x), _as(smooth_factor, dtype), _as(proj_down, dtype)
    q = (
        torch.empty((m, k // 2), dtype=torch.int8, device=device)
        if codes == PACKED
        else torch.empty((m, k), dtype=WIDE, device=device)
    )
    ascales = torch.empty((k // GROUP, m), dtype=torch.float32, device=device)
    h = torch.empty((m, rank), dtype=torch.float32, device=device)
    native.module()[0].quantize_down(
        *place,
        m,
        k,
        rank,
        x.data_ptr(),
        DTYPES[x.dtype],
        smooth.data_ptr(),
        down.data_ptr(),
        DTYPES[dtype],
        act_unsigned,
        rotation != 0,
        codes,
        q.data_ptr(),
        ascales.data_ptr(),
        h.data_ptr(),
    )
    return q, ascales, h


def gemm_w4a4_up(
    dtype: torch.dtype,
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    act_unsigned: bool,
    out_dtype: torch.dtype,
    isa: int = 0,
) -> Tensor:
    device, m, (n, half), rank = q.device, q.shape[0], weight.shape, proj_up.shape[1]
    place, gpu, _ = _place(device, isa)
    q, ascales, h, weight = (
        _dense(q),
        _as(ascales, torch.float32),
        _as(h, torch.float32),
        _dense(weight),
    )
    scale, up, bias = _as(weight_scale, dtype), _as(proj_up, dtype), _as(bias, dtype)
    module, codes = native.module()[0], E4M3 if q.dtype is WIDE else PACKED
    needed = module.workspace_bytes("gemm_w4a4_up", gpu, m, n, 2 * half, rank, codes)
    workspace, (work,) = _scratch(device, needed)
    out = torch.empty(
        (m, n), dtype=out_dtype if out_dtype in DTYPES else torch.float32, device=device
    )
    module.gemm_w4a4_up(
        *place,
        m,
        n,
        2 * half,
        rank,
        codes,
        q.data_ptr(),
        act_unsigned,
        ascales.data_ptr(),
        h.data_ptr(),
        rank,
        weight.data_ptr(),
        scale.data_ptr(),
        up.data_ptr(),
        _address(bias),
        DTYPES[dtype],
        out.data_ptr(),
        DTYPES[out.dtype],
        work,
        needed,
    )
    return out.to(out_dtype)


def gemm_w4a4_up_gelu_quantize_down(
    dtype: torch.dtype,
    q: Tensor,
    ascales: Tensor,
    h: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    smooth_factor2: Tensor,
    proj_down2: Tensor,
    act_unsigned: bool,
    act_unsigned2: bool,
    rotation2: int,
    mid_dtype: torch.dtype,
    isa: int = 0,
):
    device, m, (n, half), rank, rank2 = (
        q.device,
        q.shape[0],
        weight.shape,
        proj_up.shape[1],
        proj_down2.shape[1],
    )
    place, gpu, _ = _place(device, isa)
    q, ascales, h, weight = (
        _dense(q),
        _as(ascales, torch.float32),
        _as(h, torch.float32),
        _dense(weight),
    )
    scale, up, bias = _as(weight_scale, dtype), _as(proj_up, dtype), _as(bias, dtype)
    smooth2, down2 = _as(smooth_factor2, dtype), _as(proj_down2, dtype)
    module = native.module()[0]
    needed = module.workspace_bytes(
        "gemm_w4a4_up_gelu_quantize_down", gpu, m, n, 2 * half, rank2, PACKED
    )
    workspace, (work,) = _scratch(device, needed)
    q2 = torch.empty((m, n // 2), dtype=torch.int8, device=device)
    ascales2 = torch.empty((n // GROUP, m), dtype=torch.float32, device=device)
    h2 = torch.empty((m, rank2), dtype=torch.float32, device=device)
    module.gemm_w4a4_up_gelu_quantize_down(
        *place,
        m,
        n,
        2 * half,
        rank,
        PACKED,
        q.data_ptr(),
        act_unsigned,
        ascales.data_ptr(),
        h.data_ptr(),
        rank,
        weight.data_ptr(),
        scale.data_ptr(),
        up.data_ptr(),
        _address(bias),
        DTYPES[dtype],
        DTYPES[mid_dtype],
        rank2,
        smooth2.data_ptr(),
        down2.data_ptr(),
        act_unsigned2,
        rotation2 != 0,
        PACKED,
        q2.data_ptr(),
        ascales2.data_ptr(),
        h2.data_ptr(),
        work,
        needed,
    )
    return q2, ascales2, h2


def w4a16(
    op: str,
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zeros: Tensor | None,
    bias: Tensor | None,
    isa: int = 0,
) -> Tensor:
    """`gemv_w4a16` or `gemm_w4a16`."""
    device, (m, k), n = x.device, x.shape, weight.shape[0]
    place, _, _ = _place(device, isa)
    x, weight, scale = _dense(x), _dense(weight), _as(weight_scale, dtype)
    zeros, bias = _as(weight_zeros, dtype), _as(bias, dtype)
    out = torch.empty((m, n), dtype=x.dtype, device=device)
    getattr(native.module()[0], op)(
        *place,
        m,
        n,
        k,
        x.data_ptr(),
        DTYPES[x.dtype],
        weight.data_ptr(),
        scale.data_ptr(),
        _address(zeros),
        _address(bias),
        DTYPES[dtype],
        out.data_ptr(),
    )
    return out


# ---- whole layers: activations stay in the form that the GPU's product reads fastest, in scratch
# memory -----------------


def linear_w4a4(
    dtype: torch.dtype,
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    smooth_factor: Tensor,
    proj_down: Tensor,
    proj_up: Tensor,
    bias: Tensor | None,
    act_unsigned: bool,
    rotation: int,
    isa: int = 0,
) -> Tensor:
    device, (m, k), n, rank = x.device, x.shape, weight.shape[0], proj_down.shape[1]
    place, gpu, codes = _place(device, isa)
    module, kind = native.module()[0], DTYPES[dtype]
    needed = module.workspace_bytes("gemm_w4a4_up", gpu, m, n, k, rank, codes)
    owner, (q, ascales, h, work) = _scratch_of_activations(device, m, k, rank, codes, needed)
    x, weight, smooth, down = (
        _dense(x),
        _dense(weight),
        _as(smooth_factor, dtype),
        _as(proj_down, dtype),
    )
    scale, up, bias = _as(weight_scale, dtype), _as(proj_up, dtype), _as(bias, dtype)
    out = torch.empty((m, n), dtype=x.dtype, device=device)
    module.quantize_down(
        *place,
        m,
        k,
        rank,
        x.data_ptr(),
        DTYPES[x.dtype],
        smooth.data_ptr(),
        down.data_ptr(),
        kind,
        act_unsigned,
        rotation != 0,
        codes,
        q,
        ascales,
        h,
    )
    module.gemm_w4a4_up(
        *place,
        m,
        n,
        k,
        rank,
        codes,
        q,
        act_unsigned,
        ascales,
        h,
        rank,
        weight.data_ptr(),
        scale.data_ptr(),
        up.data_ptr(),
        _address(bias),
        kind,
        out.data_ptr(),
        DTYPES[x.dtype],
        work,
        needed,
    )
    return out


def linear_w4a4_grouped(
    dtype: torch.dtype,
    x: Tensor,
    smooth_factor: Tensor,
    weight: Sequence[Tensor],
    weight_scale: Sequence[Tensor],
    proj_down: Sequence[Tensor],
    proj_up: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    act_unsigned: bool,
    rotation: int,
    isa: int = 0,
) -> list[Tensor]:
    device, (m, k) = x.device, x.shape
    place, gpu, codes = _place(device, isa)
    module, kind = native.module()[0], DTYPES[dtype]
    x, smooth, down = (
        _dense(x),
        _as(smooth_factor, dtype),
        _side_by_side([_as(d, dtype) for d in proj_down]),
    )
    width = down.shape[1]
    needed = max(
        module.workspace_bytes("gemm_w4a4_up", gpu, m, len(w), k, d.shape[1], codes)
        for w, d in zip(weight, proj_down, strict=True)
    )
    owner, (q, ascales, h, work) = _scratch_of_activations(device, m, k, width, codes, needed)
    module.quantize_down(
        *place,
        m,
        k,
        width,
        x.data_ptr(),
        DTYPES[x.dtype],
        smooth.data_ptr(),
        down.data_ptr(),
        kind,
        act_unsigned,
        rotation != 0,
        codes,
        q,
        ascales,
        h,
    )
    outs = []
    for w, scale, up, b in zip(weight, weight_scale, proj_up, bias, strict=True):
        (n, rank), w, scale, up, b = (
            up.shape,
            _dense(w),
            _as(scale, dtype),
            _as(up, dtype),
            _as(b, dtype),
        )
        outs.append(torch.empty((m, n), dtype=x.dtype, device=device))
        module.gemm_w4a4_up(
            *place,
            m,
            n,
            k,
            rank,
            codes,
            q,
            act_unsigned,
            ascales,
            h,
            width,
            w.data_ptr(),
            scale.data_ptr(),
            up.data_ptr(),
            _address(b),
            kind,
            outs[-1].data_ptr(),
            DTYPES[x.dtype],
            work,
            needed,
        )
        h += 4 * _aligned_rank(rank)
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
    dtype: torch.dtype,
    x: Tensor,
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    flags: tuple[bool, int],
    flags2: tuple[bool, int],
    isa: int = 0,
) -> Tensor:
    """`first`, `second`: weight, weight_scale, smooth_factor, proj_down, proj_up, bias. For devices
    of which `fuses` is true.
    """
    place, gpu, codes = _place(x.device, isa)
    module, kind, out_kind = native.module()[0], DTYPES[dtype], DTYPES[x.dtype]
    weight, weight2 = _dense(first[0]), _dense(second[0])
    scale, smooth, down, up, bias = (_as(tensor, dtype) for tensor in first[1:])
    scale2, smooth2, down2, up2, bias2 = (_as(tensor, dtype) for tensor in second[1:])
    (m, k), (n, rank), (n2, rank2), x = x.shape, up.shape, up2.shape, _dense(x)
    fused = module.workspace_bytes("gemm_w4a4_up_gelu_quantize_down", gpu, m, n, k, rank2, codes)
    last = module.workspace_bytes("gemm_w4a4_up", gpu, m, n2, n, rank2, codes)
    owner, (q, ascales, h, work) = _scratch_of_activations(
        x.device, m, k, rank, codes, max(fused, last)
    )
    owner2, (q2, ascales2, h2, _) = _scratch_of_activations(x.device, m, n, rank2, codes)
    out = torch.empty((m, n2), dtype=x.dtype, device=x.device)
    module.quantize_down(
        *place,
        m,
        k,
        rank,
        x.data_ptr(),
        out_kind,
        smooth.data_ptr(),
        down.data_ptr(),
        kind,
        flags[0],
        flags[1] != 0,
        codes,
        q,
        ascales,
        h,
    )
    module.gemm_w4a4_up_gelu_quantize_down(
        *place,
        m,
        n,
        k,
        rank,
        codes,
        q,
        flags[0],
        ascales,
        h,
        rank,
        weight.data_ptr(),
        scale.data_ptr(),
        up.data_ptr(),
        _address(bias),
        kind,
        out_kind,
        rank2,
        smooth2.data_ptr(),
        down2.data_ptr(),
        flags2[0],
        flags2[1] != 0,
        codes,
        q2,
        ascales2,
        h2,
        work,
        fused,
    )
    module.gemm_w4a4_up(
        *place,
        m,
        n2,
        n,
        rank2,
        codes,
        q2,
        flags2[0],
        ascales2,
        h2,
        rank2,
        weight2.data_ptr(),
        scale2.data_ptr(),
        up2.data_ptr(),
        _address(bias2),
        kind,
        out.data_ptr(),
        out_kind,
        work,
        last,
    )
    return out


# ---- codebook weights ----------------------------------------------------------------------------


def has_vq_layout(device: torch.device, k: int, codebook: Tensor) -> bool:
    """Whether compiled code exists for K columns and this codebook (C, D)."""
    bits, vector = index_bits(codebook), codebook.shape[1]
    if device.type == "cpu":
        return codebook.dtype in DTYPES and bits <= 12 and vector in (1, 2, 4, 8)
    return codebook.dtype == torch.float16 and k % GROUP == 0 and (bits, vector) in GPU_LAYOUTS


def gemm_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    isa: int = 0,
) -> Tensor:
    """`addend` (M, N), in any of the three dtypes, is added before the result is rounded to
    `out_dtype`, by default x's.
    """
    device, (m, k), n = x.device, x.shape, indices.shape[0]
    place, _, _ = _place(device, isa)
    x, indices, codebook = _dense(x), _dense(indices), _dense(codebook)
    kinds = {tensor.dtype for tensor in (scale, bias) if tensor is not None}
    kind = kinds.pop() if len(kinds) == 1 and kinds <= set(DTYPES) else torch.float32
    scale, bias, addend = (
        _as(scale, kind),
        _as(bias, kind),
        None if addend is None else _dense(addend),
    )
    out = torch.empty((m, n), dtype=out_dtype or x.dtype, device=device)
    native.module()[0].gemm_vq(
        *place,
        m,
        n,
        k,
        index_bits(codebook),
        codebook.shape[1],
        x.data_ptr(),
        DTYPES[x.dtype],
        indices.data_ptr(),
        codebook.data_ptr(),
        DTYPES[codebook.dtype],
        _address(scale),
        _address(bias),
        DTYPES[kind],
        _address(addend),
        DTYPES[torch.float32 if addend is None else addend.dtype],
        out.data_ptr(),
        DTYPES[out.dtype],
    )
    return out


def linear_vq(
    x: Tensor,
    indices: Tensor,
    codebook: Tensor,
    scale: Tensor | None,
    proj_down: Tensor | None,
    proj_up: Tensor | None,
    bias: Tensor | None,
    rotation: int,
    isa: int = 0,
) -> Tensor:
    """The low-rank branch and the rotation are torch's products: 2 R / K and 64 / N of the layer's.
    On the CPU both stay in float32.
    """
    compute = torch.float32 if x.device.type == "cpu" else x.dtype
    addend, act = None, x
    if proj_down is not None and proj_down.shape[1]:
        addend = (x.to(compute) @ proj_down.to(compute)) @ proj_up.to(compute).t()
    if rotation:
        act = hadamard64(x.to(compute))
    return gemm_vq(act, indices, codebook, scale, bias, addend, x.dtype, isa)
