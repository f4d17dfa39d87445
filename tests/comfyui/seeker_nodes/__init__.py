"""Test nodes for a ComfyUI server: the encoder of bench/seeker.py, whose answer is known, and its
pictures.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind ComfyUI's own modules

from bench import seeker

SIDE = 27  # patches


class Seeker:
    """The encoder, and a picture of a red, a green and a blue square; the red one at `height`."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP", "IMAGE"), "make", "Nibble tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"height": ("FLOAT", {"default": 0.1})}}

    def make(self, height):
        return seeker.build(), seeker.picture(SIDE, SIDE, 3, height)[0]


class SeekerAsk:
    """Asks where the red square is."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "ask", "Nibble tests"

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"clip": ("CLIP",)}, "optional": {"image": ("IMAGE",)}}

    def ask(self, clip, image=None):
        tokens = seeker.prompt(image)
        if image is None:
            tokens["qwen25_7b"][0].pop(0)
        return (clip.encode_from_tokens_scheduled(tokens),)


NODE_CLASS_MAPPINGS = {"TestSeeker": Seeker, "TestSeekerAsk": SeekerAsk}
