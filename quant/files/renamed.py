"""Stored tensors under other names: joined of several, or runs of rows of them. Nothing is
computed, so bytes can still be sampled where they lie.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import FileRefused
from .stored_tensors import StoredTensor, StoredTensors


class Rows(NamedTuple):
    """Rows start..stop of a stored tensor; stop None: all."""

    name: str
    start: int = 0
    stop: int | None = None


def _unchanged(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape


class Renamed(StoredTensors):
    """places: the new name of a tensor → where its rows come from, in order; shaped: (new name,
    shape) → the shape that it is given, of as many values. Raises FileRefused for parts that cannot
    be joined.
    """

    def __init__(
        self,
        stored: StoredTensors,
        places: Mapping[str, Sequence[Rows]],
        shaped: Callable[[str, tuple[int, ...]], tuple[int, ...]] = _unchanged,
    ):
        self._stored, self._places = stored, places
        self.path, self.name, self.metadata = stored.path, stored.name, stored.metadata
        self.tensors = {new: self._joined(new, rows, shaped) for new, rows in places.items()}

    @property
    def files(self) -> int:
        return self._stored.files

    def _joined(self, new: str, places: Sequence[Rows], shaped: Callable) -> StoredTensor:
        parts = [self._stored.tensors[place.name] for place in places]
        first = parts[0]
        tails = {part.shape[1:] for part in parts}
        no_rows = len(parts) > 1 and not first.shape  # one scale for each of q, k and v
        if len({part.dtype for part in parts}) > 1 or len(tails) > 1 or no_rows:
            raise FileRefused(
                f"{self.name} stores {places[0].name} and what belongs to it in different forms;"
                " choose another file."
            )
        if not first.shape:
            return first
        rows = sum(len(self._range(place)) for place in places)
        bytes_ = sum(len(self._range(place)) * self._row_bytes(place) for place in places)
        return StoredTensor(first.dtype, shaped(new, (rows, *first.shape[1:])), bytes_)

    def _range(self, place: Rows) -> range:
        """The rows of a stored tensor that a place names; of a number, the one."""
        shape = self._stored.tensors[place.name].shape
        return range(shape[0] if shape else 1)[place.start : place.stop]

    def _row_bytes(self, place: Rows) -> int:
        part = self._stored.tensors[place.name]
        return part.nbytes // max(1, part.shape[0] if part.shape else 1)

    def read(self, name: str) -> Tensor:
        places, shape = self._places[name], self.tensors[name].shape
        if len(places) == 1 and places[0] == Rows(places[0].name):
            return self._stored.read(places[0].name).reshape(shape)
        tensors = {part: self._stored.read(part) for part in {place.name for place in places}}
        return torch.cat([tensors[p.name][p.start : p.stop] for p in places]).reshape(shape)

    def sample(self, name: str, start: int, count: int) -> bytes:
        """Rows lie one behind the other, so the bytes of joined tensors are those of their rows."""
        sampled, before = b"", 0
        for place in self._places[name]:
            rows, row = self._range(place), self._row_bytes(place)
            inside, length = max(0, start + len(sampled) - before), len(rows) * row
            if len(sampled) < count and inside < length:
                wanted = min(count - len(sampled), length - inside)
                sampled += self._stored.sample(place.name, rows.start * row + inside, wanted)
            before += length
        return sampled
