"""What a quantized file says to people and to other programs: what opens it, and the `modelspec.*`
entries of the model that it was made of (title, author, licence, thumbnail, …), as Stability AI's
Model Metadata Standard has them.
"""

from collections.abc import Mapping

PREFIX = "modelspec."
REQUIRES = "requires"  # the key of what opens the file
_OPENED_BY = (
    "ComfyUI with the Nibble node pack (https://github.com/nibble-team/ComfyUI-Nibble): Load"
    " SVDQuant Model, or with the pack installed Load Diffusion Model"
)
_TITLE = f"{PREFIX}title"
_HASH = f"{PREFIX}hash_sha256"  # of the source's weights
_MADE_BY = {"svdquant": "SVDQuant, 4 bit", "vq": "vector-quantized"}


def described(of_source: Mapping[str, str], method: str | None = None) -> dict[str, str]:
    """A source's metadata as Nibble's file of it has them, without the hash of its weights. method:
    by which it was quantized ('svdquant' or 'vq'), which the title then says; None: it was before.
    """
    kept = {key: value for key, value in of_source.items() if key != _HASH}
    if method and _TITLE in kept:
        kept[_TITLE] = f"{kept[_TITLE]} ({_MADE_BY[method]})"
    return kept | {REQUIRES: _OPENED_BY}


def modelspec_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """The `modelspec.*` entries alone, without the hash: for the same weights in another format."""
    return {
        key: value for key, value in metadata.items() if key.startswith(PREFIX) and key != _HASH
    }
