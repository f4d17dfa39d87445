"""The two formats as nn.Modules for scripts: a state dict under the names on disk, and a low-rank branch that can be trained."""

from torch import Tensor, nn

from .weight import SVDQuantWeight, W4A16Weight, json_tensor, tensor_json


class _QuantizedLinear(nn.Module):
    """Holds a weight's tensors under their names on disk; the format's JSON is a buffer too, so that a state dict is complete."""

    weight_class: type

    def __init__(self, weight: SVDQuantWeight | W4A16Weight, trainable: tuple[str, ...] = ()):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        for name, suffix in weight.SUFFIXES.items():
            tensor = getattr(weight, name)
            if name in trainable and tensor is not None:
                self.register_parameter(suffix, nn.Parameter(tensor))
            else:
                self.register_buffer(suffix, tensor)
        self.register_buffer("comfy_quant", json_tensor(weight.facts()))
        self.facts = weight.facts()

    def quantized(self) -> SVDQuantWeight | W4A16Weight:
        """The dataclass over this module's tensors (shared, not copied)."""
        parts = {name: getattr(self, suffix) for name, suffix in self.weight_class.SUFFIXES.items()}
        options = {name: value for name, value in self.facts.items() if name not in ("format", "rank")}
        return self.weight_class(**parts, **options)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        stored = state_dict.get(f"{prefix}comfy_quant")
        if stored is not None and tensor_json(stored) != self.facts:
            raise ValueError(f"{prefix[:-1]} was made as {self.facts}, the state dict holds {tensor_json(stored)}")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype."""
        return self.quantized().forward(x)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {', '.join(f'{k}={v}' for k, v in self.facts.items())}"


class SVDQuantLinear(_QuantizedLinear):
    """svdquant_w4a4. train: proj_down, proj_up and the bias become parameters; codes, scales and smoothing never do."""

    weight_class = SVDQuantWeight

    def __init__(self, weight: SVDQuantWeight, train: bool = False):
        super().__init__(weight, ("proj_down", "proj_up", "bias") if train else ())


class W4A16Linear(_QuantizedLinear):
    """awq_w4a16. train: the bias becomes a parameter."""

    weight_class = W4A16Weight

    def __init__(self, weight: W4A16Weight, train: bool = False):
        super().__init__(weight, ("bias",) if train else ())


def as_module(weight: SVDQuantWeight | W4A16Weight, train: bool = False) -> nn.Module:
    """The module for either dataclass."""
    return (SVDQuantLinear if isinstance(weight, SVDQuantWeight) else W4A16Linear)(weight, train)
