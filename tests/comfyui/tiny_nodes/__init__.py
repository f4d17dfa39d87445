"""Test nodes for a ComfyUI server: tiny random models of its own classes, as files, and prompts for
them. They are small in number of layers; ComfyUI and Nibble know them by their names and shapes.
"""

import dataclasses
import sys
from pathlib import Path

import folder_paths

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

from comfy.utils import save_torch_file

import tiny_models
from tiny_more_families import MORE

# as wide as a layer has to be for a plan that is guessed
LENS = dataclasses.replace(
    tiny_models.FAMILIES["lens"],
    options=tiny_models.FAMILIES["lens"].options
    | {"num_attention_heads": 12, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28)},
)
tiny_models.FAMILIES |= MORE | {"lens": LENS}


class TinyFile:
    """Saves a family's tiny model into models/diffusion_models."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "make", "Nibble tests", True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"family": ("STRING", {}), "filename": ("STRING", {})}}

    def make(self, family, filename):
        state = tiny_models.build(family).model.diffusion_model.state_dict()
        homes = map(Path, folder_paths.get_folder_paths("diffusion_models"))
        tensors = {key: value.contiguous() for key, value in state.items()}
        save_torch_file(tensors, str(next(filter(Path.is_dir, homes)) / filename))
        return ()


class TinyPrompt:
    """A prompt of random tokens."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "Nibble tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"family": ("STRING", {})}}

    def make(self, family):
        return (tiny_models.prompt(family),)


NODE_CLASS_MAPPINGS = {"TestTinyFile": TinyFile, "TestTinyPrompt": TinyPrompt}
