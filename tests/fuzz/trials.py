"""Damaged files given to every reader, and what came of it, counted.

for round in …: for format: for damage: for reader: read  →  accepted | refused | bare error
"""

import contextlib
import io
import itertools
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from damage import damages
from fuzz import samples
from nibble.accel.caching import calibration_file
from nibble.accel.caf import heads_file
from nibble.api import small_file
from nibble.quant.cli.inspect import inspect
from nibble.quant.files.errors import FileRefused
from nibble.quant.files.safetensors import checksum
from nibble.quant.files.source import Source
from nibble.quant.interop.opening import OpenedFiles, is_4bit, open_4bit
from nibble.quant.intlora import file as intlora
from nibble.quant.training import state
from nibble.quant.weights.formats import weight_of

FACTS = ("source", "recipe", "calibration", "report")


def low_bit(path: Path) -> object:
    """A low-bit file, all of it; what it holds."""
    file = open_4bit(path)
    file.verify()
    held = {name: _identity(tensor) for name, tensor in file.tensors()}
    for name in file.layers:
        weight_of(file, name).dequantize()
        file.specs(name)
    return held, file.layers, [file.fact(key) for key in FACTS]


def listed(path: Path) -> object:
    """What a list of files needs of one."""
    return is_4bit(path), OpenedFiles().methods([str(path)])


def inspected(path: Path) -> object:
    """`python -m nibble inspect`."""
    bars = contextlib.redirect_stderr(io.StringIO())
    with bars, contextlib.redirect_stdout(io.StringIO()) as text:
        options = Namespace(file=str(path), plan=False, verify=True, json=False)
        options.small_file = small_file
        inspect(options)
    return text.getvalue()


def source(path: Path) -> object:
    """A model to be quantized, all of it."""
    model = Source(path)
    held = {}
    for name in model.shapes:
        held[name] = _identity(model.read(name))
        model.kept_dtype(name)
        if name.endswith(".weight") and len(model.shapes[name]) == 2:
            module = name.removesuffix(".weight")
            held[module] = _identity(model.weight(module))
            model.bias(module)
            model.nbytes(module)
    return held, model.fingerprint


def adapter(path: Path) -> object:
    """An IntLoRA adapter, all of it."""
    read = intlora.read(path)
    layers = {}
    for key, layer in read.layers.items():
        tensors = {name: _identity(tensor) for name, tensor in layer.tensors().items()}
        layers[key] = (tensors, layer.base, layer.rule.NAME, layer.rows)
    return layers, read.facts


def caf_heads(path: Path) -> object:
    """CAF's heads, all of them."""
    read = heads_file.read_file(path)
    tensors = {
        f"{kind}.{name}": _identity(tensor)
        for kind in ("velocity", "acceleration")
        for name, tensor in read.head(kind).tensors().items()
    }
    return tensors, read.h, read.rank, read.input_layer, read.middle, read.facts


def training_state(path: Path) -> object:
    """What an interrupted training goes on from."""
    read = state.State(path)
    tensors = {name: _identity(tensor) for name, tensor in read.tensors.items()}
    return tensors, read.identity, read.losses


def calibration(path: Path) -> object:
    """A calibration of caching; all that it says."""
    return calibration_file.read(path).facts()


@dataclass(frozen=True)
class Kind:
    """A format. make: writes a whole file; readers: the first tells what it holds; own: whether it
    has checksums, so that no damage may be taken; ending: of its files.
    """

    make: Callable[[Path], None]
    readers: tuple[Callable[[Path], object], ...]
    own: bool = False
    ending: str = ".safetensors"


KINDS = {
    "svdquant": Kind(samples.svdquant_file, (low_bit, listed, inspected, source), own=True),
    "vq": Kind(samples.vq_file, (low_bit, listed, inspected), own=True),
    "intlora": Kind(samples.intlora_file, (adapter, listed, inspected), own=True),
    "caf": Kind(samples.caf_file, (caf_heads, listed, inspected), own=True),
    "training state": Kind(samples.state_file, (training_state, listed, inspected), own=True),
    "calibration": Kind(
        samples.calibration_file, (calibration, inspected), own=True, ending=".json"
    ),
    "svdquant of before": Kind(samples.older(samples.svdquant_file), (low_bit, listed, inspected)),
    "vq of before": Kind(samples.older(samples.vq_file), (low_bit, listed, inspected)),
    "intlora of before": Kind(samples.older(samples.intlora_file), (adapter, listed, inspected)),
    "nunchaku": Kind(samples.nunchaku_file, (low_bit, listed, inspected)),
    "kitchen": Kind(samples.kitchen_file, (low_bit, listed, inspected)),
    "source": Kind(samples.source_file, (source, listed, inspected)),
    "fp8": Kind(samples.fp8_file, (source, listed, inspected)),
}


@dataclass
class Counts:
    """What came of all trials. faults: of each that broke a rule, what was done and what came."""

    files: Counter = field(default_factory=Counter)
    calls: Counter = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """The counts, for people."""
        for kind, files in self.files.items():
            outcomes = ", ".join(
                f"{self.calls[kind, outcome]} {outcome}" for outcome in ("read", "refused", "fault")
            )
            yield f"{kind:<20}{files:>7} files  {outcomes}"
        yield f"{'all':<20}{self.files.total():>7} files  {self.calls.total()} calls"


def run(folder: Path, files: int, seed: int, seconds: float | None = None) -> Counts:
    """Damages files of all kinds, a round of each after the other, until there were `files` of
    them, or the time is over.
    """
    counts, ends = Counts(), time.monotonic() + (seconds or 1e9)
    whole, held = folder / "whole", {}
    whole.mkdir()
    for name, kind in KINDS.items():
        path = whole / f"{name}{kind.ending}"
        kind.make(path)
        held[name] = kind.readers[0](path)
    for turn in itertools.count(seed):
        rounds = [
            (name, damages(whole / f"{name}{kind.ending}", turn)) for name, kind in KINDS.items()
        ]
        while rounds:
            for one in list(rounds):
                name, changes = one
                change = next(changes, None)
                if change is None:
                    rounds.remove(one)
                    continue
                _try(counts, folder / "tried", name, change, held[name])
                if counts.files.total() >= files or time.monotonic() > ends:
                    return counts


def _try(counts: Counts, folder: Path, name: str, change: tuple[str, bytes], held: object) -> None:
    """One damaged file, by every reader."""
    what, content = change
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}{KINDS[name].ending}"
    path.write_bytes(content)
    counts.files[name] += 1
    for reader in KINDS[name].readers:
        outcome, fault = _read(reader, path)
        if KINDS[name].own and reader is KINDS[name].readers[0] and outcome == "read":
            if fault != held:
                outcome, fault = "fault", "taken, though it is another"
        counts.calls[name, outcome] += 1
        if outcome == "fault":
            counts.faults.append(f"{name}: {what}: {reader.__name__}: {fault}")
    path.unlink()
    left = [found.name for found in folder.iterdir()]
    if left:
        counts.faults.append(f"{name}: {what}: left {left}")


def _read(reader: Callable[[Path], object], path: Path) -> tuple[str, object]:
    """(what came of it, and what was read, or what was wrong)."""
    try:
        return "read", reader(path)
    except FileRefused as refusal:
        text = str(refusal)
        good = path.name in text and text.endswith(".") and "\n" not in text and len(text) < 1000
        return ("refused", "") if good else ("fault", f"no sentence with its name: {text[:300]}")
    except Exception as error:  # noqa: BLE001  (that is what is counted)
        return "fault", f"{type(error).__name__}: {str(error)[:200]}"


def _identity(tensor: Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), checksum(tensor)
