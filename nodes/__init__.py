"""nodes/ - thin: a schema, one call into bridge/, one return. Nothing here computes.

svdquant.py      quantize, load
stock.py         quantize for ComfyUI without this pack
farm.py          quantize on other machines
text_encoders.py quantize, load: text encoders
vq4dit.py        quantize, load, inspect
get_started.py   where to begin on this computer
vram.py          what a picture will take of a card and of RAM
inspect.py       what any model file is
lora.py          several LoRAs in one node; what LoRAs do to a 4-bit model
intlora.py       convert, apply, merge and save
training.py      train an IntLoRA
caching.py       TeaCache Sampler, Apply TeaCache, Apply SmoothCache, Calibrate Cache
caf.py           load, sample, invert; without training: a sampler and sigmas
caf_training.py  couplings, train
feather.py       prune, report
demo.py          a prompt for the demo model
file_nodes.py    what ComfyUI asks of nodes that read or make files
menu.py          where the nodes stand in ComfyUI's menu
widgets.py       inputs that several nodes share, training_inputs.py and caching_inputs.py too
bridge/          what they call
"""

from comfy_api.latest import ComfyExtension

from . import (
    caching,
    caf,
    caf_training,
    demo,
    farm,
    feather,
    get_started,
    intlora,
    lora,
    stock,
    svdquant,
    text_encoders,
    training,
)
from . import inspect as inspecting
from . import vq4dit as vq
from . import vram as vram_plan
from .bridge.host import demo_model, unfinished
from .bridge.quantized import encoders, registration

NODES = [
    *svdquant.NODES,
    *stock.NODES,
    *farm.NODES,
    *text_encoders.NODES,
    *vq.NODES,
    *inspecting.NODES,
    *get_started.NODES,
    *vram_plan.NODES,
    *lora.NODES,
    *intlora.NODES,
    *training.NODES,
    *caching.NODES,
    *caf.NODES,
    *caf_training.NODES,
    *feather.NODES,
    *demo.NODES,
]


class NibbleExtension(ComfyExtension):
    """Nibble's nodes."""

    async def get_node_list(self) -> list:
        return NODES


async def comfy_entrypoint() -> NibbleExtension:
    """What ComfyUI calls to get the nodes. Its own loaders open Nibble's files from then on, and
    list the demo's.
    """
    demo_model.register()
    registration.register()
    encoders.register()
    unfinished.register()
    return NibbleExtension()
