"""nibble plan MODEL: what encoding, sampling and decoding will take, before anything is
made.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused
from ..files.memory import published, weights
from ..files.memory.comfyui import GIB
from ..files.memory.stages import Loadout, Stage, Work
from ..files.memory.switches import Plan, gigabytes, make
from ..files.report import Report
from ..files.source import Source
from ..interop.opening import is_4bit, open_4bit
from ..svdquant.quantize import predict
from ..svdquant.recipe import Recipe

CPU = "cpu"
_T = TypeVar("_T")


def plan(options: argparse.Namespace) -> None:
    """Prints a plan."""
    made = make(loadout(options), work(options))
    if options.json:
        print(json.dumps(_facts(made), indent=1))
    else:
        _print(made)


def work(options: argparse.Namespace) -> Work:
    """What is to be made. Raises ValueError for a size that nothing can have."""
    size = (options.width, options.height or options.width)
    numbers = (*size, options.batch, options.frames)
    if min(numbers) < 1 or options.references < 0 or options.ram <= 0:
        raise ValueError(
            "a picture has a width and height, a batch and a video at least one picture, and there"
            " is some RAM; give numbers above 0."
        )
    return Work(
        size=size,
        pictures=options.batch,
        frames=options.frames,
        references=options.references,
        card=card_bytes(options.card),
        ram=int(options.ram * 1e9),
    )


def card_bytes(text: str) -> int | None:
    """'8 GB', '8' → bytes, in the GiB that cards are sold in; 'cpu' → None. Raises ValueError."""
    if text.strip().lower() == CPU:
        return None
    number = text.strip().lower().removesuffix("gb").removesuffix("gib").strip()
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if not 1 < size < 10_000:
        raise ValueError(
            f"--card {text!r} is no size of a graphics card; give one such as '8 GB', or cpu."
        )
    return int(size * GIB)


def loadout(options: argparse.Namespace) -> Loadout:
    """What the options name; of a published model the encoders and the VAE too, where none is
    named. Raises FileRefused.
    """
    row = published.models().get(options.model, {})
    encoders = options.encoder or row.get("encoders", [])
    vae = options.vae or row.get("vae")
    return Loadout(
        model(options.model),
        tuple(map(encoder, encoders)),
        None if vae is None else vae_weights(vae),
        tuple(weights.lora_of(Path(name)) for name in options.lora or ()),
    )


def model(name: str) -> weights.ModelWeights:
    """A model by its file, or a published one by its name. Raises FileRefused."""
    return _found(name, weights.published, model_of_file, published.models(), "model")


def model_of_file(path: Path) -> weights.ModelWeights:
    """A model's file, quantized by any program, or not yet. Raises FileRefused."""
    return weights.model_of(path, _opened, _predicted)


def encoder(name: str) -> weights.EncoderWeights:
    """A text encoder likewise."""
    return _found(
        name, weights.published_encoder, weights.encoder_of, published.encoders(), "text encoder"
    )


def vae_weights(name: str) -> weights.VaeWeights:
    """A VAE likewise."""
    return _found(name, weights.published_vae, weights.vae_of, published.vaes(), "VAE")


def _found(
    name: str,
    known: Callable[[str], _T | None],
    of_file: Callable[[Path], _T],
    names: Iterable[str],
    what: str,
) -> _T:
    path = Path(name)
    if path.exists() or path.suffix == ".safetensors":
        return of_file(path)
    found = known(name)
    if found is None:
        raise FileRefused(
            f"{name} is no file and no {what} that the plan knows; give a file or one of"
            f" {', '.join(names)}."
        )
    return found


def _opened(path: Path) -> QuantizedFile | None:
    return open_4bit(path) if path.is_dir() or is_4bit(path) else None


def _predicted(source: Source) -> Report:
    recipe = Recipe.from_preset("fast")
    return predict(source.shapes, recipe, source.name, source.bytes, source.kept_dtype)


# ---- for people, and as JSON


def _print(made: Plan) -> None:
    for stage in made.stages:
        peaks = [f"{gigabytes(stage.ram_peak)} of RAM"]
        if made.work.card is not None:
            peaks.insert(0, f"{gigabytes(stage.peak)} of the card's {gigabytes(made.work.room)}")
        print(f"{stage.name}: {', '.join(peaks)}")
        for part in stage.card or stage.ram:
            stays = " (stays while there is room)" if part.kind == "stays" else ""
            print(f"  {gigabytes(part.bytes):>9}  {part.label}{stays}")
        if stage.streamed:
            print(f"  {gigabytes(stage.streamed):>9}  of its weights in RAM, for every step")
    for switch in made.switches:
        state = "on" if switch.on else "not needed"
        print(f"{switch.name}: {state}, saves {gigabytes(switch.saves)} in {switch.stage}")
        print(f"  costs: {switch.costs}")
        print(f"  how: {switch.how}")
    for note in notes(made):
        print(f"note: {note}")
    print(made.verdict)


def notes(made: Plan) -> list[str]:
    """What the plan could not know, in sentences."""
    found = []
    if not made.loadout.model.sampler.known:
        found.append("this model's class is not known, so ComfyUI's default is taken for a step")
    if not made.loadout.encoders:
        found.append("no text encoder is named; reading the prompt is left out")
    vae = made.loadout.vae
    if vae is None and made.loadout.model.sampler.ratios[0] > 1:
        found.append("no VAE is named; decoding is left out")
    elif vae is not None and vae.decoder is None:
        found.append(f"how much {vae.name} takes to decode is not known; decoding is left out")
    return found


def _facts(made: Plan) -> dict:
    return {
        "verdict": made.verdict,
        "card": made.work.room,
        "ram": made.work.ram,
        "stages": [_stage_facts(stage) for stage in made.stages],
        "as_it_is": [_stage_facts(stage) for stage in made.before],
        "switches": [asdict(switch) for switch in made.switches],
        "notes": notes(made),
    }


def _stage_facts(stage: Stage) -> dict:
    return asdict(stage) | {"peak": stage.peak, "ram_peak": stage.ram_peak}
