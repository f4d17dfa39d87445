"""Test nodes for a ComfyUI server: FLUX's two text encoders, small and of random weights, as wide
as the demo model reads them. The server's own loaders build them as small.
"""

import sys
from pathlib import Path

import folder_paths

sys.path.append(str(Path(__file__).resolve().parents[2] / "support"))

import several_encoders

_SIZE = "demo"
_small = several_encoders.small(_SIZE)
_small.__enter__()  # as long as the server lives


class TinyEncoders:
    """Saves them into models/text_encoders: clip_l.safetensors and demo.safetensors, a T5."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "make", "Nibble tests", True

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    def make(self):
        homes = map(Path, folder_paths.get_folder_paths("text_encoders"))
        several_encoders.write(next(filter(Path.is_dir, homes)), "clip_l", _SIZE)
        return ()


NODE_CLASS_MAPPINGS = {"TestTinyEncoders": TinyEncoders}
