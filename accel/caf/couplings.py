"""Couplings on disk: noise, and what a teacher's sampler made of it. A folder that grows batch by
batch.

    couplings.json              identity (what the pairs depend on) and the prompts as trees
      (`trees`); it names the prompts' tensors
    captions-DIGEST.safetensors
    pairs-FIRST.safetensors     noise, data (n, …) float32 in the model's own latent units;
      metadata: whose they are, [[pair, caption, crc32], …]

Pair i depends on (identity, i) alone, so a run that was stopped, or that wants more pairs than
there are, is gone on with. Nothing keeps
count: the pairs are those in whole files. Every file is written to another name, synced and
    renamed, and the index after what it names; a
crash between any two of these leaves a folder that is whole, with fewer pairs. Both sides are
stored: the noise could be drawn again from the seed, but random numbers differ between versions of
torch and kinds of processors, and a pair with the wrong noise teaches crossings.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ...quant.files import atomic
from ...quant.files.errors import FileRefused
from ...quant.files.safetensors import checksum, read_header
from . import conditioning_tree

FORMAT, VERSION = "nibble_caf_couplings", 1
INDEX = "couplings.json"
_UNFINISHED = "*.part*"  # what a crash leaves: ".partial", and ".part" of earlier versions


class Place(NamedTuple):
    """Where a pair lies: file, row in it, its caption, crc32 of its noise and data."""

    path: Path
    row: int
    caption: int
    checksum: str


class Captions(Sequence):
    """Prompts as trees; each is read when it is asked for, into memory of its own: Windows deletes
    no file that is mapped.
    """

    def __init__(self, path: Path, nodes: list):
        self.path, self._nodes = path, nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        try:
            with safe_open(self.path, "pt") as file:
                return conditioning_tree.decode(
                    self._nodes[i], lambda place: file.get_tensor(str(place)).clone()
                )
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise FileRefused(
                f"{self.path.parent.name} is damaged: {self.path.name} does not hold prompt {i + 1}"
                " any more; copy the folder again, or make the couplings again with overwrite."
            ) from error


class Couplings:
    """Pairs in a folder, in ascending order of their numbers. identity: JSON; captions: prompts as
    trees.
    """

    def __init__(
        self, folder: Path, identity: dict, mark: str, captions: Captions, places: dict[int, Place]
    ):
        self.folder, self.identity, self.captions = folder, identity, captions
        self._mark, self._places = mark, places
        self._order = sorted(places)

    def __len__(self) -> int:
        return len(self._order)

    def __contains__(self, pair: int) -> bool:
        """Whether the pair of that number, its seed's, is there."""
        return pair in self._places

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a latent, without the batch."""
        return tuple(self.identity["shape"])

    @property
    def nbytes(self) -> int:
        """Bytes on disk of all files that hold its pairs and prompts."""
        return sum(
            path.stat().st_size
            for path in {self.captions.path, *(place.path for place in self._places.values())}
        )

    def limited(self, count: int) -> Couplings:
        """The pairs 0 to count - 1, of those that there are."""
        return Couplings(
            self.folder,
            self.identity,
            self._mark,
            self.captions,
            {pair: place for pair, place in self._places.items() if pair < count},
        )

    def pair(self, i: int) -> tuple[Tensor, Tensor, int]:
        """(noise (1, …), data (1, …), caption): float32, the i-th that there is. Raises FileRefused
        where the file is damaged or gone.
        """
        place = self._places[self._order[i]]
        try:
            with safe_open(place.path, "pt") as file:
                noise, data = (
                    file.get_slice(name)[place.row : place.row + 1].clone()
                    for name in ("noise", "data")
                )
        except (OSError, SafetensorError) as error:
            raise FileRefused(
                f"{place.path.name} in {self.folder} cannot be read any more; make the couplings"
                " again, or copy the folder again."
            ) from error
        if _checksum(noise, data) != place.checksum:
            raise _damaged(place.path)
        return noise, data, place.caption

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[int]]:
        """(noise (batch, …), data (batch, …), captions) of several pairs."""
        noise, data, captions = zip(*(self.pair(i) for i in indices), strict=True)
        return torch.cat(noise), torch.cat(data), list(captions)

    def add(
        self, pairs: int | Sequence[int], noise: Tensor, data: Tensor, captions: Sequence[int]
    ) -> None:
        """Stores pairs as one file, which is there whole or not at all.

        pairs: the number of each, or of the first of several in a row; noise, data: (batch,
            *shape); captions: the prompt of each.
        Raises ValueError for other shapes, for what is not finite, and for pairs that there are.
        """
        pairs = range(pairs, pairs + len(captions)) if isinstance(pairs, int) else pairs
        noise, data = (
            tensor.detach().to("cpu", torch.float32).contiguous() for tensor in (noise, data)
        )
        if (
            noise.shape != (len(pairs), *self.shape)
            or data.shape != noise.shape
            or not pairs
            or len(captions) != len(pairs)
        ):
            raise ValueError(
                f"noise {tuple(noise.shape)} and data {tuple(data.shape)} are not {len(pairs)}"
                f" latents of {self.shape}"
            )
        if not (noise.isfinite().all() and data.isfinite().all()) or not all(
            0 <= caption < len(self.captions) for caption in captions
        ):
            raise ValueError("noise or data is not finite, or of a prompt that there is not")
        if any(pair in self for pair in pairs):
            raise ValueError(
                f"pair {next(pair for pair in pairs if pair in self)} is there already"
            )
        rows = [
            [pair, caption, _checksum(noise[k : k + 1], data[k : k + 1])]
            for k, (pair, caption) in enumerate(zip(pairs, captions, strict=True))
        ]
        path = self.folder / f"pairs-{pairs[0]:08}.safetensors"
        _write(
            path,
            to_bytes(
                {"noise": noise, "data": data},
                {"format": FORMAT, "of": self._mark, "pairs": json.dumps(rows)},
            ),
        )
        self._places |= _places(path, rows)
        self._order = sorted(self._places)

    def digest(self) -> str:
        """32 hex digits of identity, prompts and pairs, however they are spread over files; nothing
        large is read.
        """
        rows = [
            [pair, self._places[pair].caption, self._places[pair].checksum] for pair in self._order
        ]
        return hashlib.sha256(json.dumps([self._mark, rows]).encode()).hexdigest()[:32]


def create(
    folder: str | os.PathLike, identity: dict, captions: Sequence, overwrite: bool = False
) -> Couplings:
    """A folder to add pairs to; those of the same identity and captions that lie there already are
    kept.

    identity: anything JSON that the pairs depend on, "shape" among it; captions: trees, as
        `trees.encode` takes them
    overwrite: pairs of another identity are deleted; else FileRefused, as for a folder of something
        else.
    """
    folder, identity = Path(folder), json.loads(json.dumps(identity))
    tensors: list[Tensor] = []
    nodes = [
        conditioning_tree.encode(tree, tensors, f"prompt {i + 1}")
        for i, tree in enumerate(captions)
    ]
    if not nodes:
        raise ValueError("There are no prompts; connect at least one.")
    prompts = conditioning_tree.digest(nodes, tensors)
    index = {
        "format": FORMAT,
        "version": VERSION,
        "identity": identity,
        "prompts": prompts,
        "captions": nodes,
    }
    before = _there(folder, overwrite)
    if before is not None and _mark(before) != _mark(index) and not overwrite:
        raise FileRefused(
            f"{folder.name} holds couplings of another run: {_difference(before, index)}; turn on"
            " overwrite to replace them, or choose another filename."
        )
    shards = _shards(folder, overwrite)
    strangers = [path for path, mark, _ in shards if mark != _mark(index)]
    if strangers and not overwrite:
        raise FileRefused(
            f"{folder.name} holds pairs of another run ({strangers[0].name}); turn on overwrite to"
            " replace them, or choose another filename."
        )
    path = _captions_path(folder, index)
    for stranger in strangers:
        stranger.unlink()
    if before is None or _mark(before) != _mark(index) or not path.is_file():
        _write(
            path, to_bytes({str(i): tensor for i, tensor in enumerate(tensors)}, {"format": FORMAT})
        )
        _write(folder / INDEX, json.dumps(index).encode())
    for left in [*folder.glob("captions-*.safetensors"), *folder.glob(_UNFINISHED)]:
        if left != path:
            left.unlink(missing_ok=True)
    return Couplings(
        folder, identity, _mark(index), Captions(path, nodes), _gathered(shards, _mark(index))
    )


def read(folder: str | os.PathLike) -> Couplings:
    """The couplings in a folder. Raises FileRefused in words where there are none, or the files are
    damaged.
    """
    folder = Path(folder)
    index = _index(folder)
    if index is None:
        raise FileRefused(
            f"{folder} holds no couplings; make some with Make CAF Couplings, or choose their"
            " folder."
        )
    path = _captions_path(folder, index)
    read_header(path)
    found = Couplings(
        folder,
        index["identity"],
        _mark(index),
        Captions(path, index["captions"]),
        _gathered(_shards(folder), _mark(index)),
    )
    if not len(found):
        raise FileRefused(f"{folder.name} holds no pairs yet; run Make CAF Couplings again.")
    return found


def noise(seed: int, pair: int, shape: Sequence[int]) -> Tensor:
    """A pair's noise (1, *shape), float32: from a seed of its own, so that it is the same in every
    batch.
    """
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed((seed + pair) % 2**64))


# ---- files


def _checksum(noise: Tensor, data: Tensor) -> str:
    return checksum(torch.cat([noise, data]))


def _mark(index: dict) -> str:
    """What every file of pairs carries: 32 hex digits of all that they depend on."""
    return hashlib.sha256(
        json.dumps([index["identity"], index["prompts"]], sort_keys=True).encode()
    ).hexdigest()[:32]


def _captions_path(folder: Path, index: dict) -> Path:
    return folder / f"captions-{index['prompts']}.safetensors"


def _places(path: Path, rows: list) -> dict[int, Place]:
    return {
        pair: Place(path, row, caption, checksum)
        for row, (pair, caption, checksum) in enumerate(rows)
    }


def _index(folder: Path) -> dict | None:
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
        raise _damaged(folder / INDEX) from error
    if not whole:
        raise _damaged(folder / INDEX)
    if version != VERSION:
        raise FileRefused(
            f"{folder.name} was made by a newer Nibble (version {version}); update Nibble, or make"
            " the couplings again."
        )
    return index


def _there(folder: Path, overwrite: bool) -> dict | None:
    """What lies in the folder that is to be written to; it is made where there is none."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileRefused(
            f"The folder {folder} cannot be made ({error.strerror}); choose another filename."
        ) from error
    try:
        index = _index(folder)
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


