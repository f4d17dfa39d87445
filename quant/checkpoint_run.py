"""What every method's run over a checkpoint shares: keep the rest of the model, finish layer by
layer, tell whether all is done already.

A run is laid out before it starts (see `writer`), so the JSON and the report that will stand in the
file get room for the longest there can be.
"""

import json
import time
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor

from .architectures import LayerPlan
from .files.checkpoint import FORMAT_VERSION, open_quantized
from .files.errors import FileRefused
from .files.source import Source, StateDictSource
from .files.writer import Writer, metadata_room
from .report import LayerRow, Report

# a layer's JSON is padded with blanks to this length, for the file is laid out before its options
# are known
JSON_BYTES = 128
WHY_ROOM = 200  # bytes that a finished row may be longer than its plan
# bytes of a source's own metadata that are passed on (ComfyUI reads "config" of some video models)
_PASSED_ON = 65536


class Run:
    """One run's work, unit by unit; skips what the writer has already."""

    def __init__(self, source: Source | StateDictSource, writer: Writer):
        self.source, self.writer = source, writer

    def keep_rest(
        self, layers: list[LayerPlan], progress: Callable, cancelled: Callable, total: int
    ) -> int:
        """Writes what stays in 16 bit, quick as it is: it shows soon whether the file can be read.
        Returns the kept layers' weights.
        """
        done, kept = 0, {layer.name: layer for layer in layers if layer.action == "keep"}
        owned = {f"{layer.name}.{part}" for layer in layers for part in ("weight", "bias")}
        for unit in [*(key for key in self.source.shapes if key not in owned), *kept]:
            cancelled()
            if unit in kept:
                progress(done, total, unit)
                done += kept[unit].K * kept[unit].N
            self.step(unit, lambda unit=unit: self._keep(unit, kept.get(unit)))
        return done

    def step(
        self, unit: str, make: Callable[[], tuple[Mapping[str, Tensor], LayerRow | None]]
    ) -> None:
        """Makes and writes a unit's tensors and its row of the report, unless it is finished."""
        if unit in self.writer.finished:
            return
        began = time.monotonic()
        tensors, row = self.checked(make)
        if row is not None:
            row.bytes_after, row.seconds = (
                sum(tensor.nbytes for tensor in tensors.values()),
                round(row.seconds + time.monotonic() - began, 3),
            )
        self.writer.write(unit, tensors, vars(row) if row else {})

    def checked(self, make: Callable):
        """Runs a computation; when its input cannot be used, no later run could finish either, and
        the unfinished file goes.
        """
        try:
            return make()
        except ValueError:
            self.writer.discard()
            raise

    def _keep(
        self, unit: str, layer: LayerPlan | None
    ) -> tuple[dict[str, Tensor], LayerRow | None]:
        if layer is None:
            return {unit: self.source.read(unit)}, None
        keys = [f"{unit}.weight"] + [f"{unit}.bias"] * layer.bias
        return {key: self.source.read(key) for key in keys}, LayerRow(
            unit, "keep", layer.why, None, self.source.nbytes(unit), 0
        )


def facts_of(source: Source | StateDictSource, recipe, calibration: dict | None) -> dict[str, str]:
    """What makes two runs the same: source, recipe and calibration, as they stand in the file's
    metadata.
    """
    return {
        "source": json.dumps(
            {"name": source.name, "bytes": source.bytes, "fingerprint": source.fingerprint}
        ),
        "recipe": recipe.to_json(),
        "calibration": json.dumps(calibration or {}),
    }


def predicted_facts(name: str, recipe) -> dict[str, str]:
    """The same for a run that is only planned, as long as they would be."""
    return {
        "source": json.dumps({"name": name, "bytes": 0, "fingerprint": "0" * 64}),
        "recipe": recipe.to_json(),
        "calibration": "{}",
    }


def metadata_of(
    method: str, facts: Mapping[str, str], passed_on: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A quantized file's metadata but the report: the source's own where they are short,
    then ours.
    """
    own = {
        key: value
        for key, value in (passed_on or {}).items()
        if key != "_quantization_metadata" and len(value) <= _PASSED_ON
    }
    return own | {
        "format": "nibble",
        "nibble_version": str(FORMAT_VERSION),
        "method": method,
        **facts,
    }


def padded(text: Tensor) -> Tensor:
    """A layer's JSON at the length that was laid out for it."""
    if len(text) > JSON_BYTES:
        raise ValueError(
            f"a layer's JSON has {len(text)} bytes, more than the {JSON_BYTES} reserved for it"
        )
    return torch.cat(
        [text.cpu(), torch.full((JSON_BYTES - len(text),), ord(" "), dtype=torch.uint8)]
    )


def unmatched(patterns: Iterable[str], layers: Iterable[LayerPlan]) -> list[str]:
    """A note for each of the user's patterns that names no layer: most likely a slip."""
    names = [layer.name for layer in layers]
    return [
        f"no layer matches the pattern {pattern!r}"
        for pattern in patterns
        if not any(fnmatchcase(name, pattern) for name in names)
    ]


def calibrated_on(target: str | Path, source: Source | StateDictSource, recipe) -> dict | None:
    """What an existing target was calibrated on, if it was made from this model by this recipe;
    else None. Tells, before the long recording of inputs starts, that all is done.
    """
    try:
        file = open_quantized(target)
    except FileRefused:
        return None
    same = (
        file.metadata.get("recipe") == recipe.to_json()
        and file.fact("source").get("fingerprint") == source.fingerprint
    )
    return file.fact("calibration") if same else None


def finished(target: str | Path, facts: Mapping[str, str]) -> Report | None:
    """The report of an existing target if it is the result of the same run."""
    if not Path(target).exists():
        return None
    try:
        found = open_quantized(target).metadata
        same = all(found.get(key) == value for key, value in facts.items())
        return Report.from_json(found["report"]) if same else None
    except (FileRefused, KeyError, ValueError):
        return None  # damaged or of another version: it is made again


def choices(metadata: Mapping[str, str], report: Report) -> Iterable[dict[str, str]]:
    """The metadata with the whole report, and with shorter ones in case it does not fit."""
    for options in ({}, {"why": False}, {"rows": False}):
        yield {**metadata, "report": report.to_json(seconds=False, **options)}


def room(metadata: Mapping[str, str], report: Report, layers: Iterable[LayerPlan]) -> int:
    """Bytes to reserve for metadata: those of a report with the longest rows there can be."""
    largest = 10**15
    rows = [
        LayerRow(layer.name, layer.action, layer.why + " " * WHY_ROOM, -9999.99, largest, largest)
        for layer in layers
    ]
    worst = Report(report.architecture, rows, largest, largest, 0.0, report.notes)
    return metadata_room({**metadata, "report": worst.to_json(seconds=False)})
