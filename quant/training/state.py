"""The state of a training on disk: what a run that was stopped goes on from.

    <parameter>             as it is trained
    <parameter>.<moment>    what the optimizer remembers of it
    metadata                format, identity (what must agree for the state to be resumed), losses

A state is resumed whole or not at all: everything in it is compared with the parameters and the
optimizer before one of them is written to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import atomic
from ..files.errors import FileRefused
from ..files.safetensors import read_header
from ..files.small import SmallFile, to_bytes

FORMAT = "nibble_training"
# what an optimizer remembers of a parameter, besides the number of steps
MOMENTS = {
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Adam": ("exp_avg", "exp_avg_sq"),
    "SGD": (),
    "RMSprop": ("square_avg",),
}
_SQUARES = ("exp_avg_sq", "square_avg")  # never negative
_AGAIN = "delete it, and the training begins anew"
_A_LOSS = 26  # bytes of a loss as text, at most

Names = Mapping[nn.Parameter, str]


class State:
    """A state file that is whole: its identity, the loss of every step, and its tensors. Raises
    FileRefused for what is none, or is damaged.
    """

    def __init__(self, path: Path):
        self._file = SmallFile(path, _AGAIN)
        if self._file.metadata.get("format") != FORMAT:
            raise FileRefused(
                f"{path.name} is no state of a training run; delete it or choose another name."
            )
        self.identity = self._file.metadata.get("identity")
        self.losses: list[float] = self._file.json("losses")
        if self.identity is None:
            raise self.damaged("it does not say which run it is of")
        if (
            not isinstance(self.losses, list)
            or not self.losses
            or not all(type(loss) is float and math.isfinite(loss) for loss in self.losses)
        ):
            raise self.damaged("its losses are no list of numbers")
        self.tensors: dict[str, Tensor] = self._file.tensors()
        for name, tensor in self.tensors.items():
            if not tensor.is_floating_point():
                raise self.damaged(f"{name} is {tensor.dtype}")
            if name.endswith(_SQUARES) and bool((tensor < 0).any()):
                raise self.damaged(f"{name} is a mean of squares and holds negative numbers")

    def damaged(self, why: str) -> FileRefused:
        """The refusal of this state."""
        return self._file.damaged(why)


def save(
    path: Path, names: Names, optimizer: torch.optim.Optimizer, identity: str, losses: list[float]
) -> None:
    """Writes the state, whole or not at all. Raises FileRefused where the disk does not take it."""
    tensors = {}
    for parameter, name in names.items():
        tensors[name] = parameter.detach()
        for moment in _moments(optimizer):
            if moment in optimizer.state.get(parameter, ()):
                tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment]
    metadata = {"format": FORMAT, "identity": identity, "losses": json.dumps(losses)}
    atomic.write(path, to_bytes(tensors, metadata))


def resume(
    path: Path, names: Names, optimizer: torch.optim.Optimizer, identity: str, losses: list[float]
) -> None:
    """Puts parameters, moments and losses back as they were; nothing where there is no state.
    Raises FileRefused for a state of another run, and for a damaged one; all is then as it was.
    """
    if not path.exists():
        return
    state = State(path)
    if state.identity != identity:
        raise FileRefused(
            f"{path.name} belongs to a training run with other options, layers or another model;"
            " delete it or choose another name."
        )
    _check(state, names, _moments(optimizer))
    for parameter, name in names.items():
        with torch.no_grad():
            parameter.copy_(state.tensors[name])
        moments = {
            moment: state.tensors[f"{name}.{moment}"].to(parameter.device)
            for moment in _moments(optimizer)
        }
        if moments:  # SGD has none
            optimizer.state[parameter] = {"step": torch.tensor(float(len(state.losses))), **moments}
    losses.extend(state.losses)


def size(names: Names, optimizer: torch.optim.Optimizer, identity: str, steps: int) -> int:
    """Bytes that a state after so many steps takes at most."""
    tensors = sum(parameter.nbytes for parameter in names) * (1 + len(_moments(optimizer)))
    entries = len(names) * (1 + len(_moments(optimizer)))
    longest = max(map(len, names.values()), default=0)
    return tensors + entries * (2 * longest + 200) + 4 * len(identity) + steps * _A_LOSS + 4096


def is_of(path: Path, data: str) -> bool:
    """Whether a file is a state of a run on `data`, the last entry of its identity."""
    try:
        identity = json.loads(read_header(path).metadata["identity"])
        return json.loads(identity[0])[-1] == data
    except (FileRefused, OSError, KeyError, ValueError, TypeError, IndexError, RecursionError):
        return False


def forget(path: Path) -> None:
    """Removes a state that is not needed any more, and what a kill left of one."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + atomic.PARTIAL).unlink(missing_ok=True)


def _moments(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    return MOMENTS[type(optimizer).__name__]


def _check(state: State, names: Names, moments: tuple[str, ...]) -> None:
    wanted = {}
    for parameter, name in names.items():
        for key in (name, *(f"{name}.{moment}" for moment in moments)):
            wanted[key] = (tuple(parameter.shape), parameter.dtype)
    for key in wanted.keys() | state.tensors.keys():
        if key not in state.tensors:
            raise state.damaged(f"{key} is missing")
        if key not in wanted:
            raise state.damaged(f"it holds {key}, which this run does not train")
        tensor = state.tensors[key]
        if (tuple(tensor.shape), tensor.dtype) != wanted[key]:
            raise state.damaged(
                f"{key} is {tensor.dtype} {tuple(tensor.shape)}, and the run trains"
                f" {wanted[key][1]} {wanted[key][0]}"
            )
