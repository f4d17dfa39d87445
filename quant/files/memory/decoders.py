"""What decoding takes by ComfyUI's estimate (0.33, comfy/sd.py, `VAE.memory_used_decode`), told
from the names and shapes of a VAE's tensors.

The estimate is of one picture or video; of a batch, ComfyUI decodes as many at once as fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]

TILE, OVERLAP, TILE_FRAMES = 512, 64, 64  # pixels, frames: defaults of VAE Decode (Tiled)


@dataclass(frozen=True)
class Decoder:
    """A kind of VAE. ratios: pixels and frames for each position of the latent; numbers: (latent
    frames, height, width) → how many numbers decoding holds at once.
    """

    name: str
    ratios: tuple[int, int]
    numbers: Callable[[int, int, int], float]

    def bytes(self, frames: int, size: tuple[int, int], itemsize: int) -> int:
        """Bytes that decoding takes. frames: of the latent; size: (width, height) in pixels."""
        spatial = self.ratios[0]
        return int(self.numbers(frames, size[1] // spatial, size[0] // spatial) * itemsize)

    def tiled(self, frames: int, size: tuple[int, int], itemsize: int) -> int:
        """The same in tiles of 512 pixels and, of a video, 64 frames."""
        if self.is_video:
            frames = min(frames, max(2, TILE_FRAMES // self.ratios[1]))
        return self.bytes(frames, (min(size[0], TILE), min(size[1], TILE)), itemsize)

    @property
    def on_a_cpu(self) -> float:
        """What of the estimate a CPU takes: measured with FLUX.1's VAE, 0.43."""
        return 1.0 if self.is_video else 0.5

    @property
    def is_video(self) -> bool:
        """Whether it decodes frames together."""
        return self.ratios[1] > 1

    def tiles_cost(self, size: tuple[int, int]) -> float:
        """Pixels of all tiles for each one of the picture. Pictures are decoded in tiles of three
        shapes, and the mean is taken; videos once, overlaps in time left out of the count.
        """
        spatial = self.ratios[0]
        tile, overlap = TILE // spatial, OVERLAP // spatial
        width, height = size[0] // spatial, size[1] // spatial
        shapes = [(tile, tile)]
        if not self.is_video:
            shapes += [(tile // 2, tile * 2), (tile * 2, tile // 2)]
        covered = sum(
            _covered(width, across, overlap) * _covered(height, down, overlap)
            for across, down in shapes
        )
        return covered / (width * height)


def _covered(length: int, tile: int, overlap: int) -> int:
    """Positions of all tiles along an edge (comfy/utils.py, tiled_scale_multidim)."""
    if length <= tile:
        return length
    return sum(min(tile, length - start) for start in range(0, length - overlap, tile - overlap))


KL = Decoder("AutoencoderKL", (8, 1), lambda t, h, w: 2178 * h * w * 64)
FLUX2 = Decoder("FLUX.2's", (16, 1), lambda t, h, w: 2178 * h * w * 64 * 4)
WAN = Decoder("Wan 2.1's", (8, 4), lambda t, h, w: (2200 if t <= 4 else 7000) * h * w * 64)
WAN_22 = Decoder("Wan 2.2's", (16, 4), lambda t, h, w: 8000 * h * w * 256)
HUNYUAN = Decoder(
    "HunyuanVideo's", (8, 4), lambda t, h, w: 2800 * min(8, (t - 1) * 4 + 1) * h * w * 64
)
HUNYUAN_15 = Decoder("HunyuanVideo 1.5's", (16, 4), lambda t, h, w: 3600 * 4 * h * w * 256)
HUNYUAN_IMAGE = Decoder("HunyuanImage's", (32, 1), lambda t, h, w: 700 * h * w * 1024)
MAGE = Decoder("Mage-Flow's", (16, 1), lambda t, h, w: 1000 * h * w * 256)
LTX = Decoder("LTX-Video's", (32, 8), lambda t, h, w: 1200 * t * h * w * 512)

KINDS = {
    "flux": KL,
    "sdxl": KL,
    "flux2": FLUX2,
    "wan2.1": WAN,
    "wan2.2": WAN_22,
    "hunyuanvideo": HUNYUAN,
    "hunyuanvideo-1.5": HUNYUAN_15,
    "hunyuanimage": HUNYUAN_IMAGE,
    "mage-flow": MAGE,
    "ltx": LTX,
}
"""By the names of published VAEs, in published.json."""


def decoder_of(shapes: Shapes) -> Decoder | None:
    """The kind of a VAE; None for one that the plan does not know (of sound, of shapes, and some
    of video).
    """
    if "decoder.middle.0.residual.0.gamma" in shapes:
        return WAN_22 if "decoder.upsamples.0.upsamples.0.residual.2.weight" in shapes else WAN
    if "student.dconv_encoder.proj_out.weight" in shapes:
        return MAGE
    if "decoder.up_blocks.0.res_blocks.0.conv1.conv.weight" in shapes:
        return LTX
    if "decoder.conv_in.conv.weight" in shapes:
        if "decoder.mid_block.resnets.0.norm1.norm_layer.weight" in shapes:
            return None  # CogVideoX
        return HUNYUAN_15 if shapes["decoder.conv_in.conv.weight"][1] == 32 else HUNYUAN
    return _of_pictures(shapes)


def _of_pictures(shapes: Shapes) -> Decoder | None:
    # under ComfyUI's names and under diffusers'
    if "decoder.conv_in.weight" not in shapes or len(shapes["decoder.conv_in.weight"]) != 4:
        # small approximate decoders: ComfyUI plans for them as for a whole one
        return KL if "taesd_decoder.1.weight" in shapes else None
    if shapes["decoder.conv_in.weight"][1] == 64:
        return HUNYUAN_IMAGE
    return FLUX2 if "bn.running_mean" in shapes else KL
