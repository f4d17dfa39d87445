"""Models in scripts, with diffusers: FLUX.1, the class-conditional DiT of VQ4DiT's paper, SANA and
SDXL.

names.py   how its names map onto Black Forest Labs', which are ComfyUI's
load.py    a quantized file as its transformer (`FluxPipeline(transformer=...)`), and back
by_config.py  the same of the other models, by the config in the file
pointwise.py  linears in the place of convolutions
quantizer.py  diffusers' own interface: quantized while it loads, saved, loaded again
lora.py    LoRAs beside quantized layers, where peft is installed
sample.py  FLUX.1 at work: Euler's method, what its layers read, a teacher for codewords
dit.py     a DiT to quantize and to calibrate on
"""

from ...kernels.optional import optional
from .dit import Classes, dit_model, dit_scheduler, dit_source, dit_teacher, record_dit
from .load import flux_config, flux_transformer, load_quantized, save_quantized
from .names import diffusers_parts, flux_module, to_diffusers_names, to_flux_names
from .quantizer import NibbleConfig, NibbleQuantizer, register
from .sample import SHIFT, Drawing, euler, flux_teacher, record_inputs, schedule, shift_of, velocity

optional(".lora", __name__)  # without peft there is nothing to take care of

__all__ = [
    "SHIFT",
    "Classes",
    "Drawing",
    "NibbleConfig",
    "NibbleQuantizer",
    "diffusers_parts",
    "dit_model",
    "dit_scheduler",
    "dit_source",
    "dit_teacher",
    "euler",
    "flux_config",
    "flux_module",
    "flux_teacher",
    "flux_transformer",
    "load_quantized",
    "record_dit",
    "record_inputs",
    "register",
    "save_quantized",
    "schedule",
    "shift_of",
    "to_diffusers_names",
    "to_flux_names",
    "velocity",
]
