"""The seam for Triton: what it can run on a device, found out once, with the reason in words.

Triton comes with torch on Linux (NVIDIA, ROCm, XPU); on Windows it is the package triton-windows.
It is imported when a GPU's 4-bit layer is first asked about, and never for a CPU.

    NVIDIA   compute capability 8.0 and newer; 10.3, whose 8-bit integer products are slow, in
             bfloat16
    AMD      RDNA3 and newer, CDNA
    Intel    what torch calls an XPU, with the Triton of torch's XPU wheels

Before a device is served, one small linear runs there and is compared with the reference: Triton
needs a driver and, on Linux, a C compiler, and has back ends that these kernels have not met. What
fails is told in the reason, and the next way is taken.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..optional import optional
from .native import WITHOUT_INT8
from .nvfp4 import tried

OPS = (
    "quantize_down",
    "gemm_w4a4_up",
    "gemm_w4a4_up_gelu_quantize_down",
    "linear_w4a4",
    "linear_w4a4_grouped",
    "mlp_w4a4",
    "linear_w4a8",
    "gemm_vq",
    "linear_vq",
    "linear_nvfp4",
)
ACT_BITS = (4, 8)
"""Bits of the activations that the kernels take."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
OLDEST = 80
FIRST_WITH_FLOATS_OF_4_BITS = 100
"""Compute capability from which on NVIDIA's GPUs multiply them: Blackwell."""
AMD = ("gfx11", "gfx12", "gfx908", "gfx90a", "gfx94", "gfx95")
"""RDNA3, RDNA4; CDNA 1 to 4. RDNA2 has no matrix instructions, and the kernels spill there."""
BACKENDS = {"cuda": "nvidia", "hip": "amd", "xpu": "intel"}
DIFFERENCE = 0.02
"""Of the trial's result to the reference's; bfloat16 rounds to 0.004."""

log = logging.getLogger("nibble")


class Gpu(NamedTuple):
    """kind: "cuda", "hip" or "xpu"; arch: 10 * major + minor as text, gfx..., or a name."""

    kind: str
    arch: str
    multiprocessors: int

    @property
    def capability(self) -> int:
        """10 * major + minor of an NVIDIA GPU, else 0."""
        return int(self.arch) if self.kind == "cuda" else 0


@functools.lru_cache(maxsize=1)
def module() -> tuple[ModuleType | None, str]:
    """Triton, or None, and the reason in one sentence."""
    found, why = optional("triton")
    parts, why_not = optional("triton.backends")
    if found is None or parts is None:
        return None, f"{why or why_not} (on Windows the package is triton-windows)"
    back_ends = parts.backends
    return found, f"Triton {found.__version__} for {' and '.join(sorted(back_ends))}"


@functools.lru_cache(maxsize=64)
def gpu(device: torch.device) -> Gpu:
    """What a device of type cuda or xpu is."""
    if device.type == "xpu":
        found = torch.xpu.get_device_properties(device)
        return Gpu("xpu", found.name, int(getattr(found, "gpu_subslice_count", 0)))
    properties = torch.cuda.get_device_properties(device)
    count = properties.multi_processor_count
    if torch.version.hip:
        return Gpu("hip", properties.gcnArchName.split(":")[0], count)
    return Gpu("cuda", f"{properties.major}{properties.minor}", count)


def serves(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    parameters: tuple[torch.dtype | None, ...],
    act_bits: int = 4,
) -> tuple[bool, str]:
    """Whether Triton runs `op` for activations of `dtype`, quantized to `act_bits` bits, and
    parameters of these dtypes on a device, and why or why not, in one sentence.
    """
    if op not in OPS:
        return False, f"there is no {op} in Triton here"
    if act_bits not in ACT_BITS:
        return False, f"Triton's kernels have no activations of {act_bits} bits"
    if device.type not in ("cuda", "xpu"):
        return False, f"Triton is used on GPUs only, and this is {device.type}"
    if dtype not in FLOATS:
        return False, f"Triton's kernels compute in float32, float16 and bfloat16, not {dtype}"
    others = {kind for kind in parameters if kind is not None} - set(FLOATS[:2])
    if others:
        names = ", ".join(sorted(map(str, others)))
        return False, f"Triton's kernels take parameters in float16 or bfloat16, not {names}"
    if op == "linear_nvfp4":
        return _serving_nvfp4(device)
    if op == "linear_w4a8":
        return _serving_w4a8(device)
    return _serving_vq(device) if op in ("gemm_vq", "linear_vq") else serving(device)


@functools.lru_cache(maxsize=64)
def serving(device: torch.device) -> tuple[bool, str]:
    """Whether Triton serves a GPU, and why or why not."""
    return _tried(device, trial)


@functools.lru_cache(maxsize=64)
def _serving_w4a8(device: torch.device) -> tuple[bool, str]:
    """The same of 4-bit weights that are read as int8, whose kernels are others."""
    return _tried(device, trial_w4a8)


@functools.lru_cache(maxsize=64)
def _serving_vq(device: torch.device) -> tuple[bool, str]:
    """The same of codebooks."""
    return _tried(device, trial_vq)


