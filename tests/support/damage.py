"""Files damaged on purpose, the same for the same seed.

    for what, content in damages(path, seed): …    each one fault, never the file as it was

A safetensors file is damaged in its bytes, in its header's text and in what its header says; a file
of another kind in its bytes, and JSON in its values.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

DEEP = 100_000  # brackets: past any parser's recursion
HUGE = 2**63 - 1
_WIDTHS = {"F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_WIDTHS |= {"U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1, "F64": 8, "I64": 8}
_NAN = {"F32": b"\x00\x00\xc0\x7f", "F16": b"\x00\x7e", "BF16": b"\xc0\x7f"}
_INFINITE = {"F32": b"\x00\x00\x80\xff", "F16": b"\x00\xfc", "BF16": b"\x80\xff"}
Table = dict
Change = Callable[[Table, random.Random], None]


def damages(path: str | Path, seed: int, flips: int = 4) -> Iterator[tuple[str, bytes]]:
    """(what was done, the file's bytes afterwards). flips: bits flipped, of data and of header
    each.
    """
    content, draw = Path(path).read_bytes(), random.Random(seed)
    if content[8:9] == b"{":
        candidates = _of_safetensors(content, draw, flips)
    elif content[:1] in (b"{", b"["):
        candidates = _of_json(content, draw, flips)
    else:
        candidates = _of_bytes(content, draw, flips)
    yield from ((what, damaged) for what, damaged in candidates if damaged != content)


def flipped(content: bytes, bit: int) -> bytes:
    """With one bit the other way."""
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def split(content: bytes) -> tuple[Table, bytes]:
    """(what a safetensors file's header says, its data)."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(table: Table | bytes, data: bytes) -> bytes:
    """A safetensors file of a header and data, whether or not they fit."""
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + data


def _of_bytes(content: bytes, draw: random.Random, flips: int) -> Iterator[tuple[str, bytes]]:
    yield "emptied", b""
    yield "a byte too many", content + b"\0"
    for cut in (1, draw.randrange(1, len(content)), len(content) - 1):
        yield f"cut to {cut} bytes", content[:cut]
    for _ in range(flips):
        bit = draw.randrange(8 * len(content))
        yield f"bit {bit} flipped", flipped(content, bit)


def _of_safetensors(content: bytes, draw: random.Random, flips: int) -> Iterator[tuple[str, bytes]]:
    table, data = split(content)
    begin = len(content) - len(data)
    yield from _of_bytes(content, draw, flips)
    for _ in range(flips):
        bit = draw.randrange(8 * begin)
        yield f"header bit {bit} flipped", flipped(content, bit)
    for _ in range(flips if data else 0):
        bit = draw.randrange(8 * begin, 8 * len(content))
        yield f"data bit {bit} flipped", flipped(content, bit)
    yield "header nested deeply", joined(b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}", data)
    yield "header is a list", joined(b'{"__metadata__":[]}', data)
    for what, change in _CHANGES:
        changed = json.loads(json.dumps(table))
        if _has(changed, what):
            change(changed, draw)
            yield what, joined(changed, data)
    for kind, values in (("NaN", _NAN), ("infinity", _INFINITE)):
        yield from _with_value(table, data, kind, values, draw)
    yield from _of_metadata(table, data, draw)


def _has(table: Table, what: str) -> bool:
    tensors = len(table) - ("__metadata__" in table)
    return tensors >= 2 if "two tensors" in what else tensors >= 1


def _tensor(table: Table, draw: random.Random) -> str:
    return draw.choice(sorted(table.keys() - {"__metadata__"}))


def _other_dtype(table: Table, draw: random.Random) -> None:
    entry = table[_tensor(table, draw)]
    width = _WIDTHS.get(entry["dtype"])
    others = [name for name in _WIDTHS if _WIDTHS[name] == width and name != entry["dtype"]]
    entry["dtype"] = draw.choice(others)


def _unknown_dtype(table: Table, draw: random.Random) -> None:
    table[_tensor(table, draw)]["dtype"] = draw.choice(["F7", 5, None])


def _other_shape(table: Table, draw: random.Random) -> None:
    entry = table[_tensor(table, draw)]
    shape = entry["shape"]
    if len(shape) > 1 and shape[0] != shape[-1]:
        entry["shape"] = [shape[-1], *shape[1:-1], shape[0]]
    else:
        entry["shape"] = [1, *shape]


def _huge_shape(table: Table, draw: random.Random) -> None:
    table[_tensor(table, draw)]["shape"] = [HUGE, HUGE]


def _huge_offset(table: Table, draw: random.Random) -> None:
    table[_tensor(table, draw)]["data_offsets"] = [0, HUGE]


def _renamed(table: Table, draw: random.Random) -> None:
    name = _tensor(table, draw)
    table[name + "_"] = table.pop(name)


def _swapped(table: Table, draw: random.Random) -> None:
    one, other = draw.sample(sorted(table.keys() - {"__metadata__"}), 2)
    table[one], table[other] = table[other], table[one]


def _without(table: Table, draw: random.Random) -> None:
    del table[_tensor(table, draw)]


def _number_for_text(table: Table, draw: random.Random) -> None:
    table.setdefault("__metadata__", {})["format"] = 3


_CHANGES: tuple[tuple[str, Change], ...] = (
    ("another dtype", _other_dtype),
    ("an unknown dtype", _unknown_dtype),
    ("another shape", _other_shape),
    ("a huge shape", _huge_shape),
    ("a huge offset", _huge_offset),
    ("a tensor renamed", _renamed),
    ("two tensors swapped", _swapped),
    ("a tensor left out", _without),
    ("metadata that is no text", _number_for_text),
)


def _with_value(
    table: Table, data: bytes, kind: str, values: dict[str, bytes], draw: random.Random
) -> Iterator[tuple[str, bytes]]:
    floats = [
        name
        for name, entry in sorted(table.items())
        if name != "__metadata__" and entry["dtype"] in values and 0 not in entry["shape"]
    ]
    if floats:
        name = draw.choice(floats)
        value, start = values[table[name]["dtype"]], table[name]["data_offsets"][0]
        yield (
            f"{kind} in {name}",
            joined(table, data[:start] + value + data[start + len(value) :]),
        )


def _of_metadata(table: Table, data: bytes, draw: random.Random) -> Iterator[tuple[str, bytes]]:
    metadata = table.get("__metadata__", {})
    for key, text in sorted(metadata.items()):
        others = {name: value for name, value in metadata.items() if name != key}
        yield f"metadata without {key}", joined(table | {"__metadata__": others}, data)
        for what, changed in _texts(text, draw):
            changes = {"__metadata__": {**metadata, key: changed}}
            yield f"metadata {key}: {what}", joined(table | changes, data)


def _texts(text: str, draw: random.Random) -> Iterator[tuple[str, str]]:
    yield "empty", ""
    yield "nested deeply", "[" * DEEP + "]" * DEEP
    yield "a number of 5,000 digits", "9" * 5000
    if text:
        place = draw.randrange(len(text))
        digit = str((int(text[place]) + 1) % 10) if text[place] in "0123456789" else "7"
        yield f"character {place} changed", text[:place] + digit + text[place + 1 :]
    try:
        value = json.loads(text)
    except ValueError:
        return
    for what, changed in _values(value, draw):
        yield what, json.dumps(changed)


def _of_json(content: bytes, draw: random.Random, flips: int) -> Iterator[tuple[str, bytes]]:
    yield from _of_bytes(content, draw, flips)
    yield "nested deeply", b"[" * DEEP + b"]" * DEEP
    yield "no UTF-8", content[:-1] + b"\xff" + content[-1:]
    for what, value in _values(json.loads(content), draw):
        yield what, json.dumps(value).encode()


def _values(value: object, draw: random.Random) -> Iterator[tuple[str, object]]:
    """A JSON value with one entry, at any depth, left out or replaced."""
    places = list(_places(value))
    for other in (None, [], {}, "x", -1, HUGE * 10**300, float("nan")):
        place = draw.choice(places)
        yield (
            f"{'/'.join(map(str, place)) or 'all'} is {str(other)[:12]}",
            _put(value, place, other),
        )
    keys = [place for place in places if place]
    if keys:
        place = draw.choice(keys)
        yield f"without {'/'.join(map(str, place))}", _put(value, place)


def _places(value: object, where: tuple = ()) -> Iterator[tuple]:
    yield where
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _places(part, (*where, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from _places(part, (*where, i))


_NOTHING = object()


def _put(value: object, place: tuple, other: object = _NOTHING) -> object:
    """The value with `other` at a place, or with nothing there."""
    if not place:
        return other
    key, *rest = place
    changed = dict(value) if isinstance(value, dict) else list(value)
    if rest:
        changed[key] = _put(changed[key], tuple(rest), other)
    elif other is _NOTHING:
        del changed[key]
    else:
        changed[key] = other
    return changed
