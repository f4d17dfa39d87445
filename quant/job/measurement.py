"""What a quantization knows of the 16-bit model at work: recorded inputs, or the model itself."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..calibration.statistics import InputStats
from ..calibration.teacher import Teacher
from ..files.report import NOISE, PICTURES, SYNTHETIC

FEWEST_SAMPLES = 16  # rows that an error can be measured on


def no_statistics(name: str) -> InputStats | None:
    """Nothing is known about any layer."""
    return None


def measured_on(stats: InputStats | None) -> str:
    """What a layer's error is measured on where so much was recorded, as reports have it."""
    if stats is None or stats.count == 0 or stats.samples is None:
        return SYNTHETIC
    if len(stats.samples) < FEWEST_SAMPLES:
        return SYNTHETIC
    return PICTURES if stats.pictures else NOISE


@dataclass(frozen=True)
class Measurement:
    """What a run is given about the layers' inputs; by default nothing.

    provenance  where it comes from, as JSON: stands in the file, and a file of another provenance
                is another file
    statistics  a layer's name → its recorded inputs, None where there are none
    teacher     for recipes that calibrate block by block
    """

    provenance: dict = field(default_factory=dict)
    statistics: Callable[[str], InputStats | None] = no_statistics
    teacher: Teacher | None = None
