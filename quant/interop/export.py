"""What a converted file will hold: for each target format, its units, their sizes, and how to make
them from an opened file.

Codes, scales, smoothing and low-rank factors are moved, not computed again, but where smoothing was
fused upstream (`unfuse_norms`: scales and factors are rounded once more). What a format cannot say
is refused; what it says otherwise (zero points, the bias of unsigned inputs, padding of ranks)
is told in `notes`.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..files.checkpoint import FORMAT_VERSION, QuantizedFile
from ..files.errors import FileRefused
from ..files.layer_formats import layer_sizes
from ..files.modelspec import described, modelspec_of
from ..files.report import LayerRow, Report
from ..files.safetensors import TensorSpec
from ..weights.base import json_tensor
from ..weights.formats import refuse_patched
from .nunchaku_read import FACTS

# of a layer's format, as reports call it
ACTIONS = {
    "svdquant_w4a4": "w4a4",
    "svdquant_w4a8": "w4a4",
    "svdquant_nvfp4": "nvfp4",
    "awq_w4a16": "w4a16",
    "vq": "vq",
}

_UNSAID = {
    "vq": "holds codewords (vq)",
    "svdquant_w4a8": "holds levels of a table (svdquant_w4a8)",
    "svdquant_nvfp4": "holds 4-bit floats (NVFP4)",
    "svdquant_w4a4": "holds 4-bit integers beside 4-bit floats",
    "awq_w4a16": "holds weights alone in 4 bits",
    "int8_tensorwise": "holds a text encoder's 8-bit rows",
}


class Export(ABC):
    """A conversion: `units` names what is written at once, `specs` and `make` give a unit's sizes
    and tensors.
    """

    FORMATS: tuple[str, ...] = ("svdquant_w4a4", "awq_w4a16")  # of layers that it can say

    def __init__(self, source: QuantizedFile):
        refuse_patched(source)
        self.source = source
        self.notes: list[str] = []
        for name, facts in source.layers.items():
            if facts["format"] not in self.FORMATS:
                what = _UNSAID[facts["format"]]
                raise self.refused(name, what, "Nibble's own format can")

    def refuse_wide(self, name: str, facts: dict) -> None:
        """Raises FileRefused for a layer that was fitted for 8-bit activations: other programs know
        4 bits alone.
        """
        if facts.get("act_bits", 4) != 4:
            raise self.refused(
                name,
                "was fitted for 8-bit activations",
                "quantize the 16-bit file again with --activations 4",
            )

    @property
    def units(self) -> Iterable[str]:
        """Names, in order."""
        return self.source.units

    def specs(self, name: str) -> list[TensorSpec]:
        """Names, dtypes and shapes of what `make` will give."""
        return self.source.specs(name)

    def make(self, name: str) -> dict[str, Tensor]:
        """A unit's tensors."""
        return self.source.unit(name)

    @abstractmethod
    def metadata(self, bytes_after: int) -> dict[str, str]:
        """The header's metadata, for a file of that size."""

    def refused(self, name: str, what: str, fix: str) -> FileRefused:
        """A refusal of one layer."""
        return FileRefused(
            f"{self.source.path.name} {what} in {name}, which this format cannot say; {fix}."
        )


