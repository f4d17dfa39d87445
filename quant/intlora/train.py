"""Training IntLoRA layers inside any model: attach them, step, resume, take the adapter out,
detach.

The loss is the caller's (rectified flow for FLUX: |v(x_t, t) - (noise - x_0)|^2); it gets a random
generator that depends on the seed and the step alone, so that a run that was interrupted and
resumed ends as one that was not.
"""

import contextlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ..merge.integer_grid import IntBase
from ..training import loop
from ..training.loop import Options
from ..weights import linears
from .adapter import Adapter
from .factors import LARGEST
from .linear import Grid, IntLoRALinear, rule_for, separated
from .variants import Rule


class _Trained(Protocol):
    """A layer with the two factors that are trained; an ordinary LoRA's too."""

    @property
    def lora_up(self) -> Tensor: ...

    @property
    def lora_down(self) -> Tensor: ...


@dataclass(frozen=True)
class AdapterOptions:
    """What is trained.

    variant  shift_add | mul | shift
    rank     of the factors
    seed     of the factors' start and of R
    k        of SHIFT-ADD
    width    of the stored factors: torch.int8 | torch.int16
    grid     how a 16-bit linear becomes a base
    """

    variant: str = "shift_add"
    rank: int = 16
    seed: int = 0
    k: int = 8
    width: torch.dtype = torch.int8
    grid: Grid = Grid()

    def __post_init__(self):
        if self.width not in LARGEST:
            raise ValueError(f"width={self.width} is neither int8 nor int16")


def attach(
    model: nn.Module,
    names: Iterable[str],
    options: AdapterOptions | None = None,
    bases: Mapping[str, IntBase] | None = None,
    made: Callable[[str], tuple[IntBase, Rule]] | None = None,
) -> dict[str, IntLoRALinear]:
    """Replaces the named linears by IntLoRA layers and returns them; `detach` undoes it. All other
    parameters of the model are frozen.

    A linear that is quantized already (it has `quantized()`, or `bases` gives its integers) keeps
    its arithmetic, and the change is computed beside it. A 16-bit linear becomes a plain base on
    the options' grid, with R as the paper has it for MUL and SHIFT; or what `made` gives for its
    name: base and rule, on the device where it computes.
    """
    options = options or AdapterOptions()
    layers: dict[str, IntLoRALinear] = {}
    model.requires_grad_(False)
    for name in names:
        old = model.get_submodule(name)
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + len(layers))
        base = (bases or {}).get(name)
        quantized = getattr(old, "quantized", None)
        if base is None and quantized is not None:
            base = IntBase.of(quantized(), name)
        if base is None:
            plain = cast(nn.Linear, old)
            parts = made(name) if made else base_of_linear(plain.weight.detach(), name, options)
            bias = None if plain.bias is None else plain.bias.detach().to(parts[0].scale.device)
            layer = IntLoRALinear(
                *parts, options.rank, bias, generator=generator, width=options.width
            )
            layer.rounded = True
        else:
            layer = IntLoRALinear(
                base,
                rule_for(base, options.variant, options.k, options.grid.lora_bits),
                options.rank,
                inner=old,
                generator=generator,
                width=options.width,
            )
        # not a child: its weights stay out of the model while it is away
        object.__setattr__(layer, "replaced", old)
        linears.replace(model, name, layer)
        layers[name] = layer
    return layers


def base_of_linear(weight: Tensor, name: str, options: AdapterOptions) -> tuple[IntBase, Rule]:
    """Base and rule of a 16-bit weight (N, K), on its device."""
    base, rule = separated(weight, options.variant, options.seed, name, options.grid)
    return base, rule_for(base, options.variant, options.k) if rule.NAME == "shift_add" else rule


def detach(model: nn.Module, layers: Mapping[str, IntLoRALinear]) -> None:
    """Puts the linears back that `attach` replaced."""
    for name, layer in layers.items():
        linears.replace(model, name, layer.replaced)


def adapter(layers: Mapping[str, IntLoRALinear], **facts) -> Adapter:
    """What has been trained. facts: anything JSON that belongs into the file, such as the number of
    steps.
    """
    return Adapter({name: layer.adapter() for name, layer in layers.items()}, facts)


def train(  # noqa: PLR0913 - as `loop.steps`, and who watches
    layers: Mapping[str, IntLoRALinear],
    loss: Callable[[torch.Generator], Tensor],
    options: Options,
    state: str | os.PathLike | None = None,
    checkpointed: Iterable[nn.Module] = (),
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
    data: str = "",
    losses: list[float] | None = None,
) -> list[float]:
    """The whole run; returns the loss of every step, those of resumed runs included.

    progress(step, steps, loss) is called after each step; an exception raised in it stops the run,
    and the state is kept. data: a name for what `loss` depends on; a state is resumed with the same
    only. For `state`, `checkpointed`, `losses` and the exceptions see `loop.steps`.
    """
    losses = [] if losses is None else losses
    running = steps(layers, loss, options, state, checkpointed, losses, data)
    with contextlib.closing(running):
        for step, value in running:
            progress(step, options.steps, value)
    return losses


def steps(  # noqa: PLR0913 - as `loop.steps`
    layers: Mapping[str, IntLoRALinear],
    loss: Callable[[torch.Generator], Tensor],
    options: Options,
    state: str | os.PathLike | None = None,
    checkpointed: Iterable[nn.Module] = (),
    losses: list[float] | None = None,
    data: str = "",
) -> Generator[tuple[int, float], None, None]:
    """Trains, yielding (steps done, loss) after each step: `loop.steps` on the factors of the
    layers.
    """
    parameters = {
        f"{name}.{which}": getattr(layer, which)
        for name, layer in layers.items()
        for which in ("lora_up", "lora_down")
    }
    identity = _identity(layers, data)
    running = loop.steps(parameters, loss, options, identity, state, checkpointed, losses)
    return cast(Generator[tuple[int, float], None, None], running)  # it can be closed


def _identity(layers: Mapping[str, _Trained], data: str) -> str:
    """What must agree for a state to be resumed: every layer's rule and shapes, the first base, the
    data. Floats of an ordinary LoRA have no base.
    """
    rules = {
        name: getattr(getattr(layer, "rule", None), "NAME", "") for name, layer in layers.items()
    }
    shapes = {
        name: [rules[name], *layer.lora_up.shape, *layer.lora_down.shape]
        for name, layer in layers.items()
    }
    base = getattr(next(iter(layers.values()), None), "base", None)
    return json.dumps([shapes, "" if base is None else base.digest(), data])
