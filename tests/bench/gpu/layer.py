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


def compiled_for(device: str) -> bool:
    """Whether the compiled module is here and has kernels for this device."""
    module, _ = native.module()
    return module is not None and torch.device(device).type in module.DEVICES


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

    def linear(self) -> Tensor:
        return ops.linear_w4a4(self.x, **self.parameters, **options(self.case))

    def rank_free(self) -> Layer:
        """The same layer without its low-rank branch."""
        down, up = (self.parameters[name][:, :0].contiguous() for name in ("proj_down", "proj_up"))
        return Layer(
            replace(self.case, R=0), self.x, self.parameters | {"proj_down": down, "proj_up": up}
        )


class Steps:
    """`quantize_down` and `gemm_w4a4_up` as compiled, with the activation codes in the form that
    this device's product reads fastest.

    route: number of a path to force, 0 for the router's own choice (see `routes`). Raises
        ValueError without the compiled module.
    """

    def __init__(self, layer: Layer, route: int = 0):
        case, x, p = layer.case, layer.x, layer.parameters
        self.module, why = native.module()
        if self.module is None or x.device.type not in self.module.DEVICES:
            raise ValueError(why)
        self.device, self.route = x.device, route
        capability, codes = native.gpu(x.device)
        params = W4A4Params(**p, act_unsigned=case.act_unsigned, rotation=case.rotation)
        kind, m, k, n, r = DTYPES[x.dtype], case.M, case.K, case.N, case.R
        needed = self.module.workspace_bytes("gemm_w4a4_up", capability, m, n, k, r, codes)
        self.scratch, (q, ascales, h, work) = native.scratch(
            x.device, *native.activation_bytes(m, k, r, codes), needed
        )
        self.out = torch.empty((m, n), dtype=x.dtype, device=x.device)
        self.held = (layer, self.scratch)  # addresses below are bare numbers
        activations = {"M": m, "q": q, "ascales": ascales, "h": h}
        self._quantize = (
            quantizer_arguments(params.quantizer, codes)
            | activations
            | {"x": x.data_ptr(), "x_stride": k, "x_dtype": kind}
        )
        self._product = (
            product_arguments(params.product, codes, (case.act_unsigned, 0))
            | activations
            | {"out": self.out.data_ptr(), "out_dtype": kind}
            | {"workspace": work, "workspace_size": needed}
        )
        # bytes that quantize_down must move: x once, codes and scales and h once
        self.quantize_bytes = (
            x.numel() * x.element_size()
            + m * k // (2 if codes == native.PACKED else 1)
            + m * k // 64 * 4
            + m * r * 4
        )

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


def routes(op: str, capability: int) -> list[tuple[int, str]]:
    """(number, name) of the paths that can be forced for an op; empty where the module offers no
    choice.
    """
    module, _ = native.module()
    return (
        list(module.routes(op, capability))
        if module is not None and hasattr(module, "routes")
        else []
    )
