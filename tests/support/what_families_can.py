"""What Nibble's other methods do on the tiny models of every family (tiny_models): which families a
method refuses, and words of the sentence that says so. docs/models.md is the same as a table.
"""

from __future__ import annotations

SEVERAL_STREAMS = dict.fromkeys(
    ["minimax h3", "ltx-2 (video and sound)", "triposplat"], "several streams"
)
# ComfyUI's models that compute something without a gradient, also while they are trained: a fused
# norm and rotation, sums in place
NO_GRADIENT = dict.fromkeys(
    [
        "joyimage",
        "ernie-image",
        "cosmos predict 2",
        "anima",
        "hidream o1",
        "wan animate 2",
        "wan 2.2 s2v",
        "wandancer",
    ],
    "for which ComfyUI has no gradient",
)
NOT_TRAINED = SEVERAL_STREAMS | NO_GRADIENT
# families whose noise and data do not lie on straight lines
NO_FLOW = {
    "sdxl",
    "pixart",
    "pixart alpha",
    "hunyuan dit",
    "cosmos 1",
    "cosmos predict 2",
    "cogvideox",
    "stable audio",
}
NO_CAF = NOT_TRAINED | dict.fromkeys(
    ["ace-step 1.5", "stable audio", "stable audio 3"], "cannot be given an initial velocity"
)
# CAF's input layer is not all that sees the latent, or it sees a picture or a mask beside it
LATENT_ELSEWHERE = {
    "chroma radiance",
    "z-image pixel",
    "pixeldit",
    "pid",
    "ltx-2 (video and sound)",
    "triposplat",
    "minimax h3",
    "hidream o1",
    "wan 2.1 i2v",
    "wandancer",
    "wan animate 2",
    "wan 2.2 animate",
    "humo",
    "wan 2.1 camera",
    "wan 2.2 camera",
    "scail",
    "scail 2",
    "flux fill",
    "hunyuan video 1.5",
    "seedvr 2",
}
