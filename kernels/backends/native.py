"""The seam for compiled kernels: which module serves a device, what it can take, and tensors made
ready for it.

Three modules have one interface: the extension `nibble_kernels`, found if installed, never
required, for the CPU and, where it was built with nvcc, for GPUs; where it is not installed the
package's C library for the CPU (`cpu_library`); and `cubins`, for GPUs that the extension does not
serve.

A module takes bare pointers and sizes by name, knows no torch, and serves any torch. It offers
`ABI` (an integer, equal to the one here), `__version__`, `DEVICES` (a tuple such as ("cpu",
"cuda")), the ops under their own names, and answers about them (`capability`, `codes`, `route`,
`workspace_bytes`, `cpu_isas`, `build_info`).

The files native_*.py flatten tensors for it: operands are dense and aligned (copied only where they
are not), the floating-point parameters of a layer are brought to one dtype, results and scratch are
allocated with torch, so that torch's allocator owns all memory and a CUDA graph can capture every
op, and torch's current stream or thread count is passed. Nothing waits for the GPU.

One dtype a layer: the parameters' own where they agree; where they differ float32 on the CPU, which
holds each of them exactly, and x's on a GPU. Its kernels multiply 16-bit parameters, so a layer
with float32 or float64 among them is left to the reference.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..optional import optional
from ..reference import GROUP
from . import cpu_library, cubins
from .compiled import Compiled

MODULE = "nibble_kernels"
ABI = 8
OPS = (
    "quantize_down",
    "gemm_w4a4_up",
    "gemm_w4a4_up_gelu_quantize_down",
    "gemv_w4a16",
    "gemm_w4a16",
    "gemm_vq",
    "linear_w4a8",
)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
HALVES = (torch.float16, torch.bfloat16)
ISAS = {"best": 0, "portable": 1, "avx2": 2, "avx512_vnni": 3}
PACKED = 0
"""Activation codes as two nibbles a byte: the public form."""
E4M3 = 1
"""Activation codes as 8-bit floats: between compiled ops on Hopper."""
WIDE = torch.float8_e4m3fn
INT8 = 2
"""Activation codes of 8 bits, a byte each."""
ACT_BITS = (4, 8)
"""Bits of the activations that the W4A4 ops take."""
OLDEST_GPU = 75
INT8_PRODUCTS = ("gemm_w4a4_up", "gemm_w4a4_up_gelu_quantize_down", "linear_w4a8")
NVFP4_OPS = ("quantize_nvfp4_down", "gemm_nvfp4_up")
"""For GPUs that multiply 4-bit floats by mma.sync: compute capability 12.0 and 12.1. A CPU computes
the formula.
"""
WITHOUT_INT8 = (103,)
"""Compute capabilities whose 8-bit integer products, which W4A8 runs through everywhere and W4A4
from Blackwell on, are slower than 16-bit ones: B300.
"""
ALIGNMENT = 16
"""Bytes that kernels load and store at once."""
WIDEST = 2**26
"""Elements that rows of x may lie apart."""

log = logging.getLogger("nibble")


# ---- the module ----------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def module() -> tuple[Any, str]:
    """What is compiled for the CPU, the extension or else the package's library, or None, and the
    reason in one sentence. Looked for once, and logged once, in one line.
    """
    found, why = optional(MODULE)
    if found is not None:
        if getattr(found, "ABI", None) == ABI:
            words = f"{MODULE} {found.__version__} is installed"
            return Compiled(found, "extension", MODULE), words
        why = f"{MODULE} has interface {getattr(found, 'ABI', None)} and this version needs {ABI}"
    try:
        library = cpu_library.load(ABI)
    except cpu_library.Unavailable as error:
        why = f"{why}; {error}"
        log.info(
            "%s: 4-bit layers on the CPU run in plain torch, with the same numbers. With a C++"
            " compiler `python ComfyUI-Nibble libraries` or `pip install ./kernels` makes them"
            " fast.",
            why,
        )
        return None, why
    log.info("4-bit layers on cpu: compiled kernels (the package's CPU library; %s)", why)
    words = f"the package's CPU library {library.__version__} is used; {why}"
    return Compiled(library, "library", "CPU library"), words


@functools.lru_cache(maxsize=64)
def serving(device: torch.device) -> tuple[Any, str]:
    """The module that serves a device, or None, and the reason in one sentence. One that serves a
    GPU is logged, once a device; what is used where none does, `choose` logs.
    """
    extension, why = module()
    if extension is not None and device.type in extension.DEVICES:
        if device.type == "cpu":
            return extension, why
        found, why = _usable(extension, device, why)
    elif device.type == "cuda":
        found, why_not = _cubins(device)
        built_without = f"this {MODULE} was built for cpu, not for cuda; {why_not}"
        has_extension = extension is not None and extension.kind == "extension"
        why = built_without if found is None and has_extension else why_not
    elif extension is None:
        return None, why
    else:
        built = " and ".join(extension.DEVICES)
        return None, f"this {extension.name} was built for {built}, not for {device.type}"
    if found is not None:
        log.info("4-bit layers on %s: compiled kernels (%s)", device, why)
    return found, why


def _usable(extension: Any, device: torch.device, why: str) -> tuple[Any, str]:
    """The extension, asked whether it has code for a GPU; else cubins."""
    try:
        extension.capability(index_of(device))
        return extension, why
    # a driver older than the module's CUDA, or a GPU of another make behind torch's "cuda"
    except (RuntimeError, ValueError) as error:
        found, reason = _cubins(device)
        return found, f"{MODULE} cannot use {device}: {error}; {reason}"


def _cubins(device: torch.device) -> tuple[Any, str]:
    if torch.version.cuda is None:
        make = "an AMD GPU" if torch.version.hip else "not there: this torch was built without CUDA"
        return None, f"{device} is {make}"
    try:
        found = cubins.module()
        return found, f"cubins: {found.on(index_of(device)).origin}"
    except cubins.ERRORS as error:
        return None, str(error)


def on(device: torch.device) -> Any:
    """The module of a device, for whoever has asked `serves` before."""
    found = serving(device)[0]
    assert found is not None
    return found


def index_of(device: torch.device) -> int:
    """A GPU's number, the current one's where the device names none."""
    return torch.cuda.current_device() if device.index is None else device.index


# ---- what it can take ----------------------------------------------------------------------------


def serves(
    ops: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    parameters: tuple,
    act_bits: int = 4,
) -> tuple[torch.dtype | None, str]:
    """(dtype to bring a layer's parameters to, or None if the module cannot run these ops on such
    tensors; why).

    `parameters`: the dtypes of the layer's floating-point parameters, None for one that is absent.
    act_bits: of the activations that a W4A4 op quantizes.
    """
    serves_device, why = serving(device)
    if serves_device is None:
        return None, why
    if act_bits not in ACT_BITS:
        return None, f"compiled kernels have no activations of {act_bits} bits"
    if dtype not in DTYPES:
        return None, f"compiled kernels compute in float32, float16 and bfloat16, not {dtype}"
    missing = [op for op in ops if not hasattr(serves_device, op)]
    if missing:
        return None, f"this {MODULE} lacks {' and '.join(missing)}"
    if device.type == "cuda" and capability(device) < OLDEST_GPU:
        return (
            None,
            f"compiled kernels need compute capability {OLDEST_GPU / 10}, and {device} has"
            f" {capability(device) / 10}",
        )
    if capability(device) in WITHOUT_INT8 and set(ops) & set(INT8_PRODUCTS):
        has = capability(device) / 10
        return None, f"{device} has compute capability {has}, with few 8-bit integer products"
    if set(ops) & set(NVFP4_OPS) and capability(device) // 10 != 12:
        return None, "compiled kernels of 4-bit floats are for compute capability 12.0 and 12.1"
    kinds = set(parameters) - {None}
    if device.type == "cpu":
        return (kinds.pop() if len(kinds) == 1 and kinds <= set(DTYPES) else torch.float32), why
    if not kinds <= set(HALVES):
        return (
            None,
            (
                "GPU kernels take parameters in float16 or bfloat16, not"
                f" {', '.join(sorted(map(str, kinds - set(HALVES))))}"
            ),
        )
    if len(kinds) > 1 and dtype not in HALVES:
        return None, "GPU kernels take parameters of one dtype, and these are mixed"
    return (kinds.pop() if len(kinds) == 1 else dtype), why


def route(op: str, device: torch.device, shape: tuple[int, int, int]) -> str:
    """The path that the module takes for (M, N, K) on a device, and why, in words."""
    path, reason = on(device).route(op, capability(device), *shape)
    return f"{path} ({reason})" if reason else path


def capability(device: torch.device) -> int:
    """10 * major + minor of a GPU; 0 for the CPU."""
    return gpu(device)[0]


def fuses(device: torch.device) -> bool:
    """Whether an MLP runs through the fused op. It takes and gives packed codes; where the product
    reads another form faster (Hopper, whose fast product also has no such epilogue) two linears
    with a GELU between them are ahead on paper; not yet measured.
    """
    return gpu(device)[1] == PACKED


def gpu(device: torch.device) -> tuple[int, int]:
    """(capability, form of activation codes that its product reads fastest); (0, PACKED) for the
    CPU.
    """
    if device.type == "cpu":
        return 0, PACKED
    return _gpu(device)


def codes_of(device: torch.device, act_bits: int) -> int:
    """The form of activation codes of so many bits between compiled ops on a device."""
    return INT8 if act_bits == 8 else gpu(device)[1]


@functools.lru_cache(maxsize=64)
def _gpu(device: torch.device) -> tuple[int, int]:
    serves_device = on(device)
    found = serves_device.capability(index_of(device))
    return found, serves_device.codes(found)


# ---- operands ------------------------------------------------------------------------------------


# What torch.compile's generated code calls; the public way makes a Stream object first, which takes
# a microsecond more.
_stream: Callable[[int | None], int] = getattr(torch._C, "_cuda_getCurrentRawStream", None) or (
    lambda index: torch.cuda.current_stream(index).cuda_stream
)


def place(device: torch.device, isa: int = 0) -> dict[str, int]:
    """Where a call runs, as the module's first four arguments."""
    if device.type == "cpu":
        return {"device": -1, "stream": 0, "threads": torch.get_num_threads(), "isa": isa}
    assert device.index is not None  # the device of a tensor
    return {"device": device.index, "stream": _stream(device.index), "threads": 1, "isa": isa}


