"""The demo model in ComfyUI: its files in the lists of every loader, and previews of its latents.

ComfyUI previews a latent by a matrix, `latent_rgb_factors` of the latent format that a model's
class names: rgb = F^T z + b, z one place's channels, rgb in [-1, 1]. FLUX.1's matrix shows mud for
the demo, whose autoencoder has principal components of 8 x 8 pixels for channels. A class of the
demo's own stands in ComfyUI's table of models before FLUX.1's, and takes no other model.
"""

from pathlib import Path

import comfy.latent_formats
import comfy.supported_models

from .... import demo
from ....demo.prompts import WORD_DIM
from . import folders

WEIGHTS = Path(demo.__file__).parent / "weights"


class DemoLatents(comfy.latent_formats.Flux):
    """FLUX.1's latents with the demo's colours: the least-squares fit of the mean colour of each
    8 x 8 pixels of 600 random scenes (`demo/world.py`); channels from the fourth on add nothing.
    """

    def __init__(self):
        super().__init__()
        unseen = [[0.0, 0.0, 0.0]] * (self.latent_channels - 3)
        self.latent_rgb_factors = [
            [0.3695, 0.3611, 0.3125],
            [-0.2825, -0.0221, 0.3597],
            [-0.1492, 0.2417, -0.1029],
            *unseen,
        ]
        self.latent_rgb_factors_bias = [-0.1700, -0.1690, -0.0728]
        self.taesd_decoder_name = None  # FLUX.1's small decoder reads other channels


class DemoFlux(comfy.supported_models.Flux):
    """The demo's entry in ComfyUI's table of models."""

    NAME = "nibble demo"
    unet_config = {
        **comfy.supported_models.Flux.unet_config,
        "hidden_size": 256,
        "context_in_dim": WORD_DIM,
        "depth": 2,
        "depth_single_blocks": 4,
    }
    latent_format = DemoLatents


def register() -> None:
    """Lists the demo's files beside the user's, and puts its entry before FLUX.1's, in place of one
    from an earlier call.
    """
    for kind in filter(Path.is_dir, WEIGHTS.iterdir()):
        folders.lend(kind.name, kind)
    table = comfy.supported_models.models
    table[:] = [entry for entry in table if getattr(entry, "NAME", None) != DemoFlux.NAME]
    table.insert(table.index(comfy.supported_models.Flux), DemoFlux)
