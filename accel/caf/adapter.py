"""The two heads of Constant Acceleration Flow beside any flow model: low-rank branches, or whole
differences.

    y = linear(x) + up (down x)           of every adapted layer; rank 0: y = linear(x) + difference
      x
    y = input(x) + extra(v0)              of the input layer of the acceleration head

All branches are multiplied by `share(sigma, middle)`. The second line is "initial velocity
conditioning" (arXiv:2411.00322, section 4: v0 concatenated to x as more channels): a layer on
concatenated channels is the sum of two. What the input layer would be given for v0 is found by
running the model on v0 up to there (`presented_by`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from ...quant.files.errors import FileRefused

MIDDLE = 0.0  # the default of `share`
LARGEST_H = 2.0  # of the pace h: beyond, the path runs backward
# where transformers take their latent in, in order of trial: a linear on patches, or a convolution
# that makes them
_INPUTS = (
    "img_in",
    "img_in.proj",
    "x_embedder",
    "x_embedder.proj",
    "x_embedder.proj.1",
    "x_embedder.proj1",
    "patch_embedding",
    "patchify_proj",
    "init_x_linear",
    "img_embedder",
    "patch_embed.proj",
    "input_layer",
    "proj_in",
    "img_in_patch",
    "visual_embeddings.in_layer",
    "first",
    "input_proj",
    "latent_in",
    "s_embedder.proj",
    "vid_in.proj",
    "video_patch_proj",
    "proj_in.early_conv_layers.0",
    "input_blocks.0.0",
)


class Head(nn.Module):
    """Branches of linears, float32: layers[name] has `down` (rank, K) and `up` (N, rank), or
    `difference` (N, K); `extra`: weight for v0, or None.
    """

    def __init__(self, layers: dict[str, dict[str, Tensor]], extra: Tensor | None):
        super().__init__()
        self.names = list(layers)
        # names hold dots, which modules may not
        self.layers = nn.ModuleList(nn.ParameterDict(tensors) for tensors in layers.values())
        self.extra = None if extra is None else nn.Parameter(extra)

    def branches(self) -> dict[str, nn.ParameterDict]:
        """Layer name → its tensors."""
        return dict(zip(self.names, cast("Iterable[nn.ParameterDict]", self.layers), strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Name in the file → tensor."""
        branches = {
            f"{layer}.{kind}": tensor
            for layer, tensors in self.branches().items()
            for kind, tensor in tensors.items()
        }
        return branches if self.extra is None else branches | {"extra": self.extra}


class CAFAdapter(nn.Module):
    """Both heads, h, how much of them acts half-way (`share`), the name of the input layer, and
    facts of the training (JSON). rank 0: whole differences.
    """

    def __init__(  # noqa: PLR0913 (what a file holds)
        self,
        velocity: Head,
        acceleration: Head,
        h: float,
        rank: int,
        input_layer: str,
        middle: float = MIDDLE,
        facts: dict | None = None,
    ):
        super().__init__()
        self.velocity = velocity
        self.acceleration = acceleration
        self.h = h
        self.rank = rank
        self.input_layer = input_layer
        self.middle = middle
        self.facts = dict(facts or {})

    @classmethod
    def create(
        cls,
        model: nn.Module,
        names: Iterable[str],
        rank: int,
        h: float,
        seed: int = 0,
        middle: float = MIDDLE,
    ) -> CAFAdapter:
        """Heads that change nothing yet, for the linears `names` of a model. Raises ValueError for
        a layer, rank or model that cannot have them.
        """
        generator, modules = torch.Generator().manual_seed(seed), _modules(model)
        layers = {}
        for name in names:
            outputs, inputs = _linear_shape(modules[name])
            if not 0 <= rank <= min(outputs, inputs):
                raise ValueError(
                    f"rank {rank} is not between 0 and {min(outputs, inputs)}, the smaller side of"
                    f" {name}; choose another rank."
                )
            if rank:
                bound = 1 / math.sqrt(inputs)  # kaiming_uniform with a = sqrt(5), as LoRA
                layers[name] = {
                    "down": torch.rand(rank, inputs, generator=generator) * 2 * bound - bound,
                    "up": torch.zeros(outputs, rank),
                }
            else:
                layers[name] = {"difference": torch.zeros(outputs, inputs)}
        place = input_layer(model)
        return cls(
            velocity=Head(layers, None),
            acceleration=Head(_copied(layers), torch.zeros(_weight_shape(modules[place]))),
            h=h,
            rank=rank,
            input_layer=place,
            middle=middle,
        )

    def strength(self, sigma: Tensor) -> Tensor:
        """`share` at noise level sigma (batch,)."""
        return share(sigma, self.middle)

    def head(self, name: str) -> Head:
        """`velocity` or `acceleration`."""
        return {"velocity": self.velocity, "acceleration": self.acceleration}[name]


