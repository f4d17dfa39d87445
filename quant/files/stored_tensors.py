"""A model's tensors as they are stored, read one by one; knows no model."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import FileRefused, reading
from .safetensors import Header, SafetensorsFile, read_header


class StoredTensor(NamedTuple):
    """What is known of a tensor before it is read: dtype and shape of what `read` gives, and its
    bytes as they are stored.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int


class StoredTensors(ABC):
    """Named tensors, read one by one. path: what names the model (None: it is in memory); name:
    for people; decoded: tensor → the format of few bits from which `read` decodes it.
    """

    path: Path | None
    name: str
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]
    decoded: Mapping[str, str] = {}

    @property
    def files(self) -> int:
        """How many files they are in."""
        return 1

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor, in memory of its own."""

    @abstractmethod
    def sample(self, name: str, start: int, count: int) -> bytes:
        """`count` of a tensor's stored bytes from `start` on; less where they end."""


class SafetensorsFiles(StoredTensors):
    """The tensors of one or several safetensors files. Raises FileRefused for a file that is none,
    and for a tensor that two of them hold.
    """

    def __init__(self, path: Path, files: Sequence[Path], name: str = ""):
        self.path, self.name = path, name or path.name
        self.headers = [read_header(file) for file in files]
        metadata: dict[str, str] = {}
        self._homes: dict[str, Header] = {}
        for header in self.headers:
            twice = self._homes.keys() & header.tensors.keys()
            if twice:
                raise FileRefused(
                    f"{header.path.name} and {self._homes[min(twice)].path.name} both hold"
                    f" {min(twice)}, so they are not parts of one model; download them again."
                )
            self._homes |= dict.fromkeys(header.tensors, header)
            metadata |= header.metadata
        self.metadata = metadata
        self.tensors = {
            name: StoredTensor(info.dtype, info.shape, info.nbytes)
            for header in self.headers
            for name, info in header.tensors.items()
        }

    @property
    def files(self) -> int:
        return len(self.headers)

    @property
    def is_plain(self) -> bool:
        """Whether the path is that of the one file that holds everything."""
        return [header.path for header in self.headers] == [self.path]

    def read(self, name: str) -> Tensor:
        header = self._homes[name]
        return SafetensorsFile(header.path, header).read(name)

    def sample(self, name: str, start: int, count: int) -> bytes:
        header = self._homes[name]
        info = header.tensors[name]
        with reading(header.path), open(header.path, "rb", buffering=0) as file:
            file.seek(info.start + start)
            return file.read(min(count, info.nbytes - start))
