"""The files of couplings: an index, the prompts' tensors, and pairs in shards.

`couplings.py` has the format. They are checked when they are read, and whole or not there when they
are written.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...quant.files import small
from ...quant.files.errors import FileRefused
from ...quant.files.safetensors import checksum
from ...quant.files.small import SmallFile

FORMAT, VERSION = "nibble_caf_couplings", 1
INDEX = "couplings.json"
_PAIRS_AGAIN = (
    "delete this file and run Make CAF Couplings again with the same inputs: only its pairs are"
    " made again"
)
CAPTIONS_AGAIN = "copy the folder again, or make the couplings again with overwrite"


class PairPlace(NamedTuple):
    """Where a pair lies: file, row in it, its caption, crc32 of its noise and data."""

    path: Path
    row: int
    caption: int
    checksum: str


def checksum_of(noise: Tensor, data: Tensor) -> str:
    return checksum(torch.cat([noise, data]))


def mark_of(index: dict) -> str:
    """What every file of pairs carries: 32 hex digits of all that they depend on."""
    return hashlib.sha256(
        json.dumps([index["identity"], index["prompts"]], sort_keys=True).encode()
    ).hexdigest()[:32]


def captions_path(folder: Path, index: dict) -> Path:
    return folder / f"captions-{index['prompts']}.safetensors"


def places_of(path: Path, rows: list) -> dict[int, PairPlace]:
    return {
        pair: PairPlace(path, row, caption, checksum)
        for row, (pair, caption, checksum) in enumerate(rows)
    }


def read_index(folder: Path) -> dict | None:
    """The index, checked; None where there is none."""
    try:
        index = small.json_content((folder / INDEX).read_bytes())
        version = index["version"]
        whole = index["format"] == FORMAT and (version != VERSION or _is_index(index))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, *small.WRONG) as error:
        raise damaged(folder / INDEX) from error
    if not whole:
        raise damaged(folder / INDEX)
    if version != VERSION:
        raise FileRefused(
            f"{folder.name} was made by a newer Nibble (version {version}); update Nibble, or make"
            " the couplings again."
        )
    return index


def _is_index(index: dict) -> bool:
    shape, prompts, captions = index["identity"]["shape"], index["prompts"], index["captions"]
    return (
        isinstance(shape, list)
        and all(type(side) is int and side > 0 for side in shape)
        and type(prompts) is str
        and prompts.isalnum()
        and isinstance(captions, list)
        and bool(captions)
    )


def index_of_target(folder: Path, overwrite: bool) -> dict | None:
    """What lies in the folder that is to be written to; it is made where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileRefused(
            f"The folder {folder} cannot be made ({error.strerror}); choose another filename."
        ) from error
    try:
        index = read_index(folder)
    except FileRefused:
        if not overwrite:
            raise
        return None
    if index is None:
        strangers = [
            path.name
            for path in folder.iterdir()
            if not path.name.startswith(("pairs-", "captions-", INDEX))
        ]
        if strangers:
            raise FileRefused(
                f"{folder.name} is a folder of other files ({min(strangers)}); choose another"
                " filename."
            )
    return index


def read_shards(folder: Path, overwrite: bool = False) -> list[tuple[Path, str, list]]:
    """(path, whose, rows) of each file of pairs; damaged ones raise FileRefused, or are nobody's
    where they may be replaced.
    """
    shards = []
    for path in sorted(folder.glob("pairs-*.safetensors")):
        try:
            shards.append((path, *_shard(path)))
        except FileRefused:
            if not overwrite:
                raise
            shards.append((path, "", []))
    return shards


def _shard(path: Path) -> tuple[str, list]:
    """(whose, rows) of a file of pairs. Raises FileRefused for one that is damaged."""
    try:
        file = SmallFile(path, _PAIRS_AGAIN)
        rows, whose = file.json("pairs"), file.metadata["of"]
        noise, data = (file.header.tensors[name] for name in ("noise", "data"))
        whole = (
            file.metadata["format"] == FORMAT
            and len(file.header.tensors) == 2
            and noise.dtype == data.dtype == torch.float32
            and noise.shape == data.shape
            and noise.shape[0] == len(rows) > 0
            and all(
                type(pair) is int and type(caption) is int and type(crc) is str
                for pair, caption, crc in rows
            )
            and all(pair >= 0 and caption >= 0 for pair, caption, _ in rows)
        )
    # FileRefused is a ValueError
    except small.WRONG as error:
        raise damaged(path) from error
    if not whole:
        raise damaged(path)
    return whose, rows


def check_shard(path: Path) -> int:
    """Reads and checks all pairs of a file; how many there are. Raises FileRefused for one that is
    damaged.
    """
    _, rows = _shard(path)
    tensors = SmallFile(path, _PAIRS_AGAIN).tensors()
    for row, (_, _, wanted) in enumerate(rows):
        pair = (tensors[name][row : row + 1] for name in ("noise", "data"))
        if checksum_of(*pair) != wanted:
            raise damaged(path)
    return len(rows)


def gathered(shards: list[tuple[Path, str, list]], index: dict, mark: str) -> dict[int, PairPlace]:
    """Pair → where it lies, of the shards of one run. Raises FileRefused for a pair of a prompt
    that the index does not have.
    """
    pairs: dict[int, PairPlace] = {}
    for path, of, rows in shards:
        if of == mark:
            if any(caption >= len(index["captions"]) for _, caption, _ in rows):
                raise damaged(path)
            pairs = places_of(path, rows) | pairs
    return pairs


def damaged(path: Path) -> FileRefused:
    if path.name == INDEX:
        return FileRefused(
            f"{path} is damaged; copy it again, or make the couplings again with overwrite (pairs"
            " of the same inputs are kept)."
        )
    return FileRefused(f"{path} is damaged; {_PAIRS_AGAIN}.")


def difference(before: dict, after: dict) -> str:
    """What differs between two runs, in words."""
    one, other = before["identity"], after["identity"]
    for key in [*other, *one]:
        if one.get(key) != other.get(key):
            return f"its {key} is {_short(one.get(key))}, and {_short(other.get(key))} is asked for"
    return "its prompts are others"


def _short(value: object) -> str:
    text = "none" if value is None else json.dumps(value).strip('"')
    return text if len(text) <= 60 else text[:40] + "…" + text[-16:]
