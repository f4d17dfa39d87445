"""One 4-bit file from another: Nibble's, comfy-kitchen's and Nunchaku's forms of the same numbers,
a layer in memory at a time.
"""

import json
from collections.abc import Callable
from pathlib import Path

from ..files import atomic
from ..files.checkpoint import QuantizedFile
from ..files.errors import FileRefused
from ..files.safetensors import read_header
from ..files.writer import Writer, check_path, check_target, metadata_room
from .export import Export, ToKitchen, ToNibble
from .nunchaku_fp4_write import to_nunchaku
from .nunchaku_lora import convert_lora, is_nunchaku_lora
from .opening import open_4bit

TARGETS: dict[str, Callable[[QuantizedFile], Export]] = {
    "nibble": ToNibble,
    "kitchen": ToKitchen,
    "nunchaku": to_nunchaku,
}
_KINDS = {"nibble": "Nibble", "kitchen": "comfy-kitchen SVDQuant", "nunchaku": "Nunchaku"}
_LARGEST = 10**15  # stands in for a file's size while it is not known


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    progress: Callable[[int, int, str], None] | None = None,
    verify: bool = True,
) -> list[tuple[str, str]]:
    """Writes `target` with the numbers of `source` in the format `to` ('nibble', 'kitchen' or
    'nunchaku'); returns a summary in lines.

    verify: compare a source of Nibble's with its checksums first. An interrupted run goes on where
        it stopped, and leaves no half-written
    target. A LoRA in Nunchaku's form becomes an ordinary one, whatever `to`. Raises FileRefused for
    a source that cannot be read, and for what the target's format cannot say.
    """
    progress = progress or (lambda *_: None)
    if Path(source).is_file() and is_nunchaku_lora(read_header(source)):
        return convert_lora(source, target)
    file = open_4bit(source)
    _ = file.family  # a model of no known family is refused before the work
    check_path(file.path, target)
    if file.kind.startswith(_KINDS[to]) and "Lite" not in file.kind:
        raise FileRefused(f"{file.path.name} is in this format already ({file.kind}); copy it.")
    export = TARGETS[to](file)
    units = list(export.units)
    with atomic.exclusive(target) as held:
        check_target(file.path, held)
        if verify and file.metadata.get("checksums"):
            file.verify(progress)
        _write(export, units, held, _identity(file, to), progress)
    return summary(target, to, export)


def _write(
    export: Export,
    units: list[str],
    target: atomic.Held,
    identity: str,
    progress: Callable[[int, int, str], None],
) -> None:
    """Measures, and writes the target."""
    plans = {}
    for done, unit in enumerate(units):
        progress(done, 2 * len(units), f"measuring {unit}")
        plans[unit] = export.specs(unit)
    specs = [spec for plan in plans.values() for spec in plan]
    room = metadata_room(export.metadata(_LARGEST)) + 64
    with Writer(target, specs, identity, room) as writer:
        for done, unit in enumerate(units):
            progress(len(units) + done, 2 * len(units), unit)
            if unit not in writer.finished:
                writer.write(unit, export.make(unit), {})
        writer.finish([export.metadata(writer.size)])
    progress(2 * len(units), 2 * len(units), "")


def _identity(file: QuantizedFile, to: str) -> str:
    """Tells whether an unfinished file is of this very conversion."""
    stat = file.path.stat()
    return json.dumps(
        [to, str(file.path.resolve()), stat.st_size, stat.st_mtime_ns, file.header_checksum]
    )


def summary(target: str | Path, to: str, export: Export) -> list[tuple[str, str]]:
    """(label, value) lines about a conversion."""
    layers = export.source.layers.values()
    counts = {
        kind: sum(facts["format"] == kind for facts in layers)
        for kind in ("svdquant_w4a4", "svdquant_w4a8", "svdquant_nvfp4", "awq_w4a16")
    }
    table = counts["svdquant_w4a8"]
    four = counts["svdquant_w4a4"] + counts["svdquant_nvfp4"]
    w4a4 = f"{table} W4A8" if table else f"{four} W4A4"
    size = Path(target).stat().st_size
    return [
        ("model", export.source.family),
        ("format", f"{export.source.kind} → {_KINDS[to]}"),
        ("layers", f"{w4a4}, {counts['awq_w4a16']} 4-bit weights only"),
        ("size", f"{export.source.size / 1e6:,.1f} MB → {size / 1e6:,.1f} MB"),
        *(("note", note) for note in export.notes),
    ]


def facts_of(path: str | Path) -> dict | None:
    """What a published file holds, for `inspect`; None for Nibble's own and for what is not in 4
    bits.
    """
    file = open_4bit(path)
    if file.kind == _KINDS["nibble"]:
        return None
    kinds = [facts["format"] for facts in file.layers.values()]
    ranks = sorted({facts["rank"] for facts in file.layers.values() if "rank" in facts})
    return {
        "file": file.path.name,
        "quantized": True,
        "format": file.kind,
        "architecture": file.family,
        "bytes": file.size,
        "W4A4 layers": kinds.count("svdquant_w4a4") + kinds.count("svdquant_nvfp4"),
        "4-bit weights only": kinds.count("awq_w4a16"),
        "ranks": ranks,
        "hint": (
            "loads as it is; `python ComfyUI-Nibble convert` makes a Nibble file of it, which loads"
            " faster and has checksums"
        ),
    }