def layer_op(device: torch.device, op: str, arguments: dict[str, Any]) -> Callable[..., None]:
    """An op with the arguments that a layer has whatever its tokens; called with the others. Where
    cubins serve the device, it keeps the launches that it planned.
    """
    found = on(device)
    if hasattr(found, "repeated"):
        return found.repeated(op, arguments)
    return functools.partial(getattr(found, op), **arguments)


def dense(tensor: Tensor) -> Tensor:
    """Contiguous and aligned: the tensor itself where it is so already."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def dense_rows(x: Tensor) -> Tensor:
    """`dense`, but that rows of a matrix may lie apart: columns of a wider one are not copied."""
    if x.dim() == 2 and x.stride(1) == 1 and not x.is_neg() and not x.data_ptr() % ALIGNMENT:
        apart = x.stride(0)
        if x.shape[1] <= apart <= WIDEST and apart % 8 == 0:
            return x
    return dense(x)


def row_stride(x: Tensor) -> int:
    """Elements from one row of what `dense_rows` gave to the next."""
    return x.shape[-1] if x.is_contiguous() else x.stride(0)


def dense_as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return dense(tensor if tensor.dtype is dtype else tensor.to(dtype))


def optional_as(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else dense_as(tensor, dtype)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def aligned(size: int) -> int:
    """Bytes of a piece of scratch memory, rounded up so that the next piece is aligned to 256."""
    return (size + 255) & ~255


def scratch(device: torch.device, *sizes: int) -> tuple[Tensor, list[int]]:
    """One allocation cut into pieces of so many bytes, each aligned to 256: (its owner, their
    addresses). The memory is valid as long as the owner lives.
    """
    owner = torch.empty(sum(map(aligned, sizes)) + 255, dtype=torch.uint8, device=device)
    addresses = []
    start = aligned(owner.data_ptr())
    for size in sizes:
        addresses.append(start)
        start += aligned(size)
    return owner, addresses


def activation_bytes(m: int, k: int, rank: int, codes: int) -> tuple[int, int, int]:
    """Bytes of codes, ascales and h between `quantize_down` and the product."""
    return m * k // (2 if codes == PACKED else 1), m * k // GROUP * 4, m * rank * 4
