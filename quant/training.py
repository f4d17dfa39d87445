"""The loop that trains anything small beside a frozen model: AdamW with warm-up, one loss at a time, interruptible and resumable.

The loss is the caller's; it gets a random generator that depends on the seed and the step alone, so that a run that was interrupted and
resumed ends, bit for bit, as one that was not.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .container import FileRefused, read_header, read_tensor

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Options:
    """Of a training run. lr is AdamW's, constant after `warmup` steps; clip: of the gradient's norm; accumulate: losses a step."""

    steps: int = 500
    lr: float = 1e-3
    weight_decay: float = 1e-2
    warmup: int = 10
    clip: float = 1.0
    accumulate: int = 1
    seed: int = 0
    save_every: int = 50

    def __post_init__(self):
        for name, value in asdict(self).items():
            low = 0 if name in ("weight_decay", "warmup", "seed") else 1e-12
            if not low <= value < 2 ** 63:
                raise ValueError(f"{name}={value} is not {'positive' if low else 'zero or more'}")


def steps(parameters: Mapping[str, nn.Parameter], loss: Callable[[torch.Generator], Tensor], options: Options, identity: str = "",
          state: str | os.PathLike | None = None, checkpointed: Iterable[nn.Module] = (),
          losses: list[float] | None = None) -> Iterator[tuple[int, float]]:
    """Trains, yielding (steps done, loss) after each step. Closing the generator early, or an exception, writes the state first.

    parameters    name → what is trained; the names are those in the state file
    loss          generator → a scalar; everything random in it must come from the generator
    identity      what must agree for a state to be resumed, besides the options (the number of steps may grow)
    state         a file to resume from and to save to, atomically, every `save_every` steps and at the end; None: nothing is kept
    checkpointed  blocks whose activations are computed again in the backward pass instead of kept
    losses        a list that is filled with the loss of every step, the resumed ones first
    Raises FileRefused for a state file of another run, ValueError where the loss stops being finite.
    """
    losses = [] if losses is None else losses
    names = {parameter: name for name, parameter in parameters.items()}
    identity = json.dumps([identity, {name: value for name, value in asdict(options).items() if name not in ("steps", "save_every")}])
    optimizer = torch.optim.AdamW(names, lr=options.lr, weight_decay=options.weight_decay)
    if state is not None:
        _resume(Path(state), names, optimizer, identity, losses)
    try:
        with _checkpointing(checkpointed):
            while len(losses) < options.steps:
                losses.append(_step(loss, options, optimizer, len(losses)))
                if state is not None and len(losses) % options.save_every == 0:
                    _save(Path(state), names, optimizer, identity, losses)
                yield len(losses), losses[-1]
    finally:
        if state is not None and losses:
            _save(Path(state), names, optimizer, identity, losses)


def _step(loss: Callable, options: Options, optimizer: torch.optim.Optimizer, done: int) -> float:
    """One step of AdamW; the mean loss."""
    for group in optimizer.param_groups:
        group["lr"] = options.lr * min(1.0, (done + 1) / max(1, options.warmup))
    total = 0.0
    optimizer.zero_grad(set_to_none=True)
    for i in range(options.accumulate):
        generator = torch.Generator().manual_seed(options.seed + 1_000_003 * (done * options.accumulate + i + 1))
        value = loss(generator) / options.accumulate
        if not value.isfinite():
            raise ValueError(f"the loss is {value.item()} at step {done + 1}; lower the learning rate, or check the training pictures")
        value.backward()
        total += value.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, options.clip)
    optimizer.step()
    return total


@contextlib.contextmanager
def _checkpointing(blocks: Iterable[nn.Module]):
    """Recomputes the blocks' activations in the backward pass while entered."""
    blocks = list(blocks)
    for block in blocks:
        plain = block.forward

        def forward(*args, plain=plain, **kwargs):
            return checkpoint(plain, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else plain(*args, **kwargs)
        block.forward = forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _save(path: Path, names: Mapping[nn.Parameter, str], optimizer: torch.optim.Optimizer, identity: str, losses: list[float]) -> None:
    tensors = {}
    for parameter, name in names.items():
        tensors[name] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment].cpu().contiguous()
    data = save(tensors, {"format": "nibble_training", "identity": identity, "losses": json.dumps(losses)})
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise FileRefused(f"{path.name} could not be written ({error.strerror}); check the disk or choose another folder.") from error


def _resume(path: Path, names: Mapping[nn.Parameter, str], optimizer: torch.optim.Optimizer, identity: str, losses: list[float]) -> None:
    if not path.exists():
        return
    header = read_header(path)
    try:
        same = header.metadata["format"] == "nibble_training" and header.metadata["identity"] == identity
        done = json.loads(header.metadata["losses"])
    except (KeyError, ValueError) as error:
        raise FileRefused(f"{path.name} is no state of a training run; delete it or choose another name.") from error
    if not same:
        raise FileRefused(f"{path.name} belongs to a training run with other options, layers or another model; delete it or choose another name.")
    for parameter, name in names.items():
        with torch.no_grad():
            parameter.copy_(read_tensor(header, name))
        if f"{name}.exp_avg" in header.tensors:
            moments = {moment: read_tensor(header, f"{name}.{moment}").to(parameter.device) for moment in _MOMENTS}
            optimizer.state[parameter] = {"step": torch.tensor(float(len(done))), **moments}
    losses.extend(done)
