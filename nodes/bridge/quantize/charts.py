"""Charts of the VQ nodes, and of a loaded file of either method, by the schema in
`host/charts.py`, and one kind of their own:

{"kind": "blocks", "title": str, "subtitle": str, "summary": [[label, value], …], "blocks": int,
 "rows": [{"name": str, "number": int, "points": [[share of its steps done 0…1, dB], …]}, …]}
   error of each block while it is calibrated
{"kind": "codebooks", …} is "layers" with "use": {"codewords", "used", "entropy", "bits"} in
each row that has a codebook
"""

from __future__ import annotations

import statistics
import time
from collections import Counter

import torch
from comfy.model_patcher import ModelPatcher

from ....quant.files.checkpoint import QuantizedFile
from ....quant.files.errors import reading
from ....quant.files.report import LayerRow, Report
from ....quant.interop.opening import method_of
from ....quant.job.monitor import BlockError
from ....quant.vq4dit.codebook_usage import LayerUse
from ..host import charts
from ..host.progress import Progress
from ..quantized import activations as activation_widths
from ..quantized import loading

PAUSE = 0.5  # seconds between two pictures of a running calibration


class LiveBlocks:
    """Draws the error of the blocks while they are calibrated: called with each BlockError."""

    def __init__(self, title: str, subtitle: str, progress: Progress):
        self.title = title
        self.subtitle = subtitle
        self.progress = progress
        self.rows: dict[int, dict] = {}
        self._drawn = 0.0

    def start(self, done: int, total: int, name: str) -> None:
        """What is next: told by the weights until a block tells its steps, which say more."""
        if self.rows:
            self.progress.heed()
        else:
            self.progress(done, total, name)

    def __call__(self, error: BlockError) -> None:
        row = self.rows.setdefault(
            error.number, {"name": error.name, "number": error.number, "points": []}
        )
        row["points"].append([round(error.step / error.steps, 4), round(error.db, 2)])
        self.progress.at(
            (error.number + error.step / error.steps) / error.blocks,
            f"{error.name}, step {error.step} of {error.steps}, {error.db:.1f} dB",
        )
        if error.step == error.steps or time.monotonic() - self._drawn > PAUSE:
            self._drawn = time.monotonic()
            self.progress.show(self.chart(error))

    def chart(self, error: BlockError) -> dict:
        """The chart at this moment."""
        gains = [
            row["points"][-1][1] - row["points"][0][1]
            for row in self.rows.values()
            if row["points"][-1][0] == 1
        ]
        summary = [
            ["block", f"{error.number + 1} of {error.blocks}: {error.name}"],
            ["step", f"{error.step} of {error.steps}"],
            ["error", f"{error.db:.1f} dB"],
        ]
        if gains:
            summary.append(["gain per block", f"{statistics.mean(gains):+.1f} dB"])
        return {
            "kind": "blocks",
            "title": self.title,
            "subtitle": self.subtitle,
            "summary": summary,
            "blocks": error.blocks,
            "rows": list(self.rows.values()),
        }


def _layouts(layers: dict[str, dict]) -> str:
    counts = Counter((layer["codewords"], layer["vector"]) for layer in layers.values())
    return ", ".join(
        f"{count} of {codewords} codewords of {vector}"
        for (codewords, vector), count in counts.most_common()
    )


def bits_per_weight(file: QuantizedFile) -> float:
    """Bits a weight of the layers of codewords: indices, codebooks, scales and branches, without
    biases.
    """
    total = weights = 0
    for name, config in file.layers.items():
        sizes = {
            key.removeprefix(f"{name}."): info
            for key, info in file.header.tensors.items()
            if key.startswith(f"{name}.weight")
        }
        n, width = sizes["weight"].shape
        weights += n * (width * 8 // (config["codewords"].bit_length() - 1)) * config["vector"]
        total += sum(info.nbytes for info in sizes.values())
    return 8 * total / weights


def loaded_chart(file: QuantizedFile, model: ModelPatcher, activations: str = "auto") -> dict:
    """Facts about a file that was loaded with the choice of activations."""
    needed, device = loading.vram_needed(model), model.load_device
    if method_of(file.files[0].header) == "vq":
        return model_chart(file, needed, device)
    chart = charts.model_chart(file, needed, device, loading.ram_kept(model))
    chart["details"].insert(-1, activation_widths.shown(model, activations))
    return chart


def model_chart(file: QuantizedFile, needed: tuple[int, int], device: torch.device) -> dict:
    """Facts about a loaded model: VRAM, size, bits a weight, layers, error and what computes it."""
    fast, computed = charts.kernels_lines("linear_vq", device)
    details = [
        ["file", f"{charts.size(file.size)}, {file.kind}"],
        ["bits per weight", f"{bits_per_weight(file):.2f}"],
        ["layers", _layouts(file.layers)],
        computed,
    ]
    return {
        "kind": "facts",
        "title": file.path.name,
        "summary": [charts.vram_line(needed, device), fast, *charts.error_lines(file)],
        "details": details,
    }


def _report(file: QuantizedFile) -> Report:
    text = file.metadata.get("report")
    with reading(file.path, file.remedy):
        return Report.from_json(text) if text else Report("")


def inspect_chart(file: QuantizedFile, uses: list[LayerUse]) -> dict:
    """What a file of codewords is made of: bits, use of the codebooks, error of each layer where
    the file's report tells it.
    """
    report = _report(file)
    by_name = {use.name: use for use in uses}
    known = {row.name: row for row in report.rows}
    report.rows = list(known.values()) + [
        LayerRow(
            name=use.name,
            action="vq",
            why="",
            db=None,
            bytes_before=2 * use.weights,
            bytes_after=use.nbytes,
        )
        for use in uses
        if use.name not in known
    ]
    chart = charts.layers_chart(report, file.path.name, _layouts(file.layers))
    for row in chart["rows"]:
        if use := by_name.get(row["name"]):
            bits = use.codewords.bit_length() - 1
            row["use"] = {
                "codewords": use.codewords,
                "used": use.used,
                "entropy": round(use.entropy, 3),
                "bits": bits,
            }
            row["why"] = (
                f"{use.used} of {use.codewords} codewords used, {use.entropy:.2f} of {bits} bits,"
                f" {use.bits_per_weight:.2f} bits per weight"
            )
    used = sum(use.used for use in uses)
    made = sum(use.codewords for use in uses)
    weights = sum(use.weights for use in uses)
    share = sum(use.share * use.weights for use in uses) / weights
    lines = [
        ["bits per weight", f"{bits_per_weight(file):.2f}"],
        ["whole file", f"{charts.size(file.size)}"],
        ["codewords used", f"{used / made:.1%}"],
        ["entropy", f"{share:.1%} of the indices' bits"],
    ]
    errors = [
        pair
        for pair in chart["summary"]
        if pair[0] in ("architecture", "error", "pictures", "note")
    ]
    return chart | {
        "kind": "codebooks",
        "summary": lines + errors,
        "bytes_before": report.bytes_before or sum(2 * use.weights for use in uses),
        "bytes_after": report.bytes_after or file.size,
    }
