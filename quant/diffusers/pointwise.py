"""A quantized linear in the place of a convolution of 1 x 1: channels last before it, and back."""

from torch import Tensor, nn


def _last(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].movedim(1, -1), *args[1:])


def _first(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    return out.movedim(-1, 1)


def is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution of 1 x 1 that mixes channels and does nothing else."""
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))
        and module.groups == 1
    )


def on_channels(linear: nn.Module) -> nn.Module:
    """A linear that reads and gives (batch, channels, height, width). By hooks: its state dict and
    its place in the model stay those of a linear.
    """
    linear.register_forward_pre_hook(_last)
    linear.register_forward_hook(_first)
    return linear


def takes_channels(linear: nn.Module) -> bool:
    """Whether `on_channels` was asked for a linear."""
    return _last in linear._forward_pre_hooks.values()
