"""The demo FLUX in the formats that stock ComfyUI opens, in float32: weights as comfy-kitchen's
codec or a file has them, activations on the format's trip through few bits.
"""

import importlib
from collections.abc import Callable

import torch

from bench.baselines import Lambda
from nibble.demo import pictures
from nibble.quant import diffusers as models
from nibble.quant.calibration import recorder
from nibble.quant.files.source import Source
from nibble.quant.svdquant.stock.formats import FORMATS, StockFormat
from nibble.quant.svdquant.stock.quantize import StockJob
from nibble.quant.svdquant.stock.recipe import StockRecipe
from nibble.quant.weights import linears

# of comfy-kitchen, and how its codec is asked for the format
LAYOUTS: dict[str, tuple[str, dict]] = {
    "asym_w4a8_int8": ("AsymW4A8Int8Layout", {}),
    "int8_convrot": ("TensorWiseINT8Layout", {"per_channel": True, "convrot": True}),
    "nvfp4": ("TensorCoreNVFP4Layout", {}),
}
Made = Callable[[str], tuple[torch.Tensor, torch.Tensor]]  # a layer's weight (N, K) and bias


def in_format(form: StockFormat, names: list[str], made: Made) -> torch.nn.Module:
    """The demo FLUX with these linears in a format."""
    flux = pictures.load_flux()
    found = recorder.find_linears(flux)
    for name in names:
        weight, bias = made(name)
        if name.startswith("final_layer"):  # diffusers has scale before shift
            weight, bias = (torch.cat(t.chunk(2)[::-1]) for t in (weight, bias))
        weight, start = form.rotated(weight), 0
        for part in models.diffusers_parts(name):
            rows = slice(start, start + recorder.outputs(found[part]))
            linears.replace(flux, part, Lambda(_linear(form, weight[rows], bias[rows])))
            start = rows.stop
    return flux


def _linear(form: StockFormat, weight: torch.Tensor, bias: torch.Tensor):
    def forward(x: torch.Tensor) -> torch.Tensor:
        seen = form.activations(form.rotated(x.reshape(-1, x.shape[-1])))
        return torch.nn.functional.linear(seen, weight, bias).reshape(*x.shape[:-1], -1)

    return forward


def layers_of(source: Source, recipe: StockRecipe) -> list[str]:
    """The layers that a recipe quantizes."""
    return StockJob.prepare(source, "planned.safetensors", recipe).quantized_names


def of_kitchen(name: str, source: Source) -> Made:
    """Weights through comfy-kitchen's codec and back."""
    layout_name, options = LAYOUTS[name]
    layout = getattr(importlib.import_module("comfy_kitchen.tensor"), layout_name)

    def made(layer: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = source.weight(layer)
        decoded = layout.dequantize(*layout.quantize(weight, **options))
        return decoded[: weight.shape[0]], source.bias(layer)

    return made


def rival(name: str) -> torch.nn.Module:
    """The demo FLUX as comfy-kitchen's own codec makes it without data; modulation in 16 bit."""
    source = Source(pictures.FLUX_FILE)
    kept = StockRecipe.from_preset("fast", format=name, modulation="keep")
    return in_format(FORMATS[name], layers_of(source, kept), of_kitchen(name, source))
