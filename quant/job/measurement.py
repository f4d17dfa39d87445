"""What a quantization knows of the 16-bit model at work: recorded inputs, or the model itself."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ..calibration.statistics import InputStats
from ..calibration.teacher import Teacher


def no_statistics(name: str) -> InputStats | None:
    """Nothing is known about any layer."""
    return None


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
