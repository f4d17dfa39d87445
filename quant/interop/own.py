"""Nibble's own file with the face of a published one, so that converting knows one kind of
source.
"""

from collections.abc import Iterable

from torch import Tensor

from ..files.checkpoint import QuantizedFile
from ..files.writer import TensorSpec
from .model import PublishedFile
from .names import family_name


class OwnFile(PublishedFile):
    """An opened file of Nibble's; see PublishedFile."""

    kind = "Nibble"

    def __init__(self, file: QuantizedFile):
        self._file, self.path, self.size, self.metadata, self.layers = (
            file,
            file.path,
            file.size,
            file.metadata,
            file.layers,
        )
        self._keys: dict[str, list[str]] = {}
        for key in file.header.tensors:
            self._keys.setdefault(key.rpartition(".")[0], []).append(key)
        self._plain = [
            key for module, keys in self._keys.items() if module not in file.layers for key in keys
        ]
        shapes = {name: file.header.tensors[name].shape for name in self._plain} | {
            f"{name}.weight": (0, 0) for name in file.layers
        }
        self.family = family_name(shapes, self.path.name)

    @property
    def units(self) -> Iterable[str]:
        return [*self._plain, *self.layers]

    def unit(self, name: str) -> dict[str, Tensor]:
        return self._file.layer(name) if name in self.layers else {name: self._file.read(name)}

    def specs(self, name: str) -> list[TensorSpec]:
        infos = self._file.header.tensors
        return [
            TensorSpec(key, infos[key].dtype, infos[key].shape)
            for key in (self._keys[name] if name in self.layers else [name])
        ]

    def fact(self, key: str) -> dict:
        return self._file.fact(key)

    def verify(self, progress=None) -> None:
        self._file.verify(progress)
