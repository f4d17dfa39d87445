"""One 4-bit layer made on the GPU, and its steps one at a time in the very form in which the linear
runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cases import Case, options
from nibble.kernels import ops
from nibble.kernels.backends import native
from nibble.kernels.backends.native import DTYPES
from nibble.kernels.backends.native_w4a4 import product_arguments, quantizer_arguments
from nibble.kernels.params import W4A4Params

PARAMETERS = ("weight", "weight_scale", "smooth_factor", "proj_down", "proj_up", "bias")


def in_order(parameters: dict[str, Tensor | None]) -> list[Tensor | None]:
    """As `ops.mlp_w4a4` takes a layer."""
    return [parameters[name] for name in PARAMETERS]


def compiled(device: str | torch.device) -> object | None:
    """The module that has kernels for this device, or None."""
    device = torch.device(device)
    index = native.index_of(device) if device.type == "cuda" else None
    return native.serving(torch.device(device.type, index))[0]


def compiled_for(device: str | torch.device) -> bool:
    return compiled(device) is not None


def random_parameters(
    case: Case, dtype: torch.dtype, device: str, seed: int = 0
) -> dict[str, Tensor | None]:
    """What `cases.make_w4a4` makes, drawn where it is needed: a large layer takes seconds to draw
    on a CPU.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=device)

    groups = case.K // 64
    return {
        "weight": torch.randint(
            -128, 128, (case.N, case.K // 2), generator=g, dtype=torch.int8, device=device
        ),
        "weight_scale": ((normal(groups, case.N).abs() + 0.5) * 0.01).to(dtype),
        "smooth_factor": (torch.rand(case.K, generator=g, device=device) + 0.75).to(dtype),
        "proj_down": (normal(case.K, case.R) * case.K**-0.5).to(dtype),
        "proj_up": (normal(case.N, case.R) * 0.3).to(dtype),
        "bias": normal(case.N).to(dtype) if case.bias else None,
    }


def random_input(case: Case, dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    """Activations (M, K) with loud channels, after a GELU where codes are unsigned."""
    x = torch.randn(
        case.M, case.K, generator=torch.Generator(device).manual_seed(seed), device=device
    )
    x[:, :: max(1, case.K // 5)] *= 6
    return (torch.nn.functional.gelu(x, approximate="tanh") if case.act_unsigned else x).to(dtype)


@dataclass
class Layer:
    """Input and parameters of one layer."""

    case: Case
    x: Tensor
    parameters: dict[str, Tensor | None]

    @classmethod
    def random(cls, case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Layer:
        return cls(
            case,
            random_input(case, dtype, device, seed + 1),
            random_parameters(case, dtype, device, seed),
        )

    @property
    def bytes_read(self) -> int:
        return sum(
            t.numel() * t.element_size()
            for t in (self.x, *self.parameters.values())
            if t is not None
        )

    def linear(self, act_bits: int = 4) -> Tensor:
        flags = options(self.case) | {"act_bits": act_bits}
        return ops.linear_w4a4(self.x, **self.parameters, **flags)

    def linear8(self) -> Tensor:
        """The same with activations of 8 bits."""
        return self.linear(8)

    def rank_free(self) -> Layer:
        """The same layer without its low-rank branch."""
        down, up = (self.parameters[name][:, :0].contiguous() for name in ("proj_down", "proj_up"))
        return Layer(
            replace(self.case, R=0), self.x, self.parameters | {"proj_down": down, "proj_up": up}
        )


class Steps:
    """`quantize_down` and `gemm_w4a4_up` as compiled, with the activation codes in the form that
    this device's product, or the route that is forced, reads fastest.

    route: number of a route (see `routes`), 0 for the router's own choice. act_bits: of the
        activations, 4 or 8. Raises ValueError
        without a compiled module.
    q, ascales, h: what lies between the two; codes: the form of q.
    """

    def __init__(self, layer: Layer, route: int = 0, act_bits: int = 4):
        case, x = layer.case, layer.x
        module = compiled(x.device)
        if module is None:
            raise ValueError(f"nothing is compiled for {x.device}")
        self.module, self.layer, self.route, self.device = module, layer, route, x.device
        capability = native.gpu(x.device)[0]
        self.codes = native.INT8 if act_bits == 8 else codes_of(module, capability, route)
        m, k, n, r = case.M, case.K, case.N, case.R
        width = k // 2 if self.codes == native.PACKED else k
        kind = native.WIDE if self.codes == native.E4M3 else torch.int8
        self.q = torch.empty((m, width), dtype=kind, device=x.device)
        self.ascales = torch.empty((k // 64, m), device=x.device)
        self.h = torch.empty((m, r), device=x.device)
        self.out = torch.empty((m, n), dtype=x.dtype, device=x.device)
        needed = module.workspace_bytes("gemm_w4a4_up", capability, m, n, k, r, self.codes)
        self.scratch, (work,) = native.scratch(x.device, needed)
        self._workspace = {"workspace": work, "workspace_size": needed}
        self._arguments(W4A4Params(**layer.parameters, **options(case), act_bits=act_bits))

    def _arguments(self, params: W4A4Params) -> None:
        x, kind = self.layer.x, DTYPES[self.layer.x.dtype]
        between = {name: getattr(self, name).data_ptr() for name in ("q", "ascales", "h")}
        activations = {"M": self.layer.case.M, **between}
        own = {"x": x.data_ptr(), "x_stride": x.stride(0), "x_dtype": kind}
        self._quantize = quantizer_arguments(params.quantizer, self.codes) | activations | own
        product = product_arguments(params.product, self.codes, (params.act_unsigned, 0))
        out = {"out": self.out.data_ptr(), "out_dtype": kind}
        self._product = product | activations | out | self._workspace

    @property
    def quantize_bytes(self) -> int:
        """Bytes that quantize_down must move: x once, codes, scales and h once."""
        moved = (self.layer.x, self.q, self.ascales, self.h)
        return sum(t.numel() * t.element_size() for t in moved)

    def _place(self) -> dict[str, int]:
        # A graph is captured on a stream of its own: the current one is asked for at every call.
        return native.place(self.device, self.route)

    def quantize(self) -> None:
        self.module.quantize_down(**self._place(), **self._quantize)

    def product(self) -> Tensor:
        self.module.gemm_w4a4_up(**self._place(), **self._product)
        return self.out

    def both(self) -> Tensor:
        self.quantize()
        return self.product()


def codes_of(module: object, capability: int, route: int) -> int:
    """The form of activation codes that a route reads; the extension has no routes."""
    if hasattr(module, "routes"):
        return module.codes(capability, route)
    return module.codes(capability)


def routes(op: str, device: str | torch.device) -> dict[int, str]:
    """Number -> name of the routes that can be forced for an op; empty where the module offers no
    choice.
    """
    module, device = compiled(device), torch.device(device)
    if module is None or not hasattr(module, "routes"):
        return {}
    capability = module.capability(native.index_of(device)) if device.type == "cuda" else 0
    return module.routes(op, capability)
