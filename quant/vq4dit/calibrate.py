"""Fitting codewords to what a model's blocks put out, one block after the other, without a picture
to learn from.

    L_d = sum over block outputs and times of |y_teacher - y_student|^2
    L_r = n mean r (1 - r) over undecided sub-vectors

L_d is eq. 8 of VQ4DiT (Deng et al., 2024, arXiv:2408.17131); L_r stands in place of its eq. 9: both
are 0 only for decided ratios.

Both models get the teacher's x_t along the sampler's own trajectory (`trajectory`). Blocks are
calibrated in the order in which the model runs them: a block's inputs are those that the student's
finished blocks produce, its targets the teacher's outputs. So only one block's parameters,
gradients and optimizer live at a time (FLUX.1 under 8 GB), and a block makes up for what those
before it got wrong.

Where the paper and its code differ, or this does, and what was decided:
- Start of the ratios: the paper says equal, the code takes the inverse distance. Inverse distance:
  equal ratios end worse than none at all.
- L_r: the paper always adds it; the code only on steps where it is not below its best of this
  trajectory. The latter: always adding it decides too early.
- Codebooks: the paper trains them together with the ratios, the code once a layer's codes are
  decided. The latter.
- A ratio over 0.99 is decided, a layer of which 99 % is decided becomes hard (the code). Here all
  are decided after 60 % of the steps, so that the codebooks have their turn in a run of any length.
- The code runs the whole student and sums over all blocks at once; here the loss of a block trains
  that block alone, for memory's sake.
- RMSprop (0.9) with 5e-2 for ratios, 1e-4 for codebooks and biases, as the code has it.

The preset best instead starts from codes with Hessian feedback on the student's own inputs
(`fit.fit`) and trains codebooks, scales and biases by Adam, at rates relative to each parameter's
size.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ..calibration import recorder
from ..calibration.statistics import InputStats
from ..calibration.teacher import Teacher
from ..weights import linears
from . import trajectory
from .recipe import Recipe
from .student import HardVQLinear, RowSlice, SoftVQLinear

RATIO_STEPS = 0.6  # of all steps: until then the ratios are trained, then the codebooks
RATES = {"z": 5e-2, "codebook": 1e-4, "bias": 1e-4}  # of the paper's code
TUNING_RATE = 3e-3  # of a parameter's root mean square, at the start of preset best
NOTICE = 10  # steps between two reports


@dataclass
class BlockTargets:
    """What a block is to learn: its inputs as the student meets them, the teacher's outputs for the
    same calls.
    """

    inputs: list[trajectory.Call]
    targets: list[list[Tensor]]
    device: torch.device | str
    powers: list[float] = field(init=False)

    def __post_init__(self):
        count = len(self.targets[0])
        self.powers = [
            max(
                sum(target[i].float().square().mean().item() for target in self.targets)
                / len(self.targets),
                1e-30,
            )
            for i in range(count)
        ]

    def losses(self, block: nn.Module, index: int) -> list[Tensor]:
        """Mean squared error of each of the block's outputs, in one call."""
        call = self.inputs[index].to(self.device)
        outputs = trajectory.tensors_of(block(*call.args, **call.kwargs))
        return [
            nn.functional.mse_loss(y.float(), target.to(y.device).float())
            for y, target in zip(outputs, self.targets[index], strict=True)
        ]

    @torch.no_grad()
    def decibels(self, block: nn.Module) -> float:
        """10 log10 of the outputs' power over their error's, over all calls."""
        shares = [
            sum(
                loss.item() / power
                for loss, power in zip(self.losses(block, index), self.powers, strict=True)
            )
            for index in range(len(self.inputs))
        ]
        share = sum(shares) / len(self.inputs) / len(self.powers)
        return -10 * math.log10(max(share, 1e-15))


