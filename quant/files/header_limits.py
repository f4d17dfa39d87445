"""What the JSON of a safetensors header may ask of its reader, found out before it is parsed.

A parser makes an object of each value and each string, some hundred bytes for every two of the
text, so a header of the length that the format allows (100 MB) can take minutes and gigabytes.
Counting marks in the text takes milliseconds.
"""

import re
from collections.abc import Iterable
from typing import Any

LARGEST_HEADER = 100_000_000  # safetensors' own limit
# four times the largest model's: what reads every file of a folder, as ComfyUI's start does, goes
# no further
LISTED_HEADER = 8_000_000
MOST_TENSORS = 50_000  # five times those of the largest models
MOST_DIMENSIONS = 8
_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
# of a tensor's entry, with room: five strings between two quotes each; two objects, two lists, and
# a comma before each of its values but the first
_QUOTES, _VALUES = 12, 16


def is_too_long(text: bytes) -> bool:
    """Whether a header's JSON has more strings or values than MOST_TENSORS tensors can have."""
    # quotes of JSON within metadata are escaped
    quotes = text.count(b'"') - text.count(b'\\"')
    if quotes > _QUOTES * MOST_TENSORS:
        return True
    bare = _STRINGS.sub(b"", text)
    return sum(bare.count(mark) for mark in (b",", b"[", b"{")) > _VALUES * MOST_TENSORS


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object (`object_pairs_hook`). Raises ValueError where a key comes twice, of which
    readers would take either.
    """
    table = dict(pairs)
    if len(table) < len(pairs):
        raise ValueError("a key comes twice")
    return table


def check_text(texts: Iterable[object]) -> None:
    """Raises ValueError for what is no text, or text that cannot be written again (half of a
    surrogate pair).
    """
    for text in texts:
        if not isinstance(text, str):
            raise ValueError("metadata that is not text")
        text.encode()