def _copied(layers: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    return {
        layer: {kind: tensor.clone() for kind, tensor in tensors.items()}
        for layer, tensors in layers.items()
    }


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    """The shape of a linear's weight, also a quantized one's, or a convolution's."""
    if hasattr(module, "in_features"):
        return _linear_shape(module)
    return tuple(cast("Tensor", module.weight).shape)


def _linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(outputs, inputs), also of a quantized linear, which is not an nn.Linear."""
    return cast("int", linear.out_features), cast("int", linear.in_features)


def input_layer(model: nn.Module) -> str:
    """The dotted name of the module that sees the latent first. Raises ValueError for a model in
    which it is not known.
    """
    modules = _modules(model)
    for name in _INPUTS:
        module = modules.get(name)
        if hasattr(module, "in_features") or isinstance(module, (nn.Conv2d, nn.Conv3d)):
            return name
    raise ValueError(
        f"{type(model).__name__} takes its latent in by none of {', '.join(_INPUTS)}, so it cannot"
        " be given an initial velocity; FLUX, SD3, Qwen-Image, Wan, Lumina and their kin can."
    )


# ---- beside a model


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Name → module; what torch.compile has wrapped goes by its own name."""
    return {name.replace("_orig_mod.", ""): module for name, module in model.named_modules()}


def share(sigma: Tensor, middle: float) -> Tensor:
    """How much of a head acts at noise level sigma (batch,): middle + (1 - middle) (1 - 2 sigma)^2,
    all of it at both ends.

    There one step has to lead all the way, and the model is far off; half-way between, it is nearly
    right by itself. middle = 1: all of it everywhere, as in the paper. What fading is worth on the
    demo model: tests/bench/results/caf-fading.json.
    """
    return middle + (1 - middle) * (1 - 2 * sigma) ** 2


@contextlib.contextmanager
def attached(
    model: nn.Module,
    head: Head,
    place: str,
    presented: Tensor | None = None,
    strength: Tensor | None = None,
) -> Iterator[None]:
    """The model with a head while entered, and without any trace of it afterwards.

    place: the input layer; presented: what that is given for the initial velocity (`presented_by`),
        None: no initial velocity
    strength: what every branch is multiplied by, (batch,) or (1,); None: 1
    """
    modules, handles = _modules(model), []
    try:
        for name, tensors in head.branches().items():
            handles.append(modules[name].register_forward_hook(_branch(tensors, strength)))
        if presented is not None and head.extra is not None:
            handles.append(
                modules[place].register_forward_hook(_extra(head.extra, presented, strength))
            )
        yield
    finally:
        for handle in handles:
            handle.remove()


def _branch(tensors: nn.ParameterDict, strength: Tensor | None) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        change = args[0]
        for kind in ("difference",) if "difference" in tensors else ("down", "up"):
            change = nn.functional.linear(change, tensors[kind].to(args[0]))
        return output + _scaled(change, strength).to(output.dtype)

    return hook


def _extra(weight: Tensor, presented: Tensor, strength: Tensor | None) -> Callable:
    def hook(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        x = presented.to(args[0])
        if x.shape != args[0].shape:  # called once more, for something else: a reference picture
            return output
        if weight.ndim == 2:
            change = nn.functional.linear(x, weight.to(x))
        else:
            layer = cast("nn.Conv2d", module)  # or nn.Conv3d
            convolve: Callable[..., Tensor] = nn.functional.conv2d
            if weight.ndim == 5:
                convolve = nn.functional.conv3d
            change = convolve(
                x, weight.to(x), None, layer.stride, layer.padding, layer.dilation, layer.groups
            )
        return output + _scaled(change, strength).to(output.dtype)

    return hook


def _scaled(change: Tensor, strength: Tensor | None) -> Tensor:
    """Each sample's rows by its own strength; a layer may see batch and tokens as one dimension,
    the batch first.
    """
    if strength is None:
        return change
    rows = strength.to(change).repeat_interleave(len(change) // len(strength))
    return change * rows.reshape(-1, *[1] * (change.ndim - 1))


class _Seen(BaseException):
    """Carries an input layer's input out of a model; no `except Exception` on the way holds
    it up.
    """


def presented_by(model: nn.Module, place: str, call: Callable[[], object]) -> Tensor:
    """What the layer `place` is first given when `call()` runs the model, which is stopped
    there.
    """

    def stop(module: nn.Module, args: tuple) -> None:
        raise _Seen(args[0])

    handle = _modules(model)[place].register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            call()
    except _Seen as seen:
        return seen.args[0]
    finally:
        handle.remove()
    raise ValueError(
        f"{type(model).__name__} drew a picture without its layer {place}, so it cannot be given an"
        " initial velocity."
    )


def check(
    adapter: CAFAdapter, model: nn.Module, file: str, what: str = "the connected model"
) -> None:
    """Raises FileRefused unless every layer of the adapter is one of the model, of the same
    shape.
    """
    modules = _modules(model)
    for head in (adapter.velocity, adapter.acceleration):
        for name, tensors in head.branches().items():
            wanted = (
                tuple(tensors["difference"].shape)
                if "difference" in tensors
                else (len(tensors["up"]), tensors["down"].shape[1])
            )
            has = (
                _weight_shape(modules[name]) if hasattr(modules.get(name), "in_features") else None
            )
            if has != wanted:
                raise FileRefused(
                    f"{file} changes {name} ({wanted[0]} x {wanted[1]}), and {what} has"
                    f" {'no such layer' if has is None else f'{has[0]} x {has[1]} there'}; connect"
                    " the model that it was trained for."
                )
    extra, layer = adapter.acceleration.extra, modules.get(adapter.input_layer)
    if layer is None or extra is not None and tuple(extra.shape) != _weight_shape(layer):
        raise FileRefused(
            f"{file} feeds the initial velocity to {adapter.input_layer}, which does not fit"
            f" {what}; connect the model that it was trained for."
        )