def _shards(folder: Path, overwrite: bool = False) -> list[tuple[Path, str, list]]:
    """(path, whose, rows) of each file of pairs; damaged ones raise FileRefused, or are nobody's
    where they may be replaced.
    """
    found = []
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
            found.append((path, header.metadata["of"], rows))
        # FileRefused is a ValueError
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if not overwrite:
                raise _damaged(path) from error
            found.append((path, "", []))
    return found


def _gathered(shards: list[tuple[Path, str, list]], mark: str) -> dict[int, Place]:
    found: dict[int, Place] = {}
    for path, of, rows in shards:
        if of == mark:
            found = _places(path, rows) | found
    return found


def _damaged(path: Path) -> FileRefused:
    if path.name == INDEX:
        return FileRefused(
            f"{path} is damaged; copy it again, or make the couplings again with overwrite (pairs"
            " of the same inputs are kept)."
        )
    return FileRefused(
        f"{path} is damaged; delete this file and run Make CAF Couplings again with the same"
        " inputs: only its pairs are made again."
    )


def _difference(before: dict, after: dict) -> str:
    """What differs between two runs, in words."""
    one, other = before["identity"], after["identity"]
    for key in [*other, *one]:
        if one.get(key) != other.get(key):
            return f"its {key} is {_short(one.get(key))}, and {_short(other.get(key))} is asked for"
    return "its prompts are others"


def _short(value: object) -> str:
    text = "none" if value is None else json.dumps(value).strip('"')
    return text if len(text) <= 60 else text[:40] + "…" + text[-16:]


def _write(path: Path, content: bytes) -> None:
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
