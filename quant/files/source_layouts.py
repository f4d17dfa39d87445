"""ComfyUI's own per-layer formats, as a source may be stored in: what a file says of its layers,
and how comfy-kitchen's layouts read them.

The rules are ComfyUI's (comfy/ops.py, _load_quantized_module): a layer's JSON lies in
`X.comfy_quant`, or for all layers in the header's `_quantization_metadata`.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...kernels.optional import optional
from .errors import FORMS, FileRefused
from .safetensors import tensor_bytes
from .stored_tensors import StoredTensor

_INT8 = "int8_tensorwise"
# format → comfy-kitchen's layout, its fields → names on disk, its options → their defaults
LAYOUTS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "mxfp8": ("TensorCoreMXFP8Layout", {"scale": "weight_scale"}, {}),
    "nvfp4": (
        "TensorCoreNVFP4Layout",
        {"scale": "weight_scale_2", "block_scale": "weight_scale"},
        {},
    ),
    _INT8: (
        "TensorWiseINT8Layout",
        {"scale": "weight_scale"},
        {"convrot": False, "convrot_groupsize": 256},
    ),
    "convrot_w4a4": (
        "TensorCoreConvRotW4A4Layout",
        {"scale": "weight_scale"},
        {"convrot_groupsize": 256, "linear_dtype": "int4"},
    ),
    "asym_w4a8_int8": (
        "AsymW4A8Int8Layout",
        {
            "scale": "weight_s_rel",
            "s_channel": "weight_s_channel",
            "codebook": "weight_codebook",
            "correction": "weight_correction",
        },
        {"group_size": 16, "convrot_groupsize": 256},
    ),
    "awq_w4a16": (
        "TensorCoreAWQW4A16Layout",
        {"scale": "weight_scale", "zeros": "weight_zeros"},
        {},
    ),
}
_LACKING = ("weight_codebook", "weight_correction")  # what a layer may lack
_FP8 = ("float8_e4m3fn", "float8_e5m2")
_OURS = ("svdquant_w4a4", "svdquant_w4a8", "svdquant_nvfp4", "vq")
_PACKED = ("nvfp4", "convrot_w4a4", "awq_w4a16")  # two weights a byte
# (format, suffix) → the dtype that its bytes may be stored without
_VIEWS = {
    ("mxfp8", "weight_scale"): "float8_e8m0fnu",
    ("nvfp4", "weight_scale"): "float8_e4m3fn",
    ("asym_w4a8_int8", "weight_s_rel"): "float8_e4m3fn",
}
# what lies beside X.weight
ACCESSORIES = (
    "weight_scale",
    "weight_scale_2",
    "scale_weight",
    "scale_input",
    "input_scale",
    "pre_quant_scale",
    "weight_zeros",
    "weight_s_rel",
    "weight_s_channel",
    "weight_codebook",
    "weight_correction",
    "comfy_quant",
)
_SAID = "_quantization_metadata"
_LARGEST_JSON = 65536  # bytes of a layer's
_SIX_BITS = 6


class LayerFormats:
    """What a file says of its quantized layers: `of` a layer, the JSON of its format (params
    included), for those that have a matrix.

    name: the file's, for people; stored: its tensors; raw: reads one. Raises FileRefused for what
    cannot be read.
    """

    def __init__(
        self,
        name: str,
        said: str,
        prefix: str,
        stored: Mapping[str, StoredTensor],
        raw: Callable[[str], Tensor],
    ):
        self._name, self._stored, self._raw = name, stored, raw
        listed = self._json(_SAID, said).get("layers", {})
        if not isinstance(listed, dict):
            raise self._no_json(_SAID)
        formats = {key.removeprefix(prefix): facts for key, facts in listed.items()}
        for key, info in stored.items():
            if key.endswith(".comfy_quant"):
                if info.nbytes > _LARGEST_JSON:
                    raise self._no_json(key)
                text = bytes(tensor_bytes(raw(key)))
                formats[key.removesuffix(".comfy_quant")] = self._json(key, text)
        self.of: dict[str, dict] = {}
        for module, facts in formats.items():
            if not isinstance(facts, dict) or not isinstance(facts.get("params") or {}, dict):
                raise self._no_json(module)
            if f"{module}.weight" in stored:
                self.of[module] = {**facts, **(facts.get("params") or {})}
        for module, facts in self.of.items():
            self._check(module, facts)

    def _json(self, where: str, text: str | bytes) -> dict:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._no_json(where) from error
        if not isinstance(value, dict):
            raise self._no_json(where)
        return value

    def _no_json(self, where: str) -> FileRefused:
        return FileRefused(
            f"{self._name} says in {where} how it is quantized, and that is no JSON that can be"
            f" read; download it again, or choose the same model in {FORMS}."
        )

    def _check(self, module: str, facts: dict) -> None:
        kind = str(facts.get("format"))
        if kind in _OURS:
            raise FileRefused(
                f"{self._name} is quantized already, by SVDQuant or VQ; choose the same model in"
                f" {FORMS}."
            )
        if kind not in (*LAYOUTS, *_FP8):
            raise FileRefused(
                f"{self._name} stores {module} in the format {facts.get('format')!r}, which Nibble"
                f" cannot read; choose the same model in {FORMS}."
            )
        if kind not in LAYOUTS:
            return
        for suffix in LAYOUTS[kind][1].values():
            if suffix not in _LACKING and f"{module}.{suffix}" not in self._stored:
                raise FileRefused(
                    f"{self._name} lacks {module}.{suffix}; the file is damaged: download it again."
                )
        if kind == "asym_w4a8_int8" and self.bits(module) not in (4, _SIX_BITS):
            raise FileRefused(
                f"{self._name} has a damaged layer: {module}.weight has rows of"
                f" {self._stored[f'{module}.weight'].shape[-1]} bytes for {self._columns(module)}"
                " inputs, which is neither 4 nor 6 bits a weight; download it again."
            )

    def is_packed(self, module: str) -> bool:
        """Whether comfy-kitchen decodes a layer: more than a scale in front of its numbers."""
        return module in self.of and self.of[module]["format"] in LAYOUTS

    def kind(self, module: str) -> str | None:
        """What files in a layer's format are called; None for one that has none."""
        if module not in self.of:
            return None
        name = self.of[module]["format"]
        return "int8_convrot" if name == _INT8 and self.of[module].get("convrot") else name

    def shape(self, module: str) -> tuple[int, ...]:
        """(N, K) of the matrix that a packed layer stands for."""
        stored = self._stored[f"{module}.weight"].shape
        rows = self._stored.get(f"{module}.bias")
        # nvfp4 and mxfp8 pad their rows; the bias has as many entries as the linear has outputs.
        n = min(stored[0], rows.shape[0]) if rows else stored[0]
        return (n, self._columns(module))

    def _columns(self, module: str) -> int:
        """K: of packed rows their bytes do not tell it, where weights may have 4 or 6 bits."""
        facts = self.of[module]
        if facts["format"] == "asym_w4a8_int8":
            return self._stored[f"{module}.weight_s_rel"].shape[-1] * int(
                facts.get("group_size", 16)
            )
        width = self._stored[f"{module}.weight"].shape[-1]
        return width * 2 if facts["format"] in _PACKED else width

    def bits(self, module: str) -> float:
        """Of a weight in X.weight alone."""
        columns = self._columns(module)
        return 8 * self._stored[f"{module}.weight"].shape[-1] / columns if columns else 0

    def matrix(self, module: str) -> Tensor:
        """A packed layer's matrix, float32 (N, K). Raises FileRefused where comfy-kitchen, or the
        installed one, cannot decode it.
        """
        facts, layout = self.of[module], self.layout(module)
        _, fields, options = LAYOUTS[facts["format"]]
        tensors = {
            field: self._part(module, facts["format"], suffix)
            for field, suffix in fields.items()
            if suffix not in _LACKING or f"{module}.{suffix}" in self._stored
        }
        tensors |= {key: facts.get(key, value) for key, value in options.items()}
        packed, shape = self._raw(f"{module}.weight"), self.shape(module)
        params = layout.Params(
            orig_dtype=torch.float32, orig_shape=(packed.shape[0], shape[1]), **tensors
        )
        return layout.dequantize(packed, params)[: shape[0], : shape[1]].float()

    def layout(self, module: str) -> Any:
        """comfy-kitchen's class for a layer. Raises FileRefused where it has none."""
        kind = self.of[module]["format"]
        layout = getattr(optional("comfy_kitchen.tensor")[0], LAYOUTS[kind][0], None)
        if layout is None:
            raise FileRefused(
                f"{self._name} is in ComfyUI's format {kind}, which needs the package"
                " comfy-kitchen (a newer one, if it is installed); install it, or choose the"
                " same model in 16 bit or fp8."
            )
        # the first that knows rows of 6 bits can tell them apart
        if kind == "asym_w4a8_int8" and self.bits(module) == _SIX_BITS:
            if not hasattr(layout, "bits"):
                raise FileRefused(
                    f"{self._name} has weights of 6 bits in ComfyUI's format {kind}, which the"
                    " installed comfy-kitchen cannot read; update it (pip install --upgrade"
                    " comfy-kitchen), or choose the same model in 16 bit or fp8."
                )
        return layout

    def _part(self, module: str, kind: str, suffix: str) -> Tensor:
        tensor, view = self._raw(f"{module}.{suffix}"), _VIEWS.get((kind, suffix))
        # ComfyUI stores fp8 scales as fp8 or as the same bytes in uint8
        return tensor.view(getattr(torch, view)) if view and tensor.dtype == torch.uint8 else tensor
