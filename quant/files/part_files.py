"""Part files: ranges of a target's layers, each made by itself, that wait beside the target to be
joined (quant/job/parts.py).

    flux.safetensors.part2of4     the second of four ranges of flux.safetensors

They are safetensors under a name that no program lists: the target's tensors of these layers, and
in the metadata what tells the run and the layers' rows of its report.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .errors import FileRefused
from .integrity import SUMS, check_header
from .metadata import json_object
from .report import Report
from .safetensors import SafetensorsFile, TensorSpec, checksum, read_header

FORMAT = "nibble-part"  # "format" in the metadata
_NAME = re.compile(r"(.+\.safetensors)\.part([1-9]\d*)of([1-9]\d*)", re.DOTALL)
_DAMAGED = "the run that joins the parts makes it again"
# what makes two parts the same, and how people are told that it is not; first what explains most
_FACTS = {
    "part": "as another part ({there})",
    "nibble_version": "by another version of Nibble",
    "method": "by another method ({there})",
    "recipe": "with other options ({there})",
    "source": "of another source",
    "calibration": "on another measurement",
}


class PartName(NamedTuple):
    """What a part file's name says: of which target, the number-th `of` so many."""

    target: Path
    number: int
    of: int

    @property
    def path(self) -> Path:
        return self.target.with_name(f"{self.target.name}.part{self.number}of{self.of}")


def read_name(path: Path) -> PartName | None:
    """What a path's name says; None for one that is no part file's."""
    found = _NAME.fullmatch(path.name)
    if found is None or int(found[2]) > int(found[3]):
        return None
    return PartName(path.with_name(found[1]), int(found[2]), int(found[3]))


class PartFile:
    """A finished part: `metadata`, `size` in bytes, `rows` (layer → its row of the report). Reads
    the header. Raises FileRefused for a file that is damaged.
    """

    def __init__(self, path: Path):
        header = read_header(path)
        self.path, self._header, self._stored = path, header, SafetensorsFile(path, header)
        self.metadata, self.size = header.metadata, header.size
        if not self.is_ours:
            return
        check_header(header, _DAMAGED)
        self._sums = json_object(header, SUMS)
        try:
            rows = Report.from_json(self.metadata.get("report", "")).rows
        except ValueError as error:
            raise FileRefused(f"{path.name} is damaged ({error}); {_DAMAGED}.") from error
        self.rows = {row.name: row for row in rows}

    def __enter__(self) -> PartFile:
        self._stored.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._stored.__exit__(*error)

    @property
    def is_ours(self) -> bool:
        """Whether this is a part file at all."""
        return self.metadata.get("format") == FORMAT

    def difference(self, identity: Mapping[str, str], specs: Iterable[TensorSpec]) -> str:
        """How this part was made, where it was not by this run, in words; "": by this one."""
        for key, words in _FACTS.items():
            there, here = self.metadata.get(key, ""), identity[key]
            if there != here:
                told = there if key != "recipe" else _other_options(there, here)
                return words.format(there=told)
        found = self._header.tensors
        if {name: (info.dtype, info.shape) for name, info in found.items()} == {
            spec.name: (spec.dtype, tuple(spec.shape)) for spec in specs
        }:
            return ""
        return _FACTS["nibble_version"]

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors. Raises FileRefused for one that is damaged."""
        tensors = {name: self._stored.read(name) for name in names}
        for name, tensor in tensors.items():
            if checksum(tensor) != self._sums.get(name):
                raise FileRefused(
                    f"{self.path.name} is damaged: {name} does not match its checksum; {_DAMAGED}."
                )
        return tensors


def facts(path: Path, verify: bool) -> dict[str, Any]:
    """What a part file is, for `inspect`; verify: reads all of it. Raises FileRefused for one that
    is damaged.
    """
    part = PartFile(path)
    if verify:
        with part:
            for name in read_header(path).tensors:
                part.tensors([name])
    number, _, count = part.metadata.get("part", "").partition("/")
    return {
        "file": path.name,
        "kind": f"part {number} of {count} of a quantized model, to be joined by --parts {count}",
        "layers": len(part.rows),
    }


def _other_options(there: str, here: str) -> str:
    """The options that differ between two recipes' JSON, as people read them."""
    try:
        made, asked = json.loads(there), json.loads(here)
        names = [name for name in {**asked, **made} if _value(made, name) != _value(asked, name)]
    except (ValueError, AttributeError, TypeError):
        return "of another version"
    return ", ".join(f"{name} {_value(made, name)}, here {_value(asked, name)}" for name in names)


def _value(recipe: Mapping[str, Any], name: str) -> str:
    """An option's value; a recipe leaves some out where they are the default."""
    return str(recipe.get(name, "as it is by default"))
