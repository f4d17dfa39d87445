"""The loop that trains anything small beside a frozen model: warm-up, one loss at a time,
interruptible and resumable.

The loss is the caller's; it gets a random generator that depends on the seed and the step alone, so
that a run that was interrupted and resumed ends, bit for bit, as one that was not.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import atomic
from . import state as states
from .recompute import checkpointing

OPTIMIZERS = {
    "AdamW": torch.optim.AdamW,
    "Adam": torch.optim.Adam,
    "SGD": torch.optim.SGD,
    "RMSprop": torch.optim.RMSprop,
}
# options that may change when a run is resumed; steps only where lr does not depend on them
_FREE = ("steps", "save_every", "lr")


@dataclass(frozen=True)
class Options:
    """Options of a training run. lr: constant after `warmup` steps, and falling to 0 over the last
    share `decay` of all steps; weight_decay: AdamW's; clip: of the gradient's norm; accumulate:
    losses a step.
    """

    steps: int = 500
    lr: float = 1e-3
    optimizer: str = "AdamW"
    weight_decay: float = 1e-2
    warmup: int = 10
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    save_every: int = 50
    decay: float = 0.0

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} is not one of {', '.join(OPTIMIZERS)}")
        for name, value in asdict(self).items():
            if name == "optimizer":
                continue
            low = 0 if name in ("weight_decay", "warmup", "seed", "decay") else 1e-12
            if not low <= value < 2**63:
                raise ValueError(f"{name}={value} is not {'positive' if low else 'zero or more'}")
        if self.decay > 1:
            raise ValueError(f"decay={self.decay} is not a share between 0 and 1")

    def rate(self, done: int) -> float:
        """The learning rate of the step after `done` steps."""
        left = (self.steps - done) / (self.steps * self.decay) if self.decay else 1.0
        return self.lr * min(1.0, (done + 1) / max(1, self.warmup), left)


def steps(  # noqa: PLR0913 (the loop's whole interface, each with a default)
    parameters: Mapping[str, nn.Parameter],
    loss: Callable[[torch.Generator], Tensor],
    options: Options,
    identity: str = "",
    state: str | os.PathLike | None = None,
    checkpointed: Iterable[nn.Module] = (),
    losses: list[float] | None = None,
) -> Iterator[tuple[int, float]]:
    """Trains, yielding (steps done, loss) after each step. Closing the generator early, or an
    exception, writes the state first.

    parameters    name → what is trained; the names are those in the state file
    loss          generator → a scalar; everything random in it must come from the generator
    identity      what must agree for a state to be resumed, besides the options (steps and lr may
      change, with a decay lr alone)
    state         a file to resume from and to save to, atomically, every `save_every` steps and at
      the end; None: nothing is kept
    checkpointed  blocks whose activations are computed again in the backward pass instead of kept
    losses        a list that is filled with the loss of every step, the resumed ones first
    Raises FileRefused for a state file of another run, for a damaged one, and for a disk without
      room for the state and a file of the parameters; ValueError where loss or gradient stop being
    finite: the parameters and the state are then those of the last good step.
    """
    losses = [] if losses is None else losses
    names = {parameter: name for name, parameter in parameters.items()}
    identity = json.dumps([identity, _fixed(options)])
    decay = {"weight_decay": options.weight_decay} if options.optimizer == "AdamW" else {}
    optimizer = OPTIMIZERS[options.optimizer](names, lr=options.lr, **decay)
    if state is not None:
        states.resume(Path(state), names, optimizer, identity, losses)
        _reserve(Path(state), names, optimizer, identity, options.steps)
    try:
        with checkpointing(checkpointed):
            while len(losses) < options.steps:
                losses.append(_step(loss, options, optimizer, len(losses)))
                if state is not None and len(losses) % options.save_every == 0:
                    states.save(Path(state), names, optimizer, identity, losses)
                yield len(losses), losses[-1]
    finally:
        if state is not None and losses:
            states.save(Path(state), names, optimizer, identity, losses)


def _reserve(
    state: Path,
    names: Mapping[nn.Parameter, str],
    optimizer: torch.optim.Optimizer,
    identity: str,
    steps: int,
) -> None:
    """Refuses a disk that is too full: a state and the one that replaces it lie side by side for a
    moment, and so do the last one and the file that is made of the parameters.
    """
    one = states.size(names, optimizer, identity, steps)
    there = state.stat().st_size if state.exists() else 0
    atomic.reserve(state, 2 * one - there)


def _fixed(options: Options) -> dict[str, object]:
    """The options that must agree for a state to be resumed."""
    fixed = {name: value for name, value in asdict(options).items() if name not in _FREE}
    if options.decay:
        return fixed | {"steps": options.steps}
    del fixed["decay"]
    return fixed


def _step(loss: Callable, options: Options, optimizer: torch.optim.Optimizer, done: int) -> float:
    """One step of the optimizer; the mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = options.rate(done)
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for i in range(options.accumulate):
        generator = torch.Generator().manual_seed(
            options.seed + 1_000_003 * (done * options.accumulate + i + 1)
        )
        value = loss(generator) / options.accumulate
        if not value.isfinite():
            raise ValueError(
                f"the loss is {value.item()} at step {done + 1}; lower the learning rate, or check"
                " the training pictures"
            )
        value.backward()
        total += value.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not torch.nn.utils.clip_grad_norm_(parameters, options.clip).isfinite():
        raise ValueError(
            f"the gradient is not finite at step {done + 1}; lower the learning rate, or train in"
            " fp32"
        )
    optimizer.step()
    return total
