"""The plan of a diffusion transformer that no family of architectures.json is: guessed from the
names and shapes of its weights.

What every such model has in common is a stack: the same layers again and again, told apart by a
number in their names. The rules, in this order:

    no stack, or nothing that reads a time step     it is no diffusion transformer (None)
    outside of the stacks                           kept, but for shared modulation (below)
    a small stack, or one beside the largest that
      is named after text, pictures or refining     kept: small, or no part of the denoising
    fewer than `LEAST` weights                      kept: little to gain
    named after modulation or time, or as many
      outputs as 6, 9 or 12 vectors of its width    4-bit weights alone: it sees few tokens
    the layers that narrow (K > N), but for keys
      and values, in the first and last block
      of a stack of `DEEP` and more                 4-bit weights alone: the most fragile ones
    the rest                                        4-bit weights and activations

That layers which narrow are the most fragile: arXiv 2606.12280 (Ideogram 4), and that the first and
last blocks are: what people leave out when they quantize MiniMax H3. Projections of one input are
found by their names alone, so only those that always share one are grouped.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

NAME = "a transformer of its own (plan guessed)"
LEAST = 1_000_000
"""Weights of a linear that gains from 4 bits."""
FEWEST_BLOCKS = 3
DEEP = 8
"""Blocks of a stack that has a first and a last one worth protecting."""
SMALL = 0.05
"""Share of all repeated weights below which a stack is kept."""
MODULATION_VECTORS = (6, 9, 12)
"""Shifts, scales and gates of blocks of two, three and four parts; 8 is a gated feed-forward, 7 a
fused block of FLUX.
"""

_NUMBER = re.compile(r"([A-Za-z_]*)(\d+)$")
_TIME = re.compile(r"(?i)(^|[._])(time|timestep|t_emb|t_block|temb|sigma|noise|ada_?ln|ada\.)")
_FEW_TOKENS = re.compile(
    r"(?i)(^|[._])(ada\w*|\w*modulation\w*|\w*_?mod|(?-i:mod[A-Z_])\w*|time\w*|t_block|t_emb\w*"
    r"|emb_layers)(\.|$)|(^|\.)\w*norm\w*\.(linear|proj|fc|lin|1)(\.|$)"
)
_HELPER = re.compile(
    r"(?i)(^|[._])(\w*refiner|\w*connector|\w*adapter|\w*embed\w*|\w*encoder\w*|\w*tokenizer"
    r"|resampler|vision\w*|visual|text|text_model|llm|lyric\w*|projectors?)(\.|$)"
)
_END = re.compile(r"(?i)(^|[._])(final\w*|norm_out|proj_out|out|head|last\w*|output\w*)(\.|$)")
_KEYS = re.compile(r"(^|[._])(to_|c_|w|linear_)?[kv](_proj)?$|(^|[._])(to_)?kv(_proj)?$")
_SHARED = (
    ("to_k", "to_v"),
    ("k_proj", "v_proj"),
    ("add_k_proj", "add_v_proj"),
    ("k", "v"),
    ("wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("linear_1", "linear_3"),
)


class Guess(NamedTuple):
    """Patterns on module names, as in architectures.json. sensitive: whole names, weights alone."""

    blocks: tuple[str, ...]
    modulation: tuple[str, ...]
    sensitive: tuple[str, ...]
    keep: dict[str, str]
    shared_input: tuple[tuple[str, ...], ...]


class _Place(NamedTuple):
    """Where a linear stands: what is before its block's number, the number, what is behind."""

    stack: str
    block: int
    inner: str

    @property
    def pattern(self) -> str:
        return f"{self.stack}*{self.inner}"


def linears(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, int]]:
    """Name → (N, K) of every matrix."""
    return {
        key.removesuffix(".weight"): (shape[0], shape[1])
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) == 2
    }


def is_transformer(names: Iterable[str]) -> bool:
    """Whether a model of these tensors has a stack, and reads a time step."""
    names = list(names)
    return bool(_places(names)) and _reads_time(names)


def _reads_time(names: Iterable[str]) -> bool:
    return any(_TIME.search(name) for name in names)


