"""Which model a file holds, and what becomes of each of its linears. The knowledge is data, in
architectures.json; here are the rules.

A linear in a transformer block gets 4-bit weights and activations (w4a4); one that sees few tokens,
such as modulation, 4-bit weights only (w4a16); embedders, final layers and small text refiners stay
as they are (keep). Weights whose shapes ComfyUI reads to tell which model it has are never touched,
whatever the recipe says: the 4-bit file must be recognised as its source was. A transformer of no
known family gets a plan by its names and shapes (universal_plan.py).
"""

import itertools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import kinds, text_encoders, universal_plan
from .errors import FORMS, FileRefused

GROUP = 64
# share of a layer's inputs that zeros may be in number, to fill up its last group
_MOST_ZEROS = 1 / 8
# what an entry of architectures.json may list
_LISTS = ("all", "any", "blocks", "modulation", "sensitive", "few_tokens", "detects", "post_gelu")
GUESSED = (
    "Nibble does not know this model, so its plan was guessed from the names and shapes of its"
    " layers; look through the pictures, and name layers in keep_layers (--keep) to leave them in"
    " 16 bit"
)
"""What a report says of a guessed plan."""


@dataclass(frozen=True)
class Architecture:
    """A model family: keys that it has (all of `all`, one of `any`), `sizes` that some of them
    begin with, and patterns on module names. sensitive: layers of the blocks that get 4-bit
    weights alone; few_tokens: layers beside the modulation that do, too; guessed: by
    universal_plan. Of a text encoder (`encoder`), rows8: what gets 8-bit rows.
    """

    name: str
    all: tuple[str, ...]
    any: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    modulation: tuple[str, ...] = ()
    detects: tuple[str, ...] = ()
    keep: tuple[tuple[str, str], ...] = ()
    post_gelu: tuple[str, ...] = ()
    shared_input: tuple[tuple[str, ...], ...] = ()
    sensitive: tuple[str, ...] = ()
    few_tokens: tuple[str, ...] = ()
    guessed: bool = False
    sizes: tuple[tuple[str, tuple[int, ...]], ...] = ()
    encoder: bool = False
    rows8: tuple[str, ...] = ()

    def is_of(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether a model of these tensors is of this family."""
        return (
            all(key in shapes for key in self.all)
            and (not self.any or any(key in shapes for key in self.any))
            and all(tuple(shapes.get(key, ())[: len(size)]) == size for key, size in self.sizes)
        )


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of a linear: action 'w4a4', 'w4a16', 'rows8' or 'keep', and why. K inputs, N
    outputs (of a table of embeddings: its width, its rows);
    `columns` of its matrix in the file: K, and zeros up to whole groups;
    `group` names the linears that read the same input (None: nobody else does); post_gelu: its
    input comes straight from a GELU, so it may be quantized without a sign.
    """

    name: str
    action: str
    why: str
    K: int
    N: int
    bias: bool
    post_gelu: bool = False
    group: str | None = None

    @property
    def columns(self) -> int:
        return whole_groups(self.K)


def by_input(layers: Iterable[LayerPlan]) -> list[list[LayerPlan]]:
    """Layers that read one input together, as they stand side by side; most are alone."""
    groups = itertools.groupby(layers, key=lambda layer: layer.group or layer.name)
    return [list(members) for _, members in groups]


def whole_groups(k: int) -> int:
    """K rounded up to whole groups."""
    return -(-k // GROUP) * GROUP


@lru_cache(maxsize=1)
def _data() -> dict:
    return json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


@lru_cache(maxsize=1)
def families() -> tuple[Architecture, ...]:
    """Every family that can be quantized, in the order in which they are tried."""

    def build(entry: dict) -> Architecture:
        lists: dict[str, Any] = {key: tuple(entry.get(key, ())) for key in _LISTS}
        return Architecture(
            name=entry["name"],
            keep=tuple(entry.get("keep", {}).items()),
            shared_input=tuple(map(tuple, entry.get("shared_input", ()))),
            sizes=tuple((key, tuple(size)) for key, size in entry.get("sizes", {}).items()),
            **lists,
        )

    entries = {entry["name"]: entry for entry in _data()["families"]}
    return tuple(build(entries.get(entry.get("like"), {}) | entry) for entry in entries.values())


def recognise(
    shapes: Mapping[str, tuple[int, ...]], file: str, native: bool = False
) -> Architecture:
    """The family of a model, from its tensors' names; a guess for transformers of no known family.
    native: the names are surely ComfyUI's own, as a live model's are, and not only diffusers'.
    Raises FileRefused for what is no diffusion transformer or text encoder, saying what it is;
    `file` is its name in that.
    """
    _refuse(_data()["refused_first"], shapes, file)
    for family in families():
        if family.is_of(shapes):
            return family
    encoder = text_encoders.family_of(shapes)
    if encoder is not None:
        return _encoder(encoder)
    text_encoders.refuse(shapes, file)
    _refuse(_refused_last(native), shapes, file)
    guess = universal_plan.guess(shapes)
    if guess is not None:
        return _guessed(guess)
    kind = kinds.kind_of(shapes)
    if kind is not None and kind.folder != "diffusion_models":
        raise FileRefused(
            f"{file} is {kind.what} and not a diffusion model: it belongs in models/{kind.folder};"
            " choose a file from the diffusion_models folder."
        )
    raise FileRefused(
        f"{file} holds no diffusion transformer: it has no blocks that repeat and read a time step"
        f" (its first tensors are {', '.join(sorted(shapes)[:3])}); choose a file from the"
        " diffusion_models folder."
    )


def _refused_last(native: bool) -> list[dict]:
    entries = _data()["refused_last"]
    return [entry for entry in entries if not (native and entry.get("files_only"))]


def _guessed(guess: universal_plan.Guess) -> Architecture:
    return Architecture(
        name=universal_plan.NAME,
        all=(),
        blocks=guess.blocks,
        modulation=guess.modulation,
        keep=tuple(guess.keep.items()),
        shared_input=guess.shared_input,
        sensitive=guess.sensitive,
        guessed=True,
    )


def _encoder(encoder: text_encoders.TextEncoder) -> Architecture:
    return Architecture(
        name=encoder.name,
        all=encoder.all,
        blocks=encoder.blocks,
        keep=encoder.keep,
        encoder=True,
        rows8=encoder.rows8,
    )


def family_name(shapes: Mapping[str, tuple[int, ...]], file: str) -> str:
    """The family's name of a model under ComfyUI's names, also of those that come in 4 bits only.
    Raises FileRefused as `recognise` does.
    """
    for family in families():
        if family.is_of(shapes):
            return family.name
    encoder = text_encoders.family_of(shapes)
    if encoder is None and universal_plan.is_transformer(shapes):
        return universal_plan.NAME
    return recognise(shapes, file, native=True).name


def _refuse(entries: Iterable[dict], shapes: Mapping[str, tuple], file: str) -> None:
    for entry in entries:
        exact = [pattern for pattern in entry["any"] if "*" not in pattern]
        loose = [pattern for pattern in entry["any"] if "*" in pattern]
        if any(key in shapes for key in exact) or any(
            fnmatchcase(key, pattern) for key in shapes for pattern in loose
        ):
            raise FileRefused(f"{file} {entry['why'].format(forms=FORMS)}.")


def plan(
    shapes: Mapping[str, tuple[int, ...]],
    architecture: Architecture,
    recipe,
    file: str = "The model",
) -> list[LayerPlan]:
    """A plan for every matrix of a model, in the order of its blocks. `recipe` has rank,
    modulation, act_unsigned, keep and w4a16. Raises FileRefused when nothing could be quantized,
    and for a layer that is missing between others of its kind.
    """
    names = [
        key.removesuffix(".weight")
        for key, shape in shapes.items()
        if key.endswith(".weight") and len(shape) == 2
    ]
    # what a model of unknown make leaves out in between is its own affair
    missing = None if architecture.guessed else _gap(names, architecture.blocks)
    if missing is not None:
        raise lacking(file, missing)
    layers = [
        _plan_layer(name, shapes, architecture, recipe) for name in sorted(names, key=natural)
    ]
    if all(layer.action == "keep" for layer in layers):
        of_blocks = architecture.blocks or tuple(pattern for pattern, _ in architecture.keep)
        why = next(
            (layer.why for layer in layers if _matches(of_blocks, layer.name)),
            "it has no transformer blocks",
        )
        raise FileRefused(
            f"{file} has no layer that could be quantized to 4 bits ({why}); use it in 16 bit."
        )
    return _grouped(layers, architecture)


def lacking(file: str, layer: str) -> FileRefused:
    """The refusal of a source without a layer."""
    return FileRefused(
        f"{file} lacks the layer {layer}, so the file is not complete; download it again."
    )


def missing_layer(
    shapes: Mapping[str, tuple[int, ...]], built: Iterable[str], file: str
) -> FileRefused | None:
    """The refusal of a source that lacks a layer of its blocks. built: the linears of the model as
    ComfyUI builds it.
    """
    blocks = recognise(shapes, file, native=True).blocks
    absent = (name for name in built if f"{name}.weight" not in shapes and _matches(blocks, name))
    name = next(absent, None)
    return None if name is None else lacking(file, name)


def _gap(names: Iterable[str], patterns: Iterable[str]) -> str | None:
    """A layer that is missing in a block while blocks before and behind have it. Some families
    leave a layer out in their first or last blocks.
    """
    known = set(names)
    for pattern in patterns:
        before, star, behind = pattern.partition("*")
        if not star or "*" in behind:
            continue
        numbers = [
            int(middle)
            for name in known
            if name.startswith(before)
            and name.endswith(behind)
            and (middle := name[len(before) : len(name) - len(behind)]).isdigit()
        ]
        for number in range(min(numbers, default=0), max(numbers, default=-1)):
            if f"{before}{number}{behind}" not in known:
                return f"{before}{number}{behind}"
    return None


def natural(name: str) -> list:
    """A sort key that puts block 2 before block 10."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name)
    ]


def _plan_layer(
    name: str, shapes: Mapping[str, tuple[int, ...]], architecture: Architecture, recipe
) -> LayerPlan:
    n, k = shapes[f"{name}.weight"]
    bias = f"{name}.bias" in shapes
    action, why = _action(name, architecture, recipe)
    if action == "rows8" and not getattr(recipe, "rows8", False):
        action, why = "keep", "16 bit: embeddings, heads and vision towers"
    elif action in ("w4a4", "w4a16") and whole_groups(k) - k > k * _MOST_ZEROS:
        action, why = "keep", f"K={k} would need too many zeros for whole groups of {GROUP}"
    elif action == "w4a4" and min(n, k) < 2 * recipe.rank:
        action = "keep"
        why = f"{n} x {k} is too small to gain from 4 bits beside a rank of {recipe.rank}"
    # The shift of unsigned activations goes into the bias, so there must be one.
    post_gelu = (
        action == "w4a4" and bias and recipe.act_unsigned and _matches(architecture.post_gelu, name)
    )
    return LayerPlan(name, action, why, k, n, bias, post_gelu)


def _action(name: str, architecture: Architecture, recipe) -> tuple[str, str]:
    if _matches(architecture.detects, name):
        return "keep", "its shape tells ComfyUI which model this is"
    if _matches(recipe.keep, name):
        return "keep", "16 bit, as asked for"
    if _matches(recipe.w4a16, name):
        return "w4a16", "4-bit weights only, as asked for"
    if _matches(architecture.sensitive, name):
        return "w4a16", "4-bit weights only: the most fragile layers of the first and last blocks"
    if _matches(architecture.few_tokens, name):
        return "w4a16", "sees few tokens"
    if _matches(architecture.modulation, name):
        return (
            ("w4a16", "sees few tokens")
            if recipe.modulation != "keep"
            else ("keep", "modulation in 16 bit, as asked for")
        )
    if _matches(architecture.rows8, name):
        return "rows8", "8-bit rows: embeddings, heads and vision towers"
    if _matches(architecture.blocks, name):
        if architecture.encoder and getattr(recipe, "format", "") == "svdquant_w4a4":
            return "w4a16", "4-bit weights: the inputs of a text encoder's blocks stay in 16 bit"
        return "w4a4", "transformer block"
    return "keep", next(
        (why for pattern, why in architecture.keep if fnmatchcase(name, pattern)),
        "not part of a transformer block",
    )


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _grouped(layers: list[LayerPlan], architecture: Architecture) -> list[LayerPlan]:
    """Names the groups of W4A4 linears that read one input, and puts their members side by side."""
    members: dict[str, list[LayerPlan]] = {}
    for layer in layers:
        members.setdefault(_group(layer, architecture) or layer.name, []).append(layer)
    grouped = []
    for group, layers_of_group in members.items():
        shared = group if len(layers_of_group) > 1 else None
        grouped += [LayerPlan(**{**vars(layer), "group": shared}) for layer in layers_of_group]
    return grouped


def _group(layer: LayerPlan, architecture: Architecture) -> str | None:
    if layer.action == "w4a4":
        for patterns in architecture.shared_input:
            for pattern in patterns:
                if fnmatchcase(layer.name, pattern):
                    stem = layer.name.removesuffix(pattern.lstrip("*"))
                    return stem + "|".join(p.lstrip("*") for p in patterns)
    return None
