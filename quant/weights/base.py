"""A quantized linear as named tensors: in a file, in memory, and as a module whose state dict is a
part of the file.

Each format is a dataclass of tensors and options; `X.comfy_quant` holds its JSON, from which
ComfyUI and `container` tell what X is.
"""

import json
from collections.abc import Sequence
from dataclasses import Field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# A weight's fields → their tensors, None for those that it lacks: as keywords of its dataclass,
# which are of many types.
Parts = dict[str, Any]


def json_tensor(facts: dict) -> Tensor:
    """A dictionary as the uint8 tensor in which ComfyUI keeps a layer's JSON (`X.comfy_quant`)."""
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def tensor_json(tensor: Tensor) -> dict:
    """The inverse of `json_tensor`. Raises ValueError when the bytes are no JSON object."""
    facts = json.loads(bytes(tensor.cpu().tolist()).decode())
    if not isinstance(facts, dict):
        raise ValueError(f"comfy_quant holds {facts!r}; a JSON object was expected")
    return facts


class StoredWeight:
    """What all formats share: names on disk, size, device. Subclasses are dataclasses of tensors
    and options.
    """

    __dataclass_fields__: ClassVar[dict[str, Field]]
    proj_down: Tensor | None
    proj_up: Tensor | None

    FORMAT = ""
    SUFFIXES: dict[str, str] = {}  # field → name on disk
    OPTIONAL: tuple[str, ...] = ("bias", "weight_zeros")  # names on disk that a layer may lack
    # facts that the tensors themselves tell; the others are options
    TOLD: tuple[str, ...] = ("format", "rank")
    OUTPUT_DIM: dict[str, int] = {}  # field → the dimension of its tensor that counts outputs

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the linear."""
        raise NotImplementedError

    @property
    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(proj_down (K, R), proj_up (N, R)) of the low-rank branch; None without one."""
        if self.proj_up is None:
            return None
        assert self.proj_down is not None  # each format checks that they go together
        return self.proj_down, self.proj_up

    @property
    def device(self) -> torch.device:
        """Of its tensors."""
        return next(iter(self._tensors().values())).device

    @property
    def branch_dtype(self) -> torch.dtype:
        """Of a low-rank branch that it gets."""
        raise NotImplementedError

    def facts(self) -> dict:
        """The layer's JSON."""
        return {"format": self.FORMAT}

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under their names on disk, e.g. 'double_blocks.0.img_mlp.0' +
        '.weight_scale', and the layer's JSON.
        """
        stored = {
            f"{prefix}.{suffix}": getattr(self, name) for name, suffix in self.SUFFIXES.items()
        }
        stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
        return stored | {f"{prefix}.comfy_quant": json_tensor(self.facts())}

    @classmethod
    def _read(cls, tensors: dict[str, Tensor], prefix: str) -> tuple[Parts, dict]:
        facts = tensor_json(tensors[f"{prefix}.comfy_quant"])
        if facts.get("format") != cls.FORMAT:
            raise ValueError(
                f"{prefix} has the format {facts.get('format')!r}; {cls.FORMAT!r} was expected"
            )
        missing = [
            s
            for s in cls.SUFFIXES.values()
            if s not in cls.OPTIONAL and f"{prefix}.{s}" not in tensors
        ]
        if missing:
            raise ValueError(
                f"{prefix} lacks {', '.join(missing)}; the file is damaged or was written by"
                " another program"
            )
        return {
            name: tensors.get(f"{prefix}.{suffix}") for name, suffix in cls.SUFFIXES.items()
        }, facts

    @staticmethod
    def _refuse_unknown(prefix: str, facts: dict, known: set[str]) -> None:
        """Raises ValueError for options that this version does not know."""
        unknown = facts.keys() - known
        if unknown:
            raise ValueError(
                f"{prefix} uses {', '.join(sorted(unknown))}, which this version does not know;"
                " please update"
            )

    def _check_shapes(self, linear: str, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises ValueError for a tensor of another shape than `linear`, in words, needs."""
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"{name} has the shape {tuple(tensor.shape)}; {linear} needs {shape}"
                )

    def _output_slices(self, start: int, stop: int) -> Parts:
        """The fields of OUTPUT_DIM for outputs start..stop, as views."""
        slices: Parts = {}
        for name, dim in self.OUTPUT_DIM.items():
            tensor = getattr(self, name)
            if tensor is None:
                slices[name] = None
            elif dim == 0:
                slices[name] = tensor[start:stop]
            else:
                slices[name] = tensor[:, start:stop]
        return slices

    @classmethod
    def _joined_outputs(cls, pieces: Sequence["StoredWeight"]) -> Parts:
        """The inverse of `_output_slices` for pieces that have, or lack, the same tensors."""
        joined: Parts = {}
        for name, dim in cls.OUTPUT_DIM.items():
            tensors = [getattr(piece, name) for piece in pieces]
            joined[name] = None if tensors[0] is None else torch.cat(tensors, dim)
        return joined

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without the JSON."""
        return sum(t.nbytes for t in self._tensors().values())

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }

    def to(self, *args, **kwargs):
        """A copy with every tensor moved as by Tensor.to (a dtype is refused: each tensor keeps its
        own).
        """
        if any(isinstance(a, torch.dtype) for a in (*args, *kwargs.values())):
            raise ValueError(
                "a quantized weight's dtypes are fixed by its format; move it with a device only"
            )
        return replace(
            self, **{name: tensor.to(*args, **kwargs) for name, tensor in self._tensors().items()}
        )


def same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two optional tensors hold the same values, or both are None."""
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


class StoredLinear(nn.Module):
    """Holds a weight's tensors under their names on disk; the format's JSON is a buffer too, so
    that a state dict is complete.
    """

    weight_class: type[StoredWeight]

    def __init__(self, weight: StoredWeight, trainable: tuple[str, ...] = ()):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        for name, suffix in weight.SUFFIXES.items():
            tensor = getattr(weight, name)
            if tensor is None:
                # a buffer of None would be an input that torch.export has no tensor for
                setattr(self, suffix, None)
            elif name in trainable:
                self.register_parameter(suffix, nn.Parameter(tensor))
            else:
                self.register_buffer(suffix, tensor)
        self.register_buffer("comfy_quant", json_tensor(weight.facts()))
        self.facts = weight.facts()

    def quantized(self) -> StoredWeight:
        """The dataclass over this module's tensors (shared, not copied)."""
        parts = {name: getattr(self, suffix) for name, suffix in self.weight_class.SUFFIXES.items()}
        options = {
            name: value for name, value in self.facts.items() if name not in self.weight_class.TOLD
        }
        return self.weight_class(**parts, **options)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        stored = state_dict.get(f"{prefix}comfy_quant")
        if stored is not None and tensor_json(stored) != self.facts:
            raise ValueError(
                f"{prefix[:-1]} was made as {self.facts}, the state dict holds"
                f" {tensor_json(stored)}"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) → (..., N) in x's dtype."""
        return self.quantized().forward(x)

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features},"
            f" {', '.join(f'{k}={v}' for k, v in self.facts.items())}"
        )
