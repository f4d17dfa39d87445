"""What ComfyUI sets aside for a model at work, and how much of the model it then loads: its own
arithmetic (0.33, comfy/model_base.py and comfy/model_management.py), so that a plan needs neither
ComfyUI nor a GPU.

    sampling  = area * bytes * 0.01 * factor MiB            BaseModel.memory_required, where
                                                            attention is torch's flash attention
    area      = pictures * latent frames * height * width   of the latent, references included
    set aside = max(0.8 GiB + reserve, sampling + reserve)  load_models_gpu
    loaded    = max(0, free - set aside, min(0.4 free, free - 0.8 GiB - reserve))

What of the weights is not loaded stays in RAM and is brought to the GPU in each step. factor is the
model class's `memory_usage_factor` (published.json). On a CPU ComfyUI's own formula is that of
attention which writes its whole matrix, and its attention there goes through it in parts: measured
at a megapixel of FLUX.1, a step holds twice what the formula above says (docs/benchmarks.md).
Decoding a picture holds less there than ComfyUI sets aside for a GPU: 0.43 of its estimate, of
which 0.30 are the tensors that are alive at once. Of videos nothing was measured.
"""

from __future__ import annotations

MIB, GIB = 1 << 20, 1 << 30
RESERVE = 400 * MIB
"""`EXTRA_RESERVED_VRAM` on Linux; on Windows it is 600 MiB, 700 on cards of 16 GB and more."""
ON_A_CPU = 2
"""By how much a step is taken to hold more there."""
_LEAST = 0.8 * GIB
_LEAST_SHARE = 0.4  # MIN_WEIGHT_MEMORY_RATIO


def sampling(factor: float, area: int, itemsize: int) -> int:
    """Bytes that a step takes. area: positions of the latents; itemsize: bytes of a number."""
    return int((area * itemsize * 0.01 * factor) * MIB)


def set_aside(needed: float) -> int:
    """Bytes that no weights may take while something that needs `needed` bytes is computed."""
    return int(max(_LEAST + RESERVE, needed + RESERVE))


def loaded(weights: int, free: int, needed: float) -> int:
    """Bytes of a model's weights that are loaded where `free` bytes are."""
    floor = min(free * _LEAST_SHARE, free - _LEAST - RESERVE)
    return int(min(weights, max(0, free - set_aside(needed), floor)))


def latent_frames(frames: int, temporal: int) -> int:
    """Frames of the latent of a video; 1 for a picture."""
    return (frames - 1) // temporal + 1


def area(size: tuple[int, int], frames: int, ratios: tuple[int, int]) -> int:
    """Positions of one latent. size: (width, height) in pixels; ratios: pixels for each position,
    frames for each.
    """
    spatial, temporal = ratios
    return latent_frames(frames, temporal) * (size[0] // spatial) * (size[1] // spatial)