class BlockCalibrator:
    """Teacher, student and the recorded calls: calibrates block by block. `blocks`: name of each
    block → names of the file's layers in it, in the order of the model.

    Raises ValueError where run() does not call the model.
    """

    def __init__(self, teacher: Teacher, layers: Iterable[str]):
        self.teacher = teacher
        layers = list(layers)
        known = recorder.find_linears(teacher.model)
        unknown = [part for layer in layers for part in teacher.parts(layer) if part not in known]
        if unknown:
            raise ValueError(f"the model has no linear layer called {unknown[0]!r}")
        self.calls = trajectory.record(teacher.model, teacher.run)
        if not self.calls:
            raise ValueError("the trajectory never called the model; run() has to sample with it")
        self.student = trajectory.beside(
            teacher.model, [part for layer in layers for part in teacher.parts(layer)]
        )
        layers_of: dict[str, list[str]] = {}
        for layer in layers:
            layers_of.setdefault(block_of(teacher.parts(layer)[0]), []).append(layer)
        self.times = trajectory.order(teacher.model, layers_of, self.calls[0], teacher.device)
        reached = [block for block in self.times if block in layers_of]
        unreached = [block for block in layers_of if block not in self.times]
        self.blocks = {block: layers_of[block] for block in [*reached, *unreached]}

    def inputs(
        self, block: str, samples: int = 256, seed: int = 0
    ) -> tuple[list[trajectory.Call], dict[str, InputStats]]:
        """What the student's block is given, and statistics of its 16-bit layers' inputs by the
        file's names. Empty for a block never reached.
        """
        if block not in self.times:
            return [], {}
        readers = {layer: self.teacher.parts(layer)[0] for layer in self.blocks[block]}
        with recorder.Recorder(
            self.student, readers.values(), samples=samples, seed=seed
        ) as recording:
            given = trajectory.inputs_of(
                self.student, block, self.times[block], self.calls, self.teacher.device
            )
        return given, {
            layer: recording.stats[reader].to("cpu") for layer, reader in readers.items()
        }

    def targets(self, block: str, inputs: list[trajectory.Call]) -> BlockTargets:
        """The same with the teacher's outputs; thinned out evenly where the cap demands it."""
        outputs = trajectory.outputs_of(
            self.teacher.model, block, self.times[block], self.calls, self.teacher.device
        )
        needed = sum(call.nbytes for call in inputs) + sum(
            t.nbytes for target in outputs for t in target
        )
        stride = math.ceil(needed / max(self.teacher.cap, 1))
        return BlockTargets(inputs[::stride], outputs[::stride], self.teacher.device)

    @torch.no_grad()
    def output(self, call: trajectory.Call) -> list[Tensor]:
        """What the student puts out, on the CPU."""
        given = call.to(self.teacher.device)
        results = trajectory.tensors_of(self.student(*given.args, **given.kwargs))
        return [result.detach().to("cpu", copy=True) for result in results]

    def restore(self, name: str) -> None:
        """Puts the teacher's 16-bit layer back in the student's place for it."""
        for part in self.teacher.parts(name):
            linears.replace(self.student, part, self.teacher.model.get_submodule(part))

    def install(self, name: str, layer: HardVQLinear) -> None:
        """Puts a layer of codewords, to train or finished, in the student's place for it: each
        part of the layer gets its slice of the rows.
        """
        start = 0
        for part in self.teacher.parts(name):
            rows = recorder.outputs(self.teacher.model.get_submodule(part))
            linears.replace(self.student, part, RowSlice(layer, start, start + rows))
            start += rows


def block_of(module: str) -> str:
    """The block that a module lies in: its name up to the first number ('double_blocks.3'); without
    one, itself.
    """
    match = re.match(r"(.*?\.\d+)(\.|$)", module)
    return match[1] if match else module