def _tried(device: torch.device, one: Callable[[torch.device], float]) -> tuple[bool, str]:
    """Whether Triton runs here and `one` linear is the reference's, and why or why not."""
    found, why = module()
    if found is None:
        return False, why
    try:
        there = gpu(device)
    except (RuntimeError, AssertionError, AttributeError) as error:
        return False, f"Triton: torch finds no {device}: {error}"
    why_not = _why_not(there)
    if why_not:
        return False, why_not
    try:
        difference = one(device)
    except Exception as error:  # a compiler and a driver of any make
        first = str(error).strip().split("\n")[0]
        return False, f"Triton fails on {device}: {type(error).__name__}: {first}"
    if not difference <= DIFFERENCE:
        return False, f"Triton's result on {device} is {difference:.2g} off the reference's"
    return True, f"{why}; {device} is {_words(there)}"


@functools.lru_cache(maxsize=64)
def _serving_nvfp4(device: torch.device) -> tuple[bool, str]:
    """Whether Triton multiplies 4-bit floats on a GPU, and why or why not."""
    found, why = module()
    if found is None:
        return False, why
    if device.type != "cuda" or gpu(device).capability < FIRST_WITH_FLOATS_OF_4_BITS:
        return False, f"Triton multiplies no 4-bit floats on {device}"
    why_not = _why_not(gpu(device))
    if why_not:
        return False, why_not
    right, words = tried(lambda x, p: nvfp4().linear_nvfp4(x, p), device, "Triton's product")
    return right, f"{why}; {words}" if right else words


def _why_not(there: Gpu) -> str:
    """Why Triton is not used on a GPU; empty where it is."""
    back_ends = importlib.import_module("triton.backends").backends
    if BACKENDS[there.kind] not in back_ends:
        known = " and ".join(sorted(back_ends)) or "no GPU"
        return f"this Triton was built for {known}, not for {BACKENDS[there.kind]}"
    if there.kind == "cuda" and there.capability < OLDEST:
        has = there.capability / 10
        return f"Triton needs compute capability {OLDEST / 10}, and this GPU has {has}"
    if there.kind == "hip" and not there.arch.startswith(AMD):
        return f"Triton's kernels need RDNA3, RDNA4 or CDNA, and this GPU is {there.arch}"
    return ""


def _words(there: Gpu) -> str:
    if there.kind != "cuda":
        return there.arch
    if there.capability in WITHOUT_INT8:
        return f"of compute capability {there.capability / 10}, products of codes in bfloat16"
    return f"of compute capability {there.capability / 10}, products of codes in int8"


def w4a4() -> ModuleType:
    """The kernels' launcher, for whoever has asked `serves` before."""
    return importlib.import_module(".triton_w4a4", __package__)


def w4a8() -> ModuleType:
    """The same of 4-bit weights that are read as int8."""
    return importlib.import_module(".triton_w4a8", __package__)


def vq() -> ModuleType:
    """The same of codebooks."""
    return importlib.import_module(".triton_vq", __package__)


def nvfp4() -> ModuleType:
    """The same of 4-bit floats."""
    return importlib.import_module(".triton_nvfp4", __package__)


def trial(device: torch.device) -> float:
    """Relative difference of a small linear on a device from the reference in float32."""
    from ..params import W4A4Params

    draw = _Draw()
    x = draw.normal(40, 192)
    scale, smooth = draw.normal(3, 80).abs() * 0.05, draw.normal(192).abs() + 0.5
    down, up = draw.normal(192, 24) * 0.1, draw.normal(80, 24) * 0.3
    p = W4A4Params(draw.bytes(80, 96), scale, smooth, down, up, draw.normal(80))
    wanted = reference.linear_w4a4(x.float(), *p)
    return _difference(w4a4().linear_w4a4, x, p, wanted, device)


def trial_w4a8(device: torch.device) -> float:
    """The same of 4-bit weights that are read as int8."""
    from ..params import W4A8Params
    from ..reference.w4a8 import linear_w4a8

    draw = _Draw()
    x, channel, smooth = draw.normal(40, 192), draw.normal(80) * 0.001, draw.normal(192).abs() + 0.5
    down, up = draw.normal(192, 24) * 0.1, draw.normal(80, 24) * 0.3
    weight, scale, table = draw.bytes(80, 96), draw.bytes(6, 80), draw.bytes(16)
    p = W4A8Params(weight, scale, channel, table, smooth, down, up, draw.normal(80))
    return _difference(w4a8().linear_w4a8, x, p, linear_w4a8(x.float(), *p), device)


def trial_vq(device: torch.device) -> float:
    """The same of codebooks, of indices of 6 bits."""
    from ..params import VQParams
    from ..reference.vq import linear_vq

    draw = _Draw()
    x, down, up = draw.normal(40, 192), draw.normal(192, 24) * 0.1, draw.normal(80, 24) * 0.3
    indices = draw.bytes(80, 36).view(torch.uint8)
    p = VQParams(indices, draw.normal(64, 4).half(), draw.normal(80), down, up, draw.normal(80))
    return _difference(vq().linear_vq, x, p, linear_vq(x.float(), *p), device)


class _Draw:
    """The numbers of a trial."""

    def __init__(self):
        self.generator = torch.Generator("cpu").manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device="cpu").bfloat16()

    def bytes(self, *shape: int) -> Tensor:
        found = torch.randint(-127, 128, shape, generator=self.generator, device="cpu")
        return found.to(torch.int8)


def _difference(
    linear: Callable[..., Tensor], x: Tensor, p: Any, wanted: Tensor, device: torch.device
) -> float:
    """Of what a linear gives on a device for parameters that are moved there."""
    there = p._replace(
        **{name: each.to(device) for name, each in p._asdict().items() if torch.is_tensor(each)}
    )
    found = linear(x.to(device), there).float().cpu()
    return ((found - wanted).norm() / wanted.norm()).item()
