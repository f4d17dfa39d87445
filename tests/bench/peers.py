"""Other people's ways to run one linear layer, for timing: each makes its own random weights and
returns the call to be timed.

What is not installed, or not made for this machine, raises Unavailable with the reason, and the
reason goes into the results. Accuracy has its own file: baselines.py.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import linear

from cases import Case
from nibble.kernels.reference import SHIFT

Call = Callable[[], Tensor]
Peer = Callable[[Case, Tensor, dict[str, Tensor | None]], Call]
"""(shape, input (M, K), parameters as `cases.make_w4a4` gives them) -> call. Parameters of another
method are made from the shape alone.
"""


class Unavailable(Exception):
    """This peer cannot run here; the message says why, for people."""


def need(name: str) -> ModuleType:
    """A package, or Unavailable: not only where it is missing, but also where it does not start."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a wheel for another torch fails in many ways
        raise Unavailable(f"{name} cannot be imported: {error}".splitlines()[0]) from error


def dense_weight(case: Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A plain layer's weight (N, K) and bias (N,)."""
    return torch.randn(case.N, case.K, dtype=dtype, device=device), torch.randn(
        case.N, dtype=dtype, device=device
    )


# ---- torch ---------------------------------------------------------------------------------------


def torch_dense(dtype: torch.dtype) -> Peer:
    """F.linear with weights in one float dtype; x is converted before, not in the call."""

    def make(case: Case, x: Tensor, parameters: dict) -> Call:
        x, (weight, bias) = x.to(dtype), dense_weight(case, dtype, x.device)
        return lambda: linear(x, weight, bias)

    return make


def torch_int8(case: Case, x: Tensor, parameters: dict) -> Call:
    """torch's own quantized linear, 8-bit weights by row and 8-bit inputs by tensor, as
    `quantize_dynamic` makes it for a CPU.
    """
    dynamic, ao = need("torch.ao.nn.quantized.dynamic"), need("torch.ao.quantization")
    with warnings.catch_warnings():
        # deprecated, and still the only complete int8 linear for a CPU that torch itself has
        warnings.simplefilter("ignore")
        layer = torch.nn.Linear(case.K, case.N)
        layer.qconfig = ao.per_channel_dynamic_qconfig
        quantized, x = dynamic.Linear.from_float(layer), x.float()
    return lambda: quantized(x)


def torch_int4_weights(case: Case, x: Tensor, parameters: dict) -> Call:
    """torch's 4-bit weights with 16-bit inputs on a CPU (the kernel under torchao's
    Int4WeightOnly).
    """
    try:
        pack, run = (
            torch.ops.aten._convert_weight_to_int4pack_for_cpu,
            torch.ops.aten._weight_int4pack_mm_for_cpu,
        )
    except AttributeError as error:
        raise Unavailable("this torch has no 4-bit weights for a CPU") from error
    packed = pack(torch.randint(0, 16, (case.N, case.K), dtype=torch.int32), 1)
    scales, x = torch.randn(case.K // 64, case.N, 2, dtype=torch.bfloat16), x.bfloat16()
    return lambda: run(x, packed, 64, scales)


# ---- GGUF ----------------------------------------------------------------------------------------


def decode_q4_k(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """GGUF's Q4_K, blocks (n, 144) uint8 of 256 weights -> (n, 256): scale * code - minimum by 32
    weights, both of 6 bits under two fp16.

    Layout: ggml-common.h, block_q4_K. The arithmetic is in the layer's dtype, the faster of the two
        that ComfyUI-GGUF offers.
    """
    d, least = blocks[:, :4].contiguous().view(torch.float16).to(dtype).split(1, 1)
    low, high, top = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    scale = d * torch.cat([low & 63, (top & 15) | (low >> 6) << 4], 1)
    least = least * torch.cat([high & 63, (top >> 4) | (high >> 6) << 4], 1)
    pairs = blocks[:, 16:].unflatten(1, (4, 1, 32))
    codes = torch.cat([pairs & 15, pairs >> 4], 2).flatten(1, 2)
    return (scale[..., None] * codes - least[..., None]).flatten(1)


def gguf(dtype: torch.dtype) -> Peer:
    """Decode the whole weight, then F.linear: what ComfyUI-GGUF does in every call."""

    def make(case: Case, x: Tensor, parameters: dict) -> Call:
        if case.K % 256:
            raise Unavailable(f"Q4_K has blocks of 256 and K is {case.K}")
        blocks = torch.randint(
            0, 256, (case.N * case.K // 256, 144), dtype=torch.uint8, device=x.device
        )
        blocks[:, :4] = torch.tensor([1e-3, 1e-3], dtype=torch.float16, device=x.device).view(
            torch.uint8
        )
        x, bias = x.to(dtype), torch.randn(case.N, dtype=dtype, device=x.device)
        return lambda: linear(x, decode_q4_k(blocks, dtype).view(case.N, case.K), bias)

    return make


# ---- comfy-kitchen -------------------------------------------------------------------------------


def kitchen(backend: str) -> ModuleType:
    """comfy_kitchen with this backend available, or Unavailable."""
    module = need("comfy_kitchen")
    found = module.list_backends().get(
        backend, {"available": False, "unavailable_reason": "unknown to this comfy_kitchen"}
    )
    if not found["available"]:
        raise Unavailable(f"comfy_kitchen's {backend} backend: {found['unavailable_reason']}")
    return module


def _under(module: ModuleType, backend: str, run: Call) -> Call:
    """`run` with one of comfy-kitchen's backends and no other."""

    def under() -> Tensor:
        with module.use_backend(backend):
            return run()

    return under


def kitchen_svdquant_call(
    module: ModuleType, x: Tensor, p: dict[str, Tensor | None], unsigned: bool
) -> Tensor:
    """What comfy-kitchen's layout runs for one linear: x (M, K) -> (M or more, N)."""
    q, scales, h = module.quantize_svdquant_w4a4(
        x + SHIFT if unsigned else x,
        smooth=p["smooth_factor"],
        lora_down=p["proj_down"],
        act_unsigned=unsigned,
        lora_x=x,
    )
    return module.scaled_mm_svdquant_w4a4(
        q, p["weight"], scales, p["weight_scale"], h, p["proj_up"], p["bias"], unsigned
    )


def kitchen_svdquant(backend: str) -> Peer:
    """The same method on the same parameters."""

    def make(case: Case, x: Tensor, parameters: dict) -> Call:
        module = kitchen(backend)
        return _under(
            module, backend, lambda: kitchen_svdquant_call(module, x, parameters, case.act_unsigned)
        )

    return make


def kitchen_convrot(backend: str, product: str) -> Peer:
    """convrot_w4a4, what ComfyUI ships: one scale a row and a token, no low-rank branch. product:
    "int4" or "int8".
    """

    def make(case: Case, x: Tensor, parameters: dict) -> Call:
        module = kitchen(backend)
        weight, bias = dense_weight(case, x.dtype, x.device)
        codes, scale = module.quantize_convrot_w4a4_weight(weight)
        return _under(
            module,
            backend,
            lambda: module.convrot_w4a4_linear(x, codes, scale, bias, linear_dtype=product),
        )

    return make


def kitchen_int8(backend: str) -> Peer:
    """int8_linear: 8-bit weights by row, 8-bit inputs by token."""

    def make(case: Case, x: Tensor, parameters: dict) -> Call:
        module = kitchen(backend)
        weight, bias = dense_weight(case, x.dtype, x.device)
        codes, scale = module.quantize_int8_rowwise(weight)
        return _under(
            module, backend, lambda: module.int8_linear(x, codes, scale, bias, out_dtype=x.dtype)
        )

    return make


def kitchen_w4a8(backend: str) -> Peer:
    """w4a8_int8_linear (asym_w4a8_int8): 4-bit codes of a codebook read as 8-bit weights, rotated
    8-bit inputs by token, no low-rank branch.
    """

    def make(case: Case, x: Tensor, parameters: dict) -> Call:
        module = kitchen(backend)
        weight, bias = dense_weight(case, x.dtype, x.device)
        *codes, correction, codebook = module.quantize_w4a8_int8_weight(weight)
        operands = (*codes, codebook, correction, bias)
        return _under(
            module, backend, lambda: module.w4a8_int8_linear(x, *operands, out_dtype=x.dtype)
        )

    return make


def kitchen_gemv(backend: str) -> Peer:
    """4-bit weights with zero points for few tokens (AWQ), on the parameters of
    `cases.make_w4a16`.
    """

    def make(case: Case, x: Tensor, parameters: dict) -> Call:
        module, p = kitchen(backend), parameters
        return _under(
            module,
            backend,
            lambda: module.gemv_awq_w4a16(
                x, p["weight"], p["weight_scale"], p["weight_zeros"], p["bias"]
            ),
        )

    return make


# ---- GPU libraries -------------------------------------------------------------------------------


def bitsandbytes_nf4(case: Case, x: Tensor, parameters: dict) -> Call:
    """NF4 weights decoded in the call, 16-bit product."""
    module = need("bitsandbytes")
    weight, bias = dense_weight(case, x.dtype, x.device)
    codes, state = module.functional.quantize_4bit(weight, quant_type="nf4")
    del weight
    return lambda: module.matmul_4bit(x, codes.t(), quant_state=state, bias=bias)


def torchao_int4(case: Case, x: Tensor, parameters: dict) -> Call:
    """torchao's 4-bit weights by 64 columns, 16-bit inputs."""
    module = need("torchao.quantization")
    layer = torch.nn.Linear(case.K, case.N, dtype=x.dtype, device=x.device)
    try:
        module.quantize_(layer, module.Int4WeightOnlyConfig(group_size=64))
        layer(x[:1])
    except Exception as error:  # its kernels come with packages of their own, by GPU
        raise Unavailable(f"torchao's int4: {error}".splitlines()[0]) from error
    return lambda: layer(x)


CPU_PEERS: dict[str, Peer] = {
    "torch bfloat16": torch_dense(torch.bfloat16),
    "torch float32": torch_dense(torch.float32),
    "torch int8 dynamic": torch_int8,
    "torch int4 weights, bfloat16": torch_int4_weights,
    "decode Q4_K, then bfloat16 (as GGUF)": gguf(torch.bfloat16),
    "comfy_kitchen svdquant eager": kitchen_svdquant("eager"),
    "comfy_kitchen int8 eager": kitchen_int8("eager"),
    "comfy_kitchen w4a8 eager": kitchen_w4a8("eager"),
}
GPU_PEERS: dict[str, Peer] = {
    "torch bfloat16": torch_dense(torch.bfloat16),
    "comfy_kitchen svdquant": kitchen_svdquant("cuda"),
    "comfy_kitchen convrot_w4a4 int4": kitchen_convrot("cuda", "int4"),
    "comfy_kitchen convrot_w4a4 int8": kitchen_convrot("cuda", "int8"),
    "comfy_kitchen int8": kitchen_int8("cuda"),
    "bitsandbytes nf4": bitsandbytes_nf4,
    "torchao int4": torchao_int4,
    "decode Q4_K, then bfloat16 (as GGUF)": gguf(torch.bfloat16),
}
GEMV_PEERS: dict[str, Peer] = {"torch bfloat16": torch_dense(torch.bfloat16)}


def available(
    peers: dict[str, Peer], case: Case, x: Tensor, parameters: dict
) -> tuple[dict[str, Call], dict[str, str]]:
    """({name: call}, {name: why not}); a peer whose first step fails counts as unavailable, with
    its own words.
    """
    calls, reasons = {}, {}
    for name, make in peers.items():
        try:
            calls[name] = make(case, x, parameters)
        except Unavailable as reason:
            reasons[name] = str(reason)
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return calls, reasons
