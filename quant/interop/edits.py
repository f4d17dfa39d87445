"""A 4-bit file with changes folded into its layers, written as a new file of Nibble's, a layer in
memory at a time.

Layers without a change are moved byte for byte. The metadata keep what the base's said, and add to
`merged` what was folded in: names, hashes, strengths, and how. An interrupted run goes on where it
stopped; the base is never written.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused
from ..files.integrity import HEADER_SUM, SUMS
from ..files.layer_formats import layer_sizes
from ..files.safetensors import TensorSpec, read_header
from ..files.writer import Writer, check_target, metadata_room
from ..weights.formats import refuse_patched
from .export import ToNibble

KEY = "merged"  # of the metadata: a list, one entry a run
# what a layer keeps in floats: scales may be of 8 bits, and codewords need not have any
FLOATS = ("weight_scale", "weight_proj_down", "weight_smooth_factor", "weight_codebook")


class Edit(NamedTuple):
    """What becomes of one unit of a file. specs: of the new tensors; make: gives them, and a row of
    the report ('name', 'kept', anything JSON).
    """

    specs: list[TensorSpec]
    make: Callable[[], tuple[dict[str, Tensor], dict]]


def branch_specs(source: QuantizedFile, name: str, rank: int) -> list[TensorSpec]:
    """The tensors of a quantized layer whose low-rank branch has, or gets, this rank, in the dtype
    of the first of FLOATS that is a float of 16 bits or more.
    """
    specs = {spec.name: spec for spec in source.specs(name)}
    sizes = layer_sizes(source.layers[name], *specs[f"{name}.weight"].shape)
    assert sizes is not None  # checked when the file was opened
    stored = [specs[key] for part in FLOATS if (key := f"{name}.{part}") in specs]
    wide = next(spec for spec in stored if spec.dtype.is_floating_point and spec.dtype.itemsize > 1)
    for part, length in (("down", sizes["K"]), ("up", sizes["N"])):
        key = f"{name}.weight_proj_{part}"
        specs[key] = TensorSpec(key, wide.dtype, (length, rank))
    facts = json.dumps(source.layers[name] | {"rank": rank})
    specs[f"{name}.comfy_quant"] = TensorSpec(f"{name}.comfy_quant", torch.uint8, (len(facts),))
    return list(specs.values())


def existing_rows(target: str | Path, identity: str) -> list[dict] | None:
    """The rows of a finished file that this very run would make again; None where there is none."""
    try:
        last = json.loads(read_header(target).metadata.get(KEY, "[]"))[-1]
        return last["rows"] if last["identity"] == identity else None
    except (FileRefused, OSError, ValueError, LookupError, TypeError):
        return None


def write_edits(
    source: QuantizedFile,
    target: str | os.PathLike,
    edits: Mapping[str, Edit],
    identity: str,
    facts: dict,
    progress: Callable[[int, int, str], None] = lambda done, total, name: None,
) -> list[dict]:
    """Writes `target`: `source` with its edited units. Returns the edits' rows, those of an
    earlier, interrupted run included.

    identity  text that is the same for the same base, changes and options, and for no others
    facts     what the metadata say of it (anything JSON)
    Raises FileRefused for a source that is damaged and a target that cannot be written or is the
    source.
    """
    check_target(source.path, target)
    refuse_patched(source)
    source.verify(progress)
    units = list(source.units)
    specs = {unit: edits[unit].specs if unit in edits else source.specs(unit) for unit in units}
    sizes = {unit: sum(spec.nbytes for spec in specs[unit]) for unit in units}
    facts = {"identity": identity} | facts
    longest = _metadata(
        source, facts, [{"name": unit, "kept": 1.0} for unit in edits], sizes, 10**15
    )
    with Writer(
        target,
        [spec for unit in units for spec in specs[unit]],
        identity,
        metadata_room(longest) + 256 * (len(edits) + 1),
    ) as writer:
        for done, unit in enumerate(units):
            progress(done, len(units), unit)
            if unit not in writer.finished:
                tensors, row = edits[unit].make() if unit in edits else (source.unit(unit), {})
                writer.write(unit, tensors, row)
        rows = [writer.finished[unit] for unit in units if unit in edits]
        writer.finish([_metadata(source, facts, rows, sizes, writer.size)])
    progress(len(units), len(units), "")
    return rows


def _metadata(
    source: QuantizedFile, facts: dict, rows: list[dict], sizes: dict[str, int], size: int
) -> dict[str, str]:
    """The base's metadata with this run added. Seconds are left out, so that two runs give the same
    bytes.
    """
    kept = (
        dict(source.metadata)
        if source.metadata.get("format") == "nibble"
        else ToNibble(source).metadata(size)
    )
    for key in (SUMS, HEADER_SUM):  # the writer adds its own
        kept.pop(key, None)
    history = json.loads(kept.get(KEY, "[]"))
    report, by_name = json.loads(kept.get("report") or "{}"), {row["name"]: row for row in rows}
    for row in report.get("rows", []):
        if row["name"] in by_name:
            row |= {
                "why": _why(row.get("why", ""), by_name[row["name"]]["kept"]),
                "bytes_after": sizes.get(row["name"], row["bytes_after"]),
            }
    if report:
        report["bytes_after"] = size
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return kept | {
        KEY: json.dumps([*history, facts | {"rows": rows}], separators=(",", ":")),
        "report": json.dumps(report, separators=(",", ":")),
    }


def _why(why: str, kept: float) -> str:
    before = why.partition("; merged")[0]
    return f"{before}; merged, {kept:.2%} of the change kept"
