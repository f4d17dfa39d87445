"""Models in scripts, with diffusers: FLUX.1, and the class-conditional DiT of VQ4DiT's paper.

names.py   how its names map onto Black Forest Labs', which are ComfyUI's
load.py    a quantized file as its transformer (`FluxPipeline(transformer=...)`), and back
quantizer.py  diffusers' own interface: quantized while it loads, saved, loaded again
lora.py    LoRAs beside quantized layers, where peft is installed
sample.py  FLUX.1 at work: Euler's method, what its layers read, a teacher for codewords
dit.py     a DiT to quantize, to calibrate on, and loaded again
"""

from ...kernels.optional import optional
from .dit import dit_source, dit_teacher
from .load import flux_config, flux_transformer, load_quantized, save_quantized
from .names import diffusers_parts, flux_module, to_diffusers_names, to_flux_names
from .quantizer import NibbleConfig, NibbleQuantizer, register
from .sample import SHIFT, Drawing, euler, flux_teacher, record_inputs, schedule, shift_of, velocity

optional(".lora", __name__)  # without peft there is nothing to take care of

__all__ = [
    "SHIFT",
    "Drawing",
    "NibbleConfig",
    "NibbleQuantizer",
    "diffusers_parts",
    "dit_source",
    "dit_teacher",
    "euler",
    "flux_config",
    "flux_module",
    "flux_teacher",
    "flux_transformer",
    "load_quantized",
    "record_inputs",
    "register",
    "save_quantized",
    "schedule",
    "shift_of",
    "to_diffusers_names",
    "to_flux_names",
    "velocity",
]
