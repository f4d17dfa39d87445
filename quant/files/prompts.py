"""Prompts to calibrate on: text encoders' outputs, and the picture size they are meant for, as
`quantize --prompts` reads them.

    tokens  (P, T, context), or tokens.0, tokens.1, … (T, context) where lengths differ
    pooled  (P, vector)
    metadata  optional: height and width of the latents, guidance, as JSON numbers
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from . import small
from .errors import FileRefused

FORMAT = "nibble_prompts"
_AGAIN = "save the prompts again"
_NUMBERS = {"height": int, "width": int, "guidance": float}


@dataclass(frozen=True)
class Prompts:
    """Conditioning of P prompts.

    tokens  float32 (T, context), one a prompt
    pooled  float32 (P, vector)
    size    (height, width) of the latents | None: not told
    guidance  the distilled scale | None: not told
    """

    tokens: Sequence[Tensor]
    pooled: Tensor
    size: tuple[int, int] | None = None
    guidance: float | None = None


def write(path: str | os.PathLike, prompts: Prompts) -> None:
    """Writes a file of prompts, all of it or nothing."""
    told: dict[str, float] = {}
    if prompts.size is not None:
        told["height"], told["width"] = prompts.size
    if prompts.guidance is not None:
        told["guidance"] = prompts.guidance
    tensors = {"pooled": prompts.pooled.float().cpu().contiguous()}
    for i, tokens in enumerate(prompts.tokens):
        tensors[f"tokens.{i}"] = tokens.float().cpu().contiguous()
    facts = {name: json.dumps(value) for name, value in told.items()}
    small.write(path, tensors, {"format": FORMAT, **facts})


def read(path: str | os.PathLike) -> Prompts:
    """Reads a file of prompts, one of `write` or a plain one. Raises FileRefused for a file that is
    damaged or holds something else.
    """
    file = small.SmallFile(path, _AGAIN)
    names = file.header.tensors.keys()
    if "pooled" not in names or not names & {"tokens", "tokens.0"}:
        raise FileRefused(
            f"{file.name} lacks the tensors 'tokens' and 'pooled'; save the text encoders' outputs"
            " under these names, or with the node Save Calibration Prompts."
        )
    pooled = file.read("pooled").float()
    if "tokens" in names:
        tokens = list(file.read("tokens").float())
    else:
        count = sum(name.startswith("tokens.") for name in names)
        tokens = [file.read(f"tokens.{i}").float() for i in range(count)]
    told = {
        name: _number(file, name, kind) for name, kind in _NUMBERS.items() if name in file.metadata
    }
    _check(file, tokens, pooled)
    size = (int(told["height"]), int(told["width"])) if {"height", "width"} <= told.keys() else None
    return Prompts(tokens, pooled, size, told.get("guidance"))


def _check(file: small.SmallFile, tokens: list[Tensor], pooled: Tensor) -> None:
    widths = {part.shape[-1] for part in tokens if part.dim() == 2}
    if not tokens or pooled.dim() != 2 or len(pooled) != len(tokens) or len(widths) != 1:
        raise FileRefused(
            f"{file.name} holds no prompts: 'tokens' is to be (P, T, context) and 'pooled' (P,"
            f" vector), of one number of prompts P; {_AGAIN}."
        )


def _number(file: small.SmallFile, name: str, kind: type) -> float:
    value = file.json(name)
    if type(value) not in (int, kind) or not 0 < value < 1e6:
        raise file.damaged(f"its {name} is {value!r}")
    return value
