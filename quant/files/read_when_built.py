"""What ComfyUI reads from a checkpoint beside the diffusion model when it builds the model
(`get_model` in comfy/supported_models.py): without it the model is another one, or cannot be built.

    SDXL            v_pred, ztsnr, edm_vpred.*, edm_mean, edm_std   what the model predicts, noise
    Stable Audio    conditioner.conditioners.seconds_*              tables of start and length
    Stable Audio 3  ... and conditioner.conditioners.prompt.padding_embedding

They stand at the root of a checkpoint, whatever prefix its diffusion model has, and so they do in
the files that are made of it.
"""

from collections.abc import Collection, Iterable

from .errors import FileRefused

_SDXL = frozenset(
    {"v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "edm_mean", "edm_std"}
)
_CONDITIONERS = "conditioner.conditioners."
_STABLE_AUDIO = tuple(
    _CONDITIONERS + name
    for name in ("seconds_start.", "seconds_total.", "prompt.padding_embedding")
)
# what tells Stable Audio in ComfyUI's detection
_IS_STABLE_AUDIO = "transformer.rotary_pos_emb.inv_freq"


def names(tensors: Iterable[str]) -> list[str]:
    """Those of a checkpoint's tensors that are read so, in their order."""
    return [name for name in tensors if name in _SDXL or name.startswith(_STABLE_AUDIO)]


def check(tensors: Collection[str], file: str) -> None:
    """Raises FileRefused for a model that lacks what ComfyUI cannot build it without."""
    if _IS_STABLE_AUDIO in tensors and not any(
        name.startswith(f"{_CONDITIONERS}seconds_total.") for name in tensors
    ):
        raise FileRefused(
            f"{file} lacks the tables of seconds that ComfyUI builds Stable Audio with"
            f" ({_CONDITIONERS}seconds_total); choose the all-in-one checkpoint."
        )
