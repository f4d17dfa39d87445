"""How many bits the activations of a model's 4-bit layers get: what the user asks for, or 8 where
they cost nothing on the device (`kernels.act_bits`).

The choice is made when a model is loaded, for the device that it will be computed on, and is not
saved with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from comfy.model_patcher import ModelPatcher

from .... import kernels
from ....quant.weights.svdquant_w4a4 import SVDQuantWeight
from . import layouts

CHOICES = ("auto", "4 bit", "8 bit")
_BITS = {"4 bit": 4, "8 bit": 8}
_GIVES = "8 bit is closer to the 16-bit model, 4 bit faster on RTX 20 to 40"


def choose(patcher: ModelPatcher, choice: str) -> None:
    """Has the layers of a model run with the chosen width, one of CHOICES. auto: where 8 bits are
    free, all have them; else those of a file of both widths that were fitted for them, if they do
    not run in plain torch.
    """
    layers = list(_layers(patcher))
    both = len({module.weight.params.fitted_bits for module in layers}) > 1
    as_fitted = both and _computed_by(patcher, 8) != "reference"
    for module in layers:
        params = module.weight.params
        bits = free(patcher, params.fitted_bits).bits if choice == "auto" else _BITS[choice]
        if choice == "auto" and as_fitted:
            bits = max(bits, params.fitted_bits)
        if bits != params.act_bits:
            module.weight = layouts.live(layouts.with_fields(module.weight, act_bits=bits))


def free(patcher: ModelPatcher, fitted: int) -> kernels.ActBits:
    """What costs nothing for a layer that was fitted for a width."""
    dtype = patcher.model.get_dtype_inference()
    return kernels.act_bits(patcher.load_device, dtype, fitted)


def _computed_by(patcher: ModelPatcher, bits: int) -> str:
    dtype = patcher.model.get_dtype_inference()
    return kernels.which("linear_w4a4", patcher.load_device, dtype, act_bits=bits)[0]


def _layers(patcher: ModelPatcher) -> Iterator[torch.nn.Module]:
    for module in patcher.model.diffusion_model.modules():
        if layouts.format_of(module._parameters.get("weight")) == SVDQuantWeight.FORMAT:
            yield module


def shown(patcher: ModelPatcher, choice: str) -> list[str]:
    """[label, words] for people: how wide, why, what computes it, and what the choice is worth."""
    params = [module.weight.params for module in _layers(patcher)]
    if not params:
        return ["activations", "8 bit: the file's format has no other"]
    widths = Counter(p.act_bits for p in params)
    fitted = sorted({p.fitted_bits for p in params})
    words = " and ".join(f"{bits} bit ({count} layers)" for bits, count in sorted(widths.items()))
    reasons = ["fitted for " + " and ".join(f"{bits} bit" for bits in fitted)]
    if choice == "auto":
        reasons += sorted({free(patcher, bits).why for bits in fitted})
    if 8 in widths:
        reasons.append(f"8 bit computed by {_computed_by(patcher, 8)}")
    return ["activations", f"{words}; {'; '.join([*reasons, _GIVES])}"]
