"""A 4-bit file of another program, opened: under ComfyUI's names and in natural order, as if Nibble
had written it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from ..files.checkpoint import FileRefused
from ..files.writer import TensorSpec


class PublishedFile(ABC):
    """What loading and converting ask of a file, besides Nibble's own `QuantizedFile`, whose
    methods these mirror.

    path       the file (of a folder: that with the transformer blocks)
    kind       the format's name, for people
    family     the model family's name, for people
    size       bytes on disk
    metadata   the header's, as text
    layers     ComfyUI's name of each quantized linear → its JSON
    """

    kind = ""
    path: Path
    family: str
    size: int
    metadata: dict[str, str]
    layers: dict[str, dict]

    @property
    @abstractmethod
    def units(self) -> Iterable[str]:
        """Names of what is read at once: a quantized linear, or whatever was left in 16 bit."""

    @abstractmethod
    def unit(self, name: str) -> dict[str, Tensor]:
        """Its tensors, under ComfyUI's names. Raises FileRefused where they do not fit together."""

    @abstractmethod
    def specs(self, name: str) -> list[TensorSpec]:
        """Names, dtypes and shapes of what `unit` will give."""

    def layer(self, name: str) -> dict[str, Tensor]:
        """The tensors of one quantized linear, its `comfy_quant` among them."""
        return self.unit(name)

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """(name, tensor) of everything, one unit in memory at a time."""
        for name in self.units:
            yield from self.unit(name).items()

    def fact(self, key: str) -> dict:
        """Facts that only Nibble's own files hold: none."""
        return {}

    def verify(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Published files carry no checksums: only their sizes can be checked, and that was done
        when they were opened.
        """
        if progress:
            progress(1, 1, self.path.name)

    def refusal(self, what: str) -> FileRefused:
        """A refusal that names this file."""
        return FileRefused(f"{self.path.name} {what}.")
