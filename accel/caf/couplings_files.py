"""The files of couplings: an index, the prompts' tensors, and pairs in shards.

`couplings.py` has the format. They are checked when they are read, and whole or not there when they
are written.
"""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...quant.files import atomic
from ...quant.files.errors import FileRefused
from ...quant.files.safetensors import checksum, read_header

FORMAT, VERSION = "nibble_caf_couplings", 1
INDEX = "couplings.json"


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
        index = json.loads((folder / INDEX).read_bytes())
        known = index["format"] == FORMAT
        whole = (
            known
            and isinstance(index["identity"]["shape"], list)
            and isinstance(index["prompts"], str)
            and isinstance(index["captions"], list)
        )
        version = index["version"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(folder / INDEX) from error
    if not whole:
        raise damaged(folder / INDEX)
    if version != VERSION:
        raise FileRefused(
            f"{folder.name} was made by a newer Nibble (version {version}); update Nibble, or make"
            " the couplings again."
        )
    return index


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
            header = read_header(path)
            rows = json.loads(header.metadata["pairs"])
            whole = header.metadata["format"] == FORMAT and all(
                header.tensors[name].shape[0] == len(rows) for name in ("noise", "data")
            )
            if not whole or not all(
                type(pair) is int and type(caption) is int and type(crc) is str
                for pair, caption, crc in rows
            ):
                raise ValueError("rows")
            shards.append((path, header.metadata["of"], rows))
        # FileRefused is a ValueError
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if not overwrite:
                raise damaged(path) from error
            shards.append((path, "", []))
    return shards


def gathered(shards: list[tuple[Path, str, list]], mark: str) -> dict[int, PairPlace]:
    pairs: dict[int, PairPlace] = {}
    for path, of, rows in shards:
        if of == mark:
            pairs = places_of(path, rows) | pairs
    return pairs


def damaged(path: Path) -> FileRefused:
    if path.name == INDEX:
        return FileRefused(
            f"{path} is damaged; copy it again, or make the couplings again with overwrite (pairs"
            " of the same inputs are kept)."
        )
    return FileRefused(
        f"{path} is damaged; delete this file and run Make CAF Couplings again with the same"
        " inputs: only its pairs are made again."
    )


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


def write(path: Path, content: bytes) -> None:
    """All of it or nothing: to another name, synced, renamed."""
    try:
        atomic.replace(path, content)
    except OSError as error:
        why = (
            "the disk is full; free some space"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else f"{error.strerror}; check the disk and its permissions"
        )
        raise FileRefused(f"{path} could not be written: {why}, and run again to go on.") from error
