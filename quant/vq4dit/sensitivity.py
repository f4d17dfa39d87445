"""How much each layer's error matters to the whole model: what mixed bits are allocated by.

    e_l(2) = mean over calls of |v - v_l|^2 / |v|^2
    e_l(b) = e_l(2) . 4^(2 - b)

v is what the 16-bit model puts out, v_l the same with layer l alone made of codewords of 2 bits, in
closed form with Hessian feedback. Other bits follow the distortion-rate function of high
resolution, D ~ 2^(-2 b), 6 dB a bit (Gersho, Gray, Vector Quantization and Signal Compression,
1992, section 9.9). The errors of several layers are taken to add up.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..calibration import recorder
from ..calibration.statistics import InputStats
from ..files.architectures import LayerPlan
from . import fit as fitting
from .calibrate import BlockCalibrator
from .recipe import Recipe
from .student import HardVQLinear

PROBES = 6  # of the trajectory's calls, drawn at random
MEASURED_BITS, TURNS = 2, 1  # of the fit that is measured, and its turns of feedback
_CAP = 1 << 32  # bytes of statistics to hold at once


def at_bits(errors: Mapping[str, float], choices: Iterable[float]) -> dict[str, dict[float, float]]:
    """Layer → bits → e_l(bits), from each layer's e_l(2)."""
    choices = list(choices)
    return {
        name: {bits: error * 4.0 ** (MEASURED_BITS - bits) for bits in choices}
        for name, error in errors.items()
    }


def measure(
    calibrator: BlockCalibrator,
    layers: Iterable[LayerPlan],
    read: Callable[[str], tuple[Tensor, Tensor | None]],
    recipe: Recipe,
    watch: Callable[[LayerPlan], None] = lambda layer: None,
) -> dict[str, float]:
    """e_l(2) of each layer that the trajectory reaches: the share of the output's power that is
    lost.

    calibrator  before any block of its student is replaced; its student is as before afterwards
    read        a layer's name → weight (N, K) and bias (N,) | None, float32 on the model's device
    watch       called before each layer
    Raises ValueError for NaN.
    """
    layers = list(layers)
    generator = torch.Generator().manual_seed(recipe.seed_of("calls"))
    picked = torch.randperm(len(calibrator.calls), generator=generator)[:PROBES].tolist()
    calls = [calibrator.calls[i] for i in sorted(picked)]
    wanted = [calibrator.output(call) for call in calls]
    statistics = _statistics(calibrator, [layer.name for layer in layers])
    errors = {}
    for layer in layers:
        watch(layer)
        stats = statistics.pop(layer.name)
        if not stats.count:
            continue
        fitted = _fitted(layer, *read(layer.name), stats, recipe)
        calibrator.install(layer.name, HardVQLinear(fitted).requires_grad_(False))
        errors[layer.name] = sum(
            _share(calibrator.output(call), output)
            for call, output in zip(calls, wanted, strict=True)
        ) / len(calls)
        calibrator.restore(layer.name)
    return errors


def _statistics(calibrator: BlockCalibrator, names: list[str]) -> dict[str, InputStats]:
    """What the 16-bit layers read, by the file's names."""
    teacher = calibrator.teacher

    def replay() -> None:
        for call in calibrator.calls:
            calibrator.output(call)

    return recorder.collect(
        calibrator.student,
        names,
        replay,
        _CAP,
        samples=0,
        module_of=lambda name: teacher.parts(name)[0],
    )


def _fitted(
    layer: LayerPlan, weight: Tensor, bias: Tensor | None, stats: InputStats, recipe: Recipe
) -> fitting.Fitted:
    layout = recipe.layout((layer.N, layer.columns), MEASURED_BITS)
    options = fitting.LayerOptions(
        *layout, scaled=recipe.scaled, rotation=recipe.rotation, turns=TURNS
    )
    generator = torch.Generator().manual_seed(recipe.seed_of(layer.name))
    return fitting.fit(weight, bias, stats, options, generator)


def _share(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Squared error of a call's outputs over their power."""
    missed = sum(
        (y.float() - t.to(y.device).float()).square().sum().item()
        for y, t in zip(found, wanted, strict=True)
    )
    return missed / max(sum(t.float().square().sum().item() for t in wanted), 1e-30)
