"""Couplings on disk: noise, and what a teacher's sampler made of it. A folder that grows batch by
batch.

    couplings.json               identity (what the pairs depend on) and the prompts as trees
                                 (`conditioning_tree`); it names the prompts' tensors
    captions-DIGEST.safetensors
    pairs-FIRST.safetensors      noise, data (n, …) float32 in the model's own latent units;
                                 metadata: whose they are, [[pair, caption, crc32], …]

Pair i depends on (identity, i) alone, so a run that was stopped, or that wants more pairs than
there are, is gone on with. Nothing keeps count: the pairs are those in whole files. Every file is
written to another name, synced and renamed, and the index after what it names; a crash between any
two of these leaves a folder that is whole, with fewer pairs. Both sides are stored: the noise could
be drawn again from the seed, but random numbers differ between versions of torch and kinds of
processors, and a pair with the wrong noise teaches crossings.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...quant.files import atomic, small
from ...quant.files.errors import FileRefused
from ...quant.files.small import SmallFile
from . import conditioning_tree
from .couplings_files import (
    CAPTIONS_AGAIN,
    FORMAT,
    INDEX,
    VERSION,
    PairPlace,
    captions_path,
    checksum_of,
    damaged,
    difference,
    gathered,
    index_of_target,
    mark_of,
    places_of,
    read_index,
    read_shards,
)

_UNFINISHED = "*.part*"  # what a crash leaves: ".partial", and ".part" of earlier versions


class Captions(Sequence):
    """Prompts as trees; each is read, and checked, when it is asked for, into memory of its own:
    Windows deletes no file that is mapped.
    """

    def __init__(self, path: Path, nodes: list):
        self.path, self._nodes = path, nodes

    def __len__(self) -> int:
        return len(self._nodes)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        node = self._nodes[i]
        try:
            file = SmallFile(self.path, CAPTIONS_AGAIN)
            return conditioning_tree.decode(node, lambda place: file.read(str(place)))
        except small.WRONG as error:
            why = str(error) if isinstance(error, FileRefused) else "its index is damaged"
            raise FileRefused(
                f"{self.path.parent.name} is damaged: {self.path.name} does not hold prompt {i + 1}"
                f" any more ({why.rstrip('.')}); {CAPTIONS_AGAIN}."
            ) from error


class Couplings:
    """Pairs in a folder, in ascending order of their numbers. identity: JSON; captions: prompts as
    trees.
    """

    def __init__(
        self,
        folder: Path,
        identity: dict,
        mark: str,
        captions: Captions,
        places: dict[int, PairPlace],
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
        """The shape of a latent, without the batch."""
        return tuple(self.identity["shape"])

    @property
    def nbytes(self) -> int:
        """Bytes on disk of all files that hold its pairs and prompts. Raises FileRefused where one
        is gone.
        """
        paths = {self.captions.path, *(place.path for place in self._places.values())}
        try:
            return sum(path.stat().st_size for path in paths)
        except FileNotFoundError as error:
            raise FileRefused(
                f"{Path(error.filename).name} in {self.folder} is gone; make the couplings again,"
                " or copy the folder again."
            ) from error

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
        if checksum_of(noise, data) != place.checksum:
            raise damaged(place.path)
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
            [pair, caption, checksum_of(noise[k : k + 1], data[k : k + 1])]
            for k, (pair, caption) in enumerate(zip(pairs, captions, strict=True))
        ]
        path = self.folder / f"pairs-{pairs[0]:08}.safetensors"
        metadata = {"format": FORMAT, "of": self._mark, "pairs": json.dumps(rows)}
        atomic.write(path, small.to_bytes({"noise": noise, "data": data}, metadata))
        self._places |= places_of(path, rows)
        self._order = sorted(self._places)

    def digest(self) -> str:
        """32 hex digits of identity, prompts and pairs, however they are spread over files; nothing
        large is read.
        """
        rows = [
            [pair, self._places[pair].caption, self._places[pair].checksum] for pair in self._order
        ]
        return hashlib.sha256(json.dumps([self._mark, rows]).encode()).hexdigest()[:32]


def home(folder: Path) -> Path:
    """The folder, in one that is there; whoever makes couplings in it holds it meanwhile
    (`atomic.exclusive`). Raises FileRefused.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.refusal(folder, error) from error
    return folder


def create(
    folder: str | os.PathLike, identity: dict, captions: Sequence, overwrite: bool = False
) -> Couplings:
    """A folder to add pairs to; those of the same identity and captions that lie there already are
    kept.

    identity: anything JSON that the pairs depend on, "shape" among it; captions: trees, as
        `conditioning_tree.encode` takes them
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
    before = index_of_target(folder, overwrite)
    if before is not None and mark_of(before) != mark_of(index) and not overwrite:
        raise FileRefused(
            f"{folder.name} holds couplings of another run: {difference(before, index)}; turn on"
            " overwrite to replace them, or choose another filename."
        )
    shards = read_shards(folder, overwrite)
    strangers = [path for path, mark, _ in shards if mark != mark_of(index)]
    if strangers and not overwrite:
        raise FileRefused(
            f"{folder.name} holds pairs of another run ({strangers[0].name}); turn on overwrite to"
            " replace them, or choose another filename."
        )
    path = captions_path(folder, index)
    for stranger in strangers:
        stranger.unlink()
    if before is None or mark_of(before) != mark_of(index) or not path.is_file():
        numbered = {str(i): tensor for i, tensor in enumerate(tensors)}
        atomic.write(path, small.to_bytes(numbered, {"format": FORMAT}))
        atomic.write(folder / INDEX, small.json_bytes(index))
    for left in [*folder.glob("captions-*.safetensors"), *folder.glob(_UNFINISHED)]:
        if left != path:
            left.unlink(missing_ok=True)
    return Couplings(
        folder,
        identity,
        mark_of(index),
        Captions(path, nodes),
        gathered(shards, index, mark_of(index)),
    )


def read(folder: str | os.PathLike) -> Couplings:
    """The couplings in a folder. Raises FileRefused in words where there are none, or the files are
    damaged.
    """
    folder = Path(folder)
    index = read_index(folder)
    if index is None:
        raise FileRefused(
            f"{folder} holds no couplings; make some with Make CAF Couplings, or choose their"
            " folder."
        )
    path = captions_path(folder, index)
    SmallFile(path, CAPTIONS_AGAIN)
    stored = Couplings(
        folder,
        index["identity"],
        mark_of(index),
        Captions(path, index["captions"]),
        gathered(read_shards(folder), index, mark_of(index)),
    )
    if not len(stored):
        raise FileRefused(f"{folder.name} holds no pairs yet; run Make CAF Couplings again.")
    return stored


def noise(seed: int, pair: int, shape: Sequence[int]) -> Tensor:
    """A pair's noise (1, *shape), float32: from a seed of its own, so that it is the same in every
    batch.
    """
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed((seed + pair) % 2**64))
