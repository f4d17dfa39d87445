"""What the linear layers of any nn.Module read while the model runs.

Recording takes as many runs of the model as the memory cap demands: each run records a part of the
layers, and since every layer draws its sample rows with a seed of its own, the result does not
depend on the parting.
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from .statistics import BLOCK, InputStats


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module of every linear layer: nn.Linear, or whatever looks like one (in_features,
    out_features, a 2-D weight).
    """

    def is_linear(module: nn.Module) -> bool:
        weight = getattr(module, "weight", None)
        return (
            hasattr(module, "in_features")
            and hasattr(module, "out_features")
            and weight is not None
            and weight.dim() == 2
        )

    return {name: module for name, module in model.named_modules() if is_linear(module)}


def inputs(linear: nn.Module) -> int:
    """K of a linear, also of one that only looks like nn.Linear."""
    return cast("int", linear.in_features)


def outputs(linear: nn.Module) -> int:
    """N of such a linear."""
    return cast("int", linear.out_features)


def own_name(name: str) -> str:
    """The model's modules are called as the layers are."""
    return name


def _linears_of(
    model: nn.Module, names: Iterable[str], module_of: Callable[[str], str]
) -> dict[str, nn.Module]:
    """The linear of each layer. Raises ValueError where the model has none of that name."""
    linears = find_linears(model)
    found = {}
    for name in names:
        module = module_of(name)
        if module not in linears:
            raise ValueError(f"the model has no linear layer called {module!r}")
        found[name] = linears[module]
    return found


def not_told() -> range | None:
    """No picture has a number: what is drawn are not the prompts that a user will draw."""
    return None


@dataclass(frozen=True)
class Shown:
    """Whose pictures are drawn while layers are watched: how many in all (0: not told), and
    now() the numbers of those that the model is called with.
    """

    pictures: int = 0
    now: Callable[[], range | None] = not_told


UNTOLD = Shown()


class Recorder:
    """Records InputStats of the named linears while it is entered: `with Recorder(model, names) as
    recorder: model(...)`.

    The hooks only read. Raises ValueError for unknown names, and when the statistics would exceed
    memory_cap_bytes (see `passes`).
    """

    def __init__(
        self,
        model: nn.Module,
        names: Iterable[str],
        memory_cap_bytes: int | None = None,
        samples: int = 256,
        hessian_block: int = BLOCK,
        seed: int = 0,
        shown: Shown = UNTOLD,
        module_of: Callable[[str], str] = own_name,
    ):
        self.names = list(names)
        self.shown = shown
        self._modules = _linears_of(model, self.names, module_of)
        shapes = {name: inputs(module) for name, module in self._modules.items()}
        needed = sum(InputStats.bytes_needed(k, samples, hessian_block) for k in shapes.values())
        if memory_cap_bytes is not None and needed > memory_cap_bytes:
            raise ValueError(
                f"{len(self.names)} layers' statistics take {needed / 1e6:.0f} MB, over the cap of "
                f"{memory_cap_bytes / 1e6:.0f} MB; record them in passes"
            )
        self.stats = {
            name: InputStats.empty(
                k, samples, hessian_block, seed + zlib.crc32(name.encode()), shown.pictures
            )
            for name, k in shapes.items()
        }
        self._hooks: list = []

    def __enter__(self) -> "Recorder":
        def hook_for(name: str):
            def record(_module, args):
                self.stats[name].update(args[0], self.shown.now())

            return record

        self._hooks = [
            module.register_forward_pre_hook(hook_for(name))
            for name, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_exception) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @staticmethod
    def passes(
        names: Iterable[str],
        shapes: dict[str, int],
        cap: int,
        samples: int = 256,
        hessian_block: int = BLOCK,
    ) -> list[list[str]]:
        """Parts the names, in order, so that the statistics of each part stay under cap bytes.
        shapes: name → K.

        Raises ValueError when a single layer exceeds the cap, saying what it needs.
        """
        parts: list[list[str]] = []
        used = cap + 1
        for name in names:
            needed = InputStats.bytes_needed(shapes[name], samples, hessian_block)
            if needed > cap:
                raise ValueError(
                    f"recording {name} takes {needed / 1e6:.0f} MB, more than the cap of"
                    f" {cap / 1e6:.0f} MB; raise the cap"
                )
            if used + needed > cap:
                parts.append([])
                used = 0
            parts[-1].append(name)
            used += needed
        return parts


def collect(  # noqa: PLR0913  (the last three are Recorder's own)
    model: nn.Module,
    names: Iterable[str],
    run: Callable[[], None],
    cap: int,
    report: Callable[[int, int], None] = lambda done, total: None,
    samples: int = 256,
    hessian_block: int = BLOCK,
    seed: int = 0,
    shown: Shown = UNTOLD,
    module_of: Callable[[str], str] = own_name,
) -> dict[str, InputStats]:
    """Runs the model once a pass and returns the statistics, moved to the CPU after each pass.

    run() must feed the model the same inputs each time; report(passes done, passes in all) is
    called after each pass. A layer that run() never reaches keeps a count of 0. module_of(layer):
    what the model calls the module that reads the layer's input.
    """
    names = list(names)
    shapes = {name: inputs(linear) for name, linear in _linears_of(model, names, module_of).items()}
    parts = Recorder.passes(names, shapes, cap, samples, hessian_block)
    recorded: dict[str, InputStats] = {}
    for i, part in enumerate(parts):
        watched = Recorder(model, part, cap, samples, hessian_block, seed, shown, module_of)
        with watched as recorder, torch.no_grad():
            run()
        recorded |= {name: stats.to("cpu") for name, stats in recorder.stats.items()}
        report(i + 1, len(parts))
    return recorded
