"""What a quantization run did, layer by layer: shown in the node, printed by the command line, and
kept in the file's metadata.
"""

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

# and how people call them
ACTIONS = {
    "w4a4": "W4A4",
    "w4a16": "4-bit weights only",
    "vq": "of codewords",
    "w4a8": "W4A8",
    "w8a8": "W8A8",
    "nvfp4": "NVFP4",
    "rows8": "of 8-bit rows",
    "keep": "kept in 16 bit",
}
# part of a row's reason: fitted to what was recorded, the layer was not as close
DATA_FREE = "data-free, closer on held-out pictures"
# the same: one of the layers that got wider activations than the others
WIDE = "8-bit activations"
# what an error was measured on; "": files made before this was told
PICTURES, NOISE, SYNTHETIC = "pictures", "noise", "synthetic"
MEASURED_ON = {
    PICTURES: "measured on pictures that were held out",
    NOISE: "measured on noise and random conditioning, not on pictures",
    SYNTHETIC: "on synthetic inputs: not measured on this model at work",
    "": "",
}
# the median layer's error in dB → what pictures look like beside those of 16 bit. From the demo
# model in 2 to 4 bits (tests/bench/results/vq.json): from 28 dB on pictures had a PSNR of 38.6 dB
# and more, from 15 dB on one of 36 and more with all that was asked for in them; at 10 to 12 dB 25
# to 33 dB, and up to a third of the prompts was missed
SCALE = (
    (28.0, "good: next to 16 bit, hard to tell apart"),
    (15.0, "fair: the same picture, fine details differ"),
    (-math.inf, "poor: shapes and colors may differ; try 'best', a higher rank, or more bits"),
)


@dataclass
class LayerRow:
    """One linear: what was done with it and why, its error (signal to quantization noise in dB,
    None: none) and what that was measured on, bytes, seconds.
    """

    name: str
    action: str
    why: str
    db: float | None
    bytes_before: int
    bytes_after: int
    seconds: float = 0.0
    on: str = ""


@dataclass
class Report:
    """A run. Sizes are of the diffusion model before and of the quantized file after; seconds are
    of the work, runs that were stopped and resumed included, and never stored in the file, so that
    two runs with the same options give the same bytes.
    """

    architecture: str
    rows: list[LayerRow] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)

    def decibels(
        self, actions: tuple[str, ...] = ("w4a4", "vq", "w4a8", "w8a8", "nvfp4")
    ) -> list[float]:
        """The errors of all layers with these actions, worst first."""
        return sorted(row.db for row in self.rows if row.action in actions and row.db is not None)

    def errors(self) -> list[tuple[str, str]]:
        """(label, value) lines: the errors of the layers, a line for each kind of input that they
        were measured on, and what they mean for pictures where they were measured at all.
        """
        lines = []
        for on, words in MEASURED_ON.items():
            db = sorted(
                row.db
                for row in self.rows
                if row.action in ("w4a4", "vq") and row.db is not None and row.on == on
            )
            if not db:
                continue
            middle = statistics.median(db)
            text = f"median {middle:.1f} dB, worst {db[0]:.1f} dB"
            lines.append(("error", f"{text}; {words}" if words else text))
            if on in (PICTURES, NOISE):
                lines.append(("pictures", look(middle)))
        return lines

    def summary(self) -> list[tuple[str, str]]:
        """(label, value) lines for people."""
        counts = {action: sum(row.action == action for row in self.rows) for action in ACTIONS}
        lines = [
            ("architecture", self.architecture),
            (
                "size",
                (
                    f"{_size(self.bytes_before)} → {_size(self.bytes_after)} "
                    f"({self.bytes_before / max(self.bytes_after, 1):.1f}x)"
                ),
            ),
            (
                "layers",
                ", ".join(
                    f"{count} {ACTIONS[action]}"
                    for action, count in counts.items()
                    if count or action == "keep"
                ),
            ),
        ]
        lines += self.errors()
        if free := sum(DATA_FREE in row.why for row in self.rows):
            layers = "1 layer" if free == 1 else f"{free} layers"
            lines.append(("data-free", f"{layers}, closer so to 16 bit on held-out pictures"))
        if wide := sum(WIDE in row.why for row in self.rows):
            layers = "1 layer" if wide == 1 else f"{wide} layers"
            others = f"4 bit in {counts['w4a4'] - wide}"
            lines.append(("activations", f"8 bit in {layers}, where it saves most; {others}"))
        if self.seconds:
            lines.append(
                (
                    "time",
                    (
                        f"{self.seconds / 60:.1f} min"
                        if self.seconds >= 90
                        else f"{self.seconds:.1f} s"
                    ),
                )
            )
        return lines + [("note", note) for note in self.notes]

    def to_json(self, seconds: bool = True, why: bool = True, rows: bool = True) -> str:
        """JSON text; without seconds it depends on the result alone, without reasons or rows it is
        shorter.
        """
        values = asdict(self)
        if not seconds:
            values.pop("seconds")
        values["rows"] = [self._row(row, seconds, why) for row in values["rows"]] if rows else []
        return json.dumps(values, separators=(",", ":"))

    @staticmethod
    def _row(row: dict, seconds: bool, why: bool) -> dict:
        row["db"] = None if row["db"] is None else round(row["db"], 2)
        return {
            key: value
            for key, value in row.items()
            if (seconds or key != "seconds") and (why or key != "why")
        }

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The inverse of `to_json`. Raises ValueError for text that is no report."""
        try:
            values = json.loads(text)
            values["rows"] = [LayerRow(**({"why": ""} | row)) for row in values["rows"]]
            report = cls(**values)
        except (TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"this is no report of a quantization: {error}") from error
        wrong = list(_wrong_fields(report))
        for row in report.rows:
            wrong += _wrong_fields(row)
        if wrong:
            raise ValueError(f"this is no report of a quantization: {wrong[0]} is another kind")
        return report


def look(db: float) -> str:
    """What pictures look like beside those of 16 bit, by the median error of the layers in dB."""
    return next(words for least, words in SCALE if db >= least)


_NUMBERS = ("db", "bytes_before", "bytes_after", "seconds")
_LISTS = ("rows", "notes")
_LARGEST = 2**63  # bytes of any file, and more


def _wrong_fields(row: "Report | LayerRow") -> Iterator[str]:
    """The fields whose values are not of the kind that they should be."""
    for name, value in vars(row).items():
        if name in _NUMBERS:
            number = type(value) in (int, float) and abs(value) < _LARGEST  # NaN is not
            sound = number or (name == "db" and value is None)
        else:
            sound = isinstance(value, list if name in _LISTS else str)
        if not sound:
            yield name


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
