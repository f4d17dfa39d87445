"""What the metadata of a safetensors file say: text, of which some is JSON or a number."""

import json

from .errors import FileRefused
from .safetensors import Header


def json_object(header: Header, key: str) -> dict:
    """A JSON object in the metadata, {} where there is none. Raises FileRefused for anything
    else.
    """
    try:
        value = json.loads(header.metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise FileRefused(
            f"{header.path.name} has damaged metadata ({key}); copy it again or make it anew."
        )
    return value


def version_of(text: str) -> int:
    """A format's version as a number; -1 for what is none."""
    plain = text.isascii() and text.isdigit() and len(text) < 10
    return int(text) if plain else -1