def learn(
    block: nn.Module,
    layers: Mapping[str, HardVQLinear],
    targets: BlockTargets,
    recipe: Recipe,
    seed: int,
    watch: Callable[[int, int, float], None] = lambda step, steps, db: None,
) -> tuple[float, float]:
    """Trains a block's layers in place; returns its error before and after in dB. watch(step,
    steps, error in dB) is called now and then.

    Where training made it worse over all calls, the layers are as before (not for ratios, which
    have to be decided).
    """
    with torch.inference_mode(False), torch.enable_grad():
        soft = {name: layer for name, layer in layers.items() if isinstance(layer, SoftVQLinear)}
        before = targets.decibels(block)
        start = {
            name: [p.detach().clone() for p in layer.parameters()] for name, layer in layers.items()
        }
        generator = torch.Generator().manual_seed(seed)
        if soft:
            _decide(block, soft, targets, recipe.steps, generator, watch)
        else:
            _tune(block, layers, targets, recipe.steps, generator, watch)
        after = targets.decibels(block)
        if not soft and after < before:
            with torch.no_grad():
                for name, layer in layers.items():
                    for parameter, old in zip(layer.parameters(), start[name], strict=True):
                        parameter.copy_(old)
            after = before
    return before, after


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of one tensor at least: `sum` alone could be the number 0."""
    return cast("Tensor", sum(tensors))


def _order(targets: BlockTargets, steps: int, generator: torch.Generator) -> list[int]:
    """Which call each step looks at: every one once, in random order, then again."""
    picked: list[int] = []
    while len(picked) < steps:
        picked += torch.randperm(len(targets.inputs), generator=generator).tolist()
    return picked[:steps]


def _tune(
    block: nn.Module,
    layers: Mapping[str, HardVQLinear],
    targets: BlockTargets,
    steps: int,
    generator: torch.Generator,
    watch: Callable,
) -> None:
    """Codebooks, scales and biases by Adam, each at a rate relative to its size, falling to nothing
    along a cosine.
    """
    groups = [
        {"params": [p], "lr": TUNING_RATE * max(p.detach().square().mean().sqrt().item(), 1e-8)}
        for layer in layers.values()
        for p in layer.parameters()
    ]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    running: float | None = None
    for step, index in enumerate(_order(targets, steps, generator)):
        losses = targets.losses(block, index)
        shares = [loss / power for loss, power in zip(losses, targets.powers, strict=True)]
        loss = _sum(shares) / len(losses)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        running = _report(watch, step, steps, loss, running)


def _decide(
    block: nn.Module,
    layers: Mapping[str, SoftVQLinear],
    targets: BlockTargets,
    steps: int,
    generator: torch.Generator,
    watch: Callable,
) -> None:
    """The paper's calibration: ratios until they are decided, then codebooks; biases all along."""
    for layer in layers.values():
        layer.requires_grad_(True)
        layer.codebook.requires_grad_(layer.hard)
    groups = {
        name: [
            getattr(layer, name) for layer in layers.values() if getattr(layer, name) is not None
        ]
        for name in RATES
    }
    optimizer = torch.optim.RMSprop(
        [{"params": params, "lr": RATES[name]} for name, params in groups.items() if params],
        alpha=0.9,
    )
    last = int(RATIO_STEPS * steps)
    least = math.inf
    running: float | None = None
    for step, index in enumerate(_order(targets, steps, generator)):
        if step == last:
            for layer in layers.values():
                layer.harden()
        if step % len(targets.inputs) == 0:
            least = math.inf  # the code's ratchet starts anew with each trajectory
        missed = _sum(targets.losses(block, index))
        regular = _sum(layer.regularity() for layer in layers.values()) / len(layers)
        loss = missed
        if regular.item() < least:
            least = regular.item()
        elif not all(layer.hard for layer in layers.values()):
            loss = missed + regular
        optimizer.zero_grad()
        loss.backward()
        for layer in layers.values():
            if layer.z.grad is not None:
                layer.z.grad[layer.frozen] = 0
        optimizer.step()
        for layer in layers.values():
            layer.freeze()
        running = _report(watch, step, steps, missed.detach() / sum(targets.powers), running)
    for layer in layers.values():
        layer.harden()


def _report(watch: Callable, step: int, steps: int, share: Tensor, running: float | None) -> float:
    """A running mean of the relative error; tells it now and then."""
    error = share.item()
    if not math.isfinite(error):
        raise ValueError(
            "the block's error became NaN or infinite; the 16-bit model overflows on these inputs"
        )
    running = error if running is None else 0.9 * running + 0.1 * error
    if step % NOTICE == 0 or step == steps - 1:
        watch(step + 1, steps, -10 * math.log10(max(running, 1e-15)))
    return running
