"""Training IntLoRA layers inside any model: attach them, step, resume, take the adapter out, detach.

The loss is the caller's (rectified flow for FLUX: |v(x_t, t) - (noise - x_0)|^2); it gets a random generator that depends on the seed and the
step alone, so that a run that was interrupted and resumed ends as one that was not.
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

from .. import linears
from ..container import FileRefused, read_header, read_tensor
from .adapter import Adapter
from .base import IntBase
from .factors import LARGEST
from .linear import IntLoRALinear, rule_for, separated

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


def attach(model: nn.Module, names: Iterable[str], variant: str = "shift_add", rank: int = 16, seed: int = 0, k: int = 8, bits: int = 4,
           group: int = 64, lora_bits: int = 8, rho: float | None = 0.25, alpha: float | None = None, odd: bool = False,
           width: torch.dtype = torch.int8, bases: Mapping[str, IntBase] | None = None) -> dict[str, IntLoRALinear]:
    """Replaces the named linears by IntLoRA layers and returns them; `detach` undoes it. All other parameters of the model are frozen.

    A linear that is quantized already (it has `quantized()`, or `bases` gives its integers) keeps its arithmetic, and the change is computed
    beside it. A 16-bit linear becomes a plain base of `bits` in groups of `group`, with R as the paper has it for MUL and SHIFT (rho, alpha).
    """
    if width not in LARGEST:
        raise ValueError(f"width={width} is neither int8 nor int16")
    layers: dict[str, IntLoRALinear] = {}
    model.requires_grad_(False)
    for name in names:
        old = model.get_submodule(name)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + len(layers))
        base = (bases or {}).get(name) or (IntBase.of(old.quantized(), name) if hasattr(old, "quantized") else None)
        if base is not None:
            layer = IntLoRALinear(base, rule_for(base, variant, k, lora_bits), rank, inner=old, generator=generator, width=width)
        else:
            base, rule = separated(old.weight.detach(), variant, seed, name, bits, group, lora_bits, rho, alpha, odd)
            rule = rule if variant != "shift_add" else rule_for(base, variant, k)
            bias = None if old.bias is None else old.bias.detach()
            layer = IntLoRALinear(base, rule, rank, bias, generator=generator, width=width)
        object.__setattr__(layer, "replaced", old)  # not a child: its weights stay out of the model while it is away
        linears.replace(model, name, layer)
        layers[name] = layer
    return layers


def detach(model: nn.Module, layers: Mapping[str, IntLoRALinear]) -> None:
    """Puts the linears back that `attach` replaced."""
    for name, layer in layers.items():
        linears.replace(model, name, layer.replaced)


def adapter(layers: Mapping[str, IntLoRALinear], **facts) -> Adapter:
    """What has been trained. facts: anything JSON that belongs into the file, such as the number of steps."""
    return Adapter({name: layer.adapter() for name, layer in layers.items()}, facts)


def train(layers: Mapping[str, IntLoRALinear], loss: Callable[[torch.Generator], Tensor], options: Options,
          state: str | os.PathLike | None = None, checkpointed: Iterable[nn.Module] = (),
          progress: Callable[[int, int, float], None] = lambda step, steps, loss: None) -> list[float]:
    """The whole run; returns the loss of every step, those of resumed runs included.

    progress(step, steps, loss) is called after each step; an exception raised in it stops the run, and the state is kept. For `state`,
    `checkpointed` and the exceptions see `steps`.
    """
    losses: list[float] = []
    running = steps(layers, loss, options, state, checkpointed, losses)
    with contextlib.closing(running):
        for step, value in running:
            progress(step, options.steps, value)
    return losses


def steps(layers: Mapping[str, IntLoRALinear], loss: Callable[[torch.Generator], Tensor], options: Options,
          state: str | os.PathLike | None = None, checkpointed: Iterable[nn.Module] = (),
          losses: list[float] | None = None) -> Iterator[tuple[int, float]]:
    """Trains, yielding (steps done, loss) after each step. Closing the generator early, or an exception, writes the state first.

    loss          generator → a scalar; everything random in it must come from the generator
    state         a file to resume from and to save to, atomically, every `save_every` steps and at the end; None: nothing is kept
    checkpointed  blocks whose activations are computed again in the backward pass instead of kept
    losses        a list that is filled with the loss of every step, the resumed ones first
    Raises FileRefused for a state file of another run, ValueError where the loss stops being finite.
    """
    losses = [] if losses is None else losses
    names = {parameter: f"{name}.{which}" for name, layer in layers.items()
             for which, parameter in (("lora_up", layer.lora_up), ("lora_down", layer.lora_down))}
    optimizer = torch.optim.AdamW(names, lr=options.lr, weight_decay=options.weight_decay)
    if state is not None:
        _resume(Path(state), names, optimizer, _identity(layers, options), losses)
    try:
        with _checkpointing(checkpointed):
            while len(losses) < options.steps:
                losses.append(_step(loss, options, optimizer, len(losses)))
                if state is not None and len(losses) % options.save_every == 0:
                    _save(Path(state), names, optimizer, _identity(layers, options), losses)
                yield len(losses), losses[-1]
    finally:
        if state is not None and losses:
            _save(Path(state), names, optimizer, _identity(layers, options), losses)


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


def _identity(layers: Mapping[str, IntLoRALinear], options: Options) -> str:
    """What must agree for a state to be resumed; the number of steps may grow."""
    shapes = {name: [layer.rule.NAME, *layer.lora_up.shape, *layer.lora_down.shape] for name, layer in layers.items()}
    base = next(iter(layers.values())).base.digest() if layers else ""
    kept = {name: value for name, value in asdict(options).items() if name not in ("steps", "save_every")}
    return json.dumps([shapes, base, kept])


def _save(path: Path, names: Mapping[nn.Parameter, str], optimizer: torch.optim.Optimizer, identity: str, losses: list[float]) -> None:
    tensors = {}
    for parameter, name in names.items():
        tensors[name] = parameter.detach().cpu().contiguous()
        for moment in _MOMENTS:
            if parameter in optimizer.state:
                tensors[f"{name}.{moment}"] = optimizer.state[parameter][moment].cpu().contiguous()
    data = save(tensors, {"format": "intlora_state", "identity": identity, "losses": json.dumps(losses)})
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
        same = header.metadata["format"] == "intlora_state" and header.metadata["identity"] == identity
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
