"""The JSON that a run writes beside the weights: what makes two runs the same, the report, and the
room to keep for both.

A run is laid out before it starts (see `writer`), so the JSON and the report that will stand in the
file get room for the longest there can be.
"""

import json
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..files.architectures import LayerPlan
from ..files.checkpoint import FORMAT_VERSION
from ..files.modelspec import described
from ..files.report import MEASURED_ON, LayerRow, Report
from ..files.source import Source, StateDictSource, passed_on
from ..files.writer import metadata_room
from .recipe import FromPreset

# a layer's JSON is padded with blanks to this length, for the file is laid out before its options
# are known
JSON_BYTES = 128
WHY_ROOM = 200  # bytes that a finished row may be longer than its plan


def identity_of(
    source: Source | StateDictSource, recipe: FromPreset, provenance: dict
) -> dict[str, str]:
    """What makes two runs the same: source, recipe and the measurement's provenance, as they stand
    in the file's metadata.
    """
    return {
        "source": json.dumps(
            {"name": source.name, "bytes": source.bytes, "fingerprint": source.fingerprint}
        ),
        "recipe": recipe.to_json(),
        "calibration": json.dumps(provenance),
    }


def predicted_identity(name: str, recipe: FromPreset) -> dict[str, str]:
    """The same for a run that is only planned, about as long as it would be."""
    return {
        "source": json.dumps({"name": name, "bytes": 0, "fingerprint": "0" * 64}),
        "recipe": recipe.to_json(),
        "calibration": "{}",
    }


def file_metadata(
    method: str, identity: Mapping[str, str], of_source: Mapping[str, str] | None = None
) -> dict[str, str]:
    """A quantized file's metadata but the report: what the source passes on, then ours."""
    return described(passed_on(of_source or {}), method) | {
        "format": "nibble",
        "nibble_version": str(FORMAT_VERSION),
        "method": method,
        **identity,
    }


def metadata_choices(metadata: Mapping[str, str], report: Report) -> Iterable[dict[str, str]]:
    """The metadata with the whole report, and with shorter ones in case it does not fit."""
    for shortened in ({}, {"why": False}, {"rows": False}):
        yield {**metadata, "report": report.to_json(seconds=False, **shortened)}


def reserved_bytes(metadata: Mapping[str, str], report: Report, layers: Iterable[LayerPlan]) -> int:
    """Bytes to reserve for metadata: those of a report with the longest rows there can be."""
    largest = 10**15
    rows = [
        LayerRow(
            name=layer.name,
            action=layer.action,
            why=layer.why + " " * WHY_ROOM,
            db=-9999.99,
            bytes_before=largest,
            bytes_after=largest,
            on=max(MEASURED_ON, key=len),
        )
        for layer in layers
    ]
    longest = Report(
        report.architecture,
        rows,
        bytes_before=largest,
        bytes_after=largest,
        seconds=0.0,
        notes=report.notes,
    )
    return metadata_room({**metadata, "report": longest.to_json(seconds=False)})


def padded(text: Tensor) -> Tensor:
    """A layer's JSON, uint8, at the length that was laid out for it."""
    if len(text) > JSON_BYTES:
        raise ValueError(
            f"a layer's JSON has {len(text)} bytes, more than the {JSON_BYTES} reserved for it"
        )
    blanks = torch.full((JSON_BYTES - len(text),), ord(" "), dtype=torch.uint8)
    return torch.cat([text.cpu(), blanks])