def guess(shapes: Mapping[str, tuple[int, ...]]) -> Guess | None:
    """The plan of a model from its tensors' names and shapes; None for what is no diffusion
    transformer.
    """
    sizes = linears(shapes)
    places = _places(sizes)
    if not places or not _reads_time(shapes):
        return None
    kept = _kept_stacks(places, sizes)
    inside = {name: place for name, place in places.items() if place.stack not in kept}
    large = {name for name in inside if math.prod(sizes[name]) >= LEAST}
    few = {name for name in sizes if _sees_few_tokens(name, sizes[name], places.get(name))}
    modulation = {inside[name].pattern for name in large & few}
    modulation |= {name for name in few - places.keys() if math.prod(sizes[name]) >= LEAST}
    return Guess(
        blocks=_unique(inside[name].pattern for name in large - few),
        modulation=_unique(modulation),
        sensitive=_unique(_fragile({name: inside[name] for name in large - few}, sizes)),
        keep={f"{stack}*": why for stack, why in kept.items()}
        | {inside[name].pattern: _LITTLE for name in inside.keys() - large},
        shared_input=_shared(inside[name].inner for name in large - few),
    )


_LITTLE = f"fewer than {LEAST:,} weights: little to gain"


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))


def _places(names: Iterable[str]) -> dict[str, _Place]:
    """Where the repeated ones among linears stand: by the first number in their names that tells
    `FEWEST_BLOCKS` and more blocks apart, of which no block is one layer alone.
    """
    candidates: dict[str, list[_Place]] = {}
    blocks: dict[str, set[int]] = {}
    layers: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for index, part in enumerate(parts[:-1]):
            found = _NUMBER.match(part)
            if found is None:
                continue
            stack = ".".join([*parts[:index], found[1]])
            inner = "." + ".".join(parts[index + 1 :])
            candidates.setdefault(name, []).append(_Place(stack, int(found[2]), inner))
            blocks.setdefault(stack, set()).add(int(found[2]))
            layers.setdefault(stack, set()).add(inner)
    real = {
        stack
        for stack, numbers in blocks.items()
        if len(numbers) >= FEWEST_BLOCKS and len(layers[stack]) > 1
    }
    chosen = {}
    for name, several in candidates.items():
        place = next((place for place in several if place.stack in real), None)
        if place is not None:
            chosen[name] = place
    return chosen


def _kept_stacks(
    places: Mapping[str, _Place], sizes: Mapping[str, tuple[int, int]]
) -> dict[str, str]:
    """Stack → why it stays in 16 bit."""
    weights: dict[str, int] = {}
    for name, place in places.items():
        weights[place.stack] = weights.get(place.stack, 0) + math.prod(sizes.get(name, (0,)))
    total, largest = sum(weights.values()), max(weights, key=weights.__getitem__)
    kept = {}
    for stack, count in weights.items():
        if stack != largest and _HELPER.search(stack):
            kept[stack] = "16 bit: encodes or refines what the transformer reads"
        elif count < SMALL * total:
            kept[stack] = "16 bit: a small stack beside the transformer"
    return kept


def _sees_few_tokens(name: str, size: tuple[int, int], place: _Place | None) -> bool:
    """Whether a linear makes shifts, scales and gates."""
    n, k = size
    if place is None:  # one that all blocks share
        return n >= 2 * k and _FEW_TOKENS.search(name) is not None and not _END.search(name)
    if _FEW_TOKENS.search(place.inner):
        return True
    return n % k == 0 and n // k in MODULATION_VECTORS


def _fragile(places: Mapping[str, _Place], sizes: Mapping[str, tuple[int, int]]) -> Iterable[str]:
    """The linears that narrow in the first and last blocks of deep stacks."""
    blocks: dict[str, set[int]] = {}
    for place in places.values():
        blocks.setdefault(place.stack, set()).add(place.block)
    for name, place in places.items():
        numbers, (n, k) = blocks[place.stack], sizes[name]
        at_an_end = place.block in (min(numbers), max(numbers))
        if len(numbers) >= DEEP and at_an_end and k > n and not _KEYS.search(name):
            yield name


def _shared(inner: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Sets of projections that always read one input, by their names behind the block's number."""
    known = set(inner)
    groups = set()
    for name in known:
        parent, _, last = name.rpartition(".")
        for names in _SHARED:
            together = tuple(f"{parent}.{one}" for one in names)
            if last in names and known.issuperset(together):
                groups.add(tuple(f"*{one}" for one in together))
    return tuple(sorted(groups))
