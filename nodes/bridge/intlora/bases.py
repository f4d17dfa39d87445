"""The integers of a 4-bit MODEL, which IntLoRAs are made for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from torch.utils.weak import WeakIdKeyDictionary

from ....quant.files.errors import FileRefused
from ....quant.interop.convert import open_4bit
from ....quant.intlora import file
from ....quant.intlora.adapter import Adapter
from ....quant.merge.integer_grid import IntBase, refuse_format
from ....quant.weights.awq_w4a16 import W4A16Weight
from ....quant.weights.formats import weight_of
from ....quant.weights.svdquant_w4a4 import SVDQuantWeight
from ..quantized import layouts

PREFIX = "diffusion_model."
MODEL = "the connected model"
EVEN = (SVDQuantWeight.FORMAT, W4A16Weight.FORMAT)
# attachment of a MODEL: (path of the base file, names of the layers in which IntLoRAs were merged)
MERGED = "nibble_merged"
# weight → rows of it → digest: a layer is hashed once for as long as its tensor lives
_digests: dict = WeakIdKeyDictionary()


class Bases(Mapping):
    """Module name → integers of a 4-bit MODEL's base, made when asked for: also while patches are
    on the model, and where IntLoRAs were merged into it before (read from the file then).

    weights: module name → the model's own weight, without patches
    """

    KIND = "4-bit layer"

    def __init__(self, model: ModelPatcher, device: torch.device | None = None):
        named = [
            (name, getattr(module, "weight", None))
            for name, module in model.model.diffusion_model.named_modules()
        ]
        backups = {
            name: model.backup.get(f"{PREFIX}{name}.weight")
            for name, weight in named
            if layouts.is_ours(weight) and not layouts.is_padded(weight)
        }
        self.weights = {
            name: backups[name].weight if backups[name] else weight
            for name, weight in named
            if name in backups
        }
        path, self._merged = model.get_attachment(MERGED) or (None, ())
        self._file = None if path is None else open_4bit(path)
        self._device = device
        if not self.weights:
            _refuse_model(named)

    def __getitem__(self, name: str) -> IntBase:
        if name in self._merged:
            stored = weight_of(self._file, name)
        else:
            stored = layouts.unpack(self.weights[name])
        base = IntBase.of(stored, name, MODEL)
        return base if self._device is None else base.to(self._device)

    def digest(self, name: str, rows: tuple[int, int]) -> str:
        """`IntBase.digest` of rows of a layer."""
        digests = _digests.setdefault(self.weights[name], {})
        if rows not in digests:
            digests[rows] = self[name].rows(*rows).digest()
        return digests[rows]

    def trainable(self) -> list[str]:
        """The W4A4 layers; all of a model that has none."""
        return [
            name
            for name, weight in self.weights.items()
            if layouts.format_of(weight) == SVDQuantWeight.FORMAT
        ] or list(self)

    def refuse_uneven(self, names: list[str]) -> None:
        """Raises FileRefused where one of these layers has no even grid of integers."""
        for name in names:
            stored = layouts.format_of(self.weights[name])
            if stored not in EVEN:
                refuse_format(stored, name, MODEL.capitalize())

    def fingerprint(self, name: str) -> str:
        """16 hex digits of a layer's integers."""
        return self[name].digest()

    def check(self, adapter: Adapter, file_name: str) -> None:
        """Refuses an adapter that was not made for these integers."""
        if adapter.rounded_bits is not None:
            raise FileRefused(
                f"{file_name} rounds the layers of a 16-bit model, and {MODEL} is in 4 bits;"
                " connect Load Diffusion Model with the 16-bit file that it was trained on."
            )
        file.check_bases(adapter, self, file_name, MODEL, self.digest)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __contains__(self, name: object) -> bool:
        return name in self.weights


def _refuse_model(named: list[tuple[str, torch.Tensor | None]]) -> None:
    """Raises FileRefused for a model without any layer of ours, naming the format that it has."""
    for name, weight in named:
        if isinstance(weight, QuantizedTensor):
            refuse_format(str(weight._layout_cls), name, MODEL.capitalize())
        if weight is not None and weight.element_size() == 1:
            refuse_format(str(weight.dtype).removeprefix("torch."), name, MODEL.capitalize())
    raise FileRefused(
        f"{MODEL.capitalize()} is in 16 bits and has no integers for an IntLoRA; connect Load"
        " SVDQuant Model, apply the LoRA with Load LoRA, or train on it with base 'round to"
        " nearest'."
    )