class ToNibble(Export):
    """Nibble's own format. What Nunchaku's programs read from the metadata is kept, so that the way
    back is open.
    """

    FORMATS = ("svdquant_w4a4", "svdquant_w4a8", "svdquant_nvfp4", "awq_w4a16", "vq")

    def metadata(self, bytes_after: int) -> dict[str, str]:
        formats = {facts["format"] for facts in self.source.layers.values()}
        kept = {
            key: self.source.metadata[key]
            for key in FACTS
            if key in self.source.metadata and key not in self.source.built_by
        }
        origin = {
            "name": self.source.path.name,
            "bytes": self.source.size,
            "format": self.source.kind,
        }
        return (
            described(modelspec_of(self.source.metadata))
            | {
                "format": "nibble",
                "nibble_version": str(FORMAT_VERSION),
                "method": "vq" if "vq" in formats else "svdquant",
                "source": json.dumps(origin),
                "recipe": "{}",
                "calibration": "{}",
                "report": self._report(bytes_after),
                **self.source.built_by,
            }
            | ({"nunchaku": json.dumps(kept)} if kept else {})
        )

    def _report(self, bytes_after: int) -> str:
        rows = []
        for name in self.source.units:
            specs = {spec.name.rpartition(".")[2]: spec for spec in self.source.specs(name)}
            size, weight = sum(spec.nbytes for spec in specs.values()), specs.get("weight")
            if name in self.source.layers:
                facts = self.source.layers[name]
                kind, (n, packed) = ACTIONS[facts["format"]], specs["weight"].shape
                sizes = layer_sizes(facts, n, packed)
                assert sizes is not None  # checked when the file was opened
                before = 2 * n * (sizes["K"] + ("bias" in specs))
                rows.append(LayerRow(name, kind, f"from {self.source.kind}", None, before, size))
            elif weight is not None and len(weight.shape) == 2:
                rows.append(
                    LayerRow(
                        name.removesuffix(".weight"),
                        "keep",
                        f"16 bit in {self.source.kind}",
                        None,
                        size,
                        size,
                    )
                )
        report = Report(
            self.source.family,
            rows,
            sum(row.bytes_before for row in rows),
            bytes_after,
            notes=self.notes,
        )
        return report.to_json(seconds=False)


class ToKitchen(Export):
    """comfy-kitchen's names in natural order: Nibble's, with its JSON, and with zero points written
    out.
    """

    def __init__(self, source: QuantizedFile):
        super().__init__(source)
        for name, facts in source.layers.items():
            if facts.get("rotation"):
                raise self.refused(
                    name, "has a rotation", "quantize the 16-bit file again with --rotation off"
                )
            self.refuse_wide(name, facts)
            if facts.get("unsigned_from"):
                raise self.refused(
                    name, "has inputs of two kinds side by side", "convert it to nibble, which can"
                )
            if facts.get("smooth_rows"):
                raise self.refused(
                    name, "joins parts of unequal smoothing", "convert it to nibble, which can"
                )
            if facts["format"] == "awq_w4a16" and facts.get("rank"):
                raise self.refused(
                    name,
                    "has a low-rank branch beside 4-bit weights",
                    "merge the LoRA again without its modulation part",
                )

    def make(self, name: str) -> dict[str, Tensor]:
        tensors = dict(self.source.unit(name))
        if name not in self.source.layers:
            return tensors
        tensors[f"{name}.comfy_quant"] = json_tensor(self._json(name))
        if (
            f"{name}.weight_zeros" not in tensors
            and self.source.layers[name]["format"] == "awq_w4a16"
        ):
            tensors[f"{name}.weight_zeros"] = torch.zeros_like(tensors[f"{name}.weight_scale"])
        return tensors

    def _json(self, name: str) -> dict:
        facts = self.source.layers[name]
        sign = (
            {"act_unsigned": bool(facts.get("act_unsigned"))}
            if facts["format"] == "svdquant_w4a4"
            else {}
        )
        # written also where false: ComfyUI guesses otherwise
        return {"format": facts["format"], "group_size": 64} | sign

    def specs(self, name: str) -> list[TensorSpec]:
        specs = {spec.name: spec for spec in self.source.specs(name)}
        if name in self.source.layers:
            key, scale = f"{name}.comfy_quant", specs[f"{name}.weight_scale"]
            specs[key] = TensorSpec(key, torch.uint8, tuple(json_tensor(self._json(name)).shape))
            if self.source.layers[name]["format"] == "awq_w4a16":
                zeros = f"{name}.weight_zeros"
                specs.setdefault(zeros, TensorSpec(zeros, scale.dtype, scale.shape))
        return list(specs.values())

    def metadata(self, bytes_after: int) -> dict[str, str]:
        return modelspec_of(self.source.metadata) | {
            "converted_from": json.dumps(
                {"name": self.source.path.name, "format": self.source.kind}
            ),
            "converter": "nibble",
            **self.source.built_by,
        }


def kept_facts(source: QuantizedFile) -> Mapping[str, str]:
    """What a converted file remembers of Nunchaku's metadata."""
    return source.fact("nunchaku") or {
        key: source.metadata[key]
        for key in FACTS
        if key in source.metadata and key not in source.built_by
    }
