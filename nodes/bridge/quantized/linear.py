"""Nibble inside ComfyUI's models: `custom_operations` whose Linear holds an ordinary weight or one
of Nibble's.

Only Linear is swapped, at construction, by ComfyUI itself; every other layer is ComfyUI's own. The
class keeps ComfyUI's contract for a quantized linear (its `mixed_precision_ops`): the cast context,
`convert_weight`/`set_weight`, state dict names, `weight_function`, and the attributes through which
dynamic VRAM attaches patches.
"""

from __future__ import annotations

import logging
import sys

import comfy.float
import comfy.model_management
import comfy.ops
import torch
from comfy.quant_ops import QuantizedTensor

from ....quant.weights.base import tensor_json
from . import layouts, lora

log = logging.getLogger("nibble")

# names of functions whose slow path has been mentioned in the log
_slow_path_logged: set[str] = set()


class Linear(comfy.ops.manual_cast.Linear):
    """A linear layer of an ordinary weight (N, K), or of one quantized tensor whose logical
    shape is (N, K).
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
        # no storage: a 4-bit file brings its own, and 16 bits of it may not fit
        torch.nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.weight_comfy_model_dtype = dtype
        self.bias_comfy_model_dtype = dtype
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.expects_bias = bias
        self._side_patch = None
        self._lowvram_patch = None
        self._weight_functions = []
        self._patch_cache = lora.PatchCache()
        self._planned: lora.WeightDelta | None = None  # between convert_weight and set_weight

    # ---- state dict: the file's names, in both directions

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        parts = {
            name[len(prefix) :]: tensor
            for name, tensor in state_dict.items()
            if name.startswith(prefix)
        }
        assign = local_metadata.get("assign_to_params_buffers", False)
        self.bias = self._own(parts.pop("bias", None), assign) if self.expects_bias else None
        weight = parts.pop("weight", None)
        if "comfy_quant" in parts:
            weight = layouts.pack(
                {"weight": weight} | parts,
                tensor_json(parts.pop("comfy_quant")),
                self._compute_dtype(),
            )
            parts = {}
        if layouts.is_ours(weight):
            self.weight = layouts.live(layouts.of_inputs(weight, self.in_features))
        else:
            self.weight = self._own(weight, assign)
        unexpected_keys.extend(prefix + name for name in parts)
        expected = ("weight", "bias") if self.expects_bias else ("weight",)
        missing_keys.extend(prefix + name for name in expected if getattr(self, name) is None)
        error_msgs.extend(self._mismatches(prefix))

    def _mismatches(self, prefix: str) -> list[str]:
        """What does not have the model's shape, in torch's words."""
        wanted = {"weight": (self.out_features, self.in_features), "bias": (self.out_features,)}
        return [
            f"size mismatch for {prefix}{name}: the file has {tuple(tensor.shape)}, the model"
            f" {wanted[name]}"
            for name, tensor in self._parameters.items()
            if tensor is not None and tuple(tensor.shape) != wanted[name]
        ]

    def _own(self, tensor: torch.Tensor | None, assign: bool) -> torch.nn.Parameter | None:
        """A 16-bit tensor as a parameter: as it is when ComfyUI casts while streaming, else a
        copy in the model's dtype.
        """
        if tensor is None:
            return None
        own = tensor if assign else tensor.to(dtype=self.weight_comfy_model_dtype, copy=True)
        return torch.nn.Parameter(own, requires_grad=False)

    def _compute_dtype(self) -> torch.dtype:
        return self.weight_comfy_model_dtype or torch.bfloat16

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        if not layouts.is_ours(self.weight):
            return super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        destination = {} if destination is None else destination
        destination.update(layouts.stored_tensors(self.weight, f"{prefix}weight"))
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias
        destination[f"{prefix}comfy_quant"] = layouts.settings_tensor(self.weight)
        return destination

    def __getattr__(self, name):
        # ComfyUI reads every name of the state dict back as an attribute
        # (ModelPatcher.get_key_patches).
        if name.startswith("weight_") or name == "comfy_quant":
            weight = self._parameters.get("weight")
            if layouts.is_ours(weight):
                stored = layouts.stored_tensors(weight, "weight") | {
                    "comfy_quant": layouts.settings_tensor(weight)
                }
                if name in stored:
                    return stored[name]
        return super().__getattr__(name)

    # torch's own would swap the tensor's insides through `.data`
    def _apply(self, fn, recurse=True):
        for name, parameter in self._parameters.items():
            moved = None if parameter is None else fn(parameter)
            # one that was made in inference mode and stays must not be wrapped again outside of
            # it
            if moved is not parameter:
                self._parameters[name] = layouts.live(moved)
        return self

    # ---- patches

    @property
    def weight_function(self) -> list:
        return self._weight_functions

    @weight_function.setter
    def weight_function(self, functions: list):
        self._patch_cache.clear()
        self._weight_functions = (
            functions if self._side_patch is None else [*functions, self._side_patch]
        )

    @property
    def weight_lowvram_function(self):
        """What dynamic VRAM applies to the streamed weight itself: for a 4-bit weight nothing,
        ever (see the setter).
        """
        return self._lowvram_patch

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch):
        # ComfyUI would dequantize the weight, patch it and round it to 4 bits again. The patch
        # is computed beside instead.
        functions = [f for f in self._weight_functions if f is not self._side_patch]
        ours = layouts.is_ours(self.weight)
        self._side_patch = lora.SidePatch(patch) if ours and patch is not None else None
        self._lowvram_patch = None if ours else patch
        self.weight_function = functions

    def convert_weight(self, weight, inplace=False, **kwargs):
        """The float weight that patches are computed on: float32 (N, K) for a quantized one,
        without storage where they are known.
        """
        if not layouts.is_ours(weight):
            return weight
        self._planned = lora.planned(self, weight, sys._getframe(1))
        if self._planned is not None:
            return torch.empty(weight.shape, device="meta")
        return layouts.effective_weight(weight)

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Takes the patched float weight back: into a new parameter, so that ComfyUI's backup
        stays the base bit for bit.
        """
        if not layouts.is_ours(self.weight):
            return self._set_plain("weight", weight, seed, return_weight)
        if inplace_update and not return_weight:
            return self._set_hooked(weight)
        if weight.is_meta:
            patched, self._planned = lora.with_plan(self, self._planned), None
        else:
            patched = lora.absorb_dense(self.weight, weight)
        if return_weight:
            return patched
        self.weight = layouts.live(patched)
        return None

    def _set_plain(self, name, value, seed, return_weight):
        old = getattr(self, name)
        value = comfy.float.stochastic_rounding(value, old.dtype, seed=seed or 0)
        if return_weight:
            return value
        setattr(self, name, torch.nn.Parameter(value, requires_grad=False))
        return None

    def _set_hooked(self, weight):
        """A LoRA hook: ComfyUI later copies its backup over the weight in place, so the change
        is kept in the hook cell.
        """
        base, device = self.weight, weight.device
        if weight.is_meta:
            planned, self._planned = self._planned, None
            change = lora.computable(planned, base.params.branch_dtype, lambda: None)
            device = base.device
        else:
            change = lora.dense_delta(base, weight)
        own = layouts.with_hook(base.to(device=device), change)
        self.weight = layouts.live(own)
        # what ComfyUI keeps, as weight.to(…), for the next time this hook is on
        weight.to = own.clone().to

    def convert_bias(self, bias, inplace=False, **kwargs):
        """The bias that goes with `convert_weight`: without the shift of unsigned activations,
        float32.
        """
        shift = self._bias_shift(bias)
        return bias if shift is None else bias.float() + shift

    def set_bias(self, bias, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """Takes a patched bias back and folds the shift in again."""
        shift = self._bias_shift(bias)
        value = bias if shift is None else bias.float() - shift
        if inplace_update and not return_weight:
            folded = value.to(self.bias.dtype)
            self.bias.data.copy_(folded)
            bias.to = folded.to  # as in _set_hooked
            return None
        return self._set_plain("bias", value, seed, return_weight)

    def _bias_shift(self, like: torch.Tensor) -> torch.Tensor | None:
        """What unsigned activations folded into the bias, on its device."""
        if not layouts.is_ours(self.weight):
            return None
        return lora.row_fold_of(self.weight.to(device=like.device))

    # ---- forward

    def forward(self, input):
        comfy.ops.run_every_op()
        if not layouts.is_ours(self.weight):
            layouts.check_whole(self.weight)
            return self.forward_comfy_cast_weights(input)
        if hasattr(self, "_v") and comfy.model_management.is_device_cpu(input.device):
            # a streamed layer that is used on the CPU: the cast would dequantize it
            bias = None if self.bias is None else self.bias.to(input.dtype)
            functions = self._weight_functions
            return patched_linear(input, self.weight, bias, functions, self._patch_cache)
        # the cast would dequantize for them, too
        functions, self._weight_functions = self._weight_functions, []
        try:
            cast = comfy.ops.CastBiasWeightContext(
                self,
                None,
                dtype=self.weight.dtype,
                device=input.device,
                bias_dtype=input.dtype,
                offloadable=True,
                compute_dtype=input.dtype,
                want_requant=True,
            )
        finally:
            self._weight_functions = functions
        with cast as (weight, bias):
            return patched_linear(input, weight, bias, functions, self._patch_cache)


class NibbleOperations(comfy.ops.manual_cast):
    """ComfyUI's operations with Nibble's Linear."""

    Linear = Linear


def patched_linear(
    x: torch.Tensor,
    weight: QuantizedTensor,
    bias: torch.Tensor | None,
    functions: list,
    cache: lora.PatchCache | None = None,
) -> torch.Tensor:
    """x (…, K) → (…, N): the quantized product with whatever patches ask for; cache: what is
    remembered of them between calls.
    """
    if not all(lora.patches_of(function) for function in functions):
        return _linear_with_functions(x, weight, bias, functions)
    cache = lora.PatchCache() if cache is None else cache
    changes = [cache.delta(function, weight, x) for function in functions]
    return layouts.linear(x, weight, bias, changes)


def _linear_with_functions(
    x: torch.Tensor, weight: QuantizedTensor, bias: torch.Tensor | None, functions: list
) -> torch.Tensor:
    """The right and slow way for functions that want to see the whole weight (weight wrappers of
    other nodes).
    """
    for function in functions:
        name = getattr(function, "__qualname__", type(function).__qualname__)
        if name not in _slow_path_logged:
            _slow_path_logged.add(name)
            log.warning(
                "%s changes whole weights: 4-bit layers that it is applied to run at 16-bit speed.",
                name,
            )
    dense = layouts.effective_weight(weight)
    for function in functions:
        dense = function(dense)
    bias = layouts.unpack(weight, bias).effective_bias()
    return torch.nn.functional.linear(
        x, dense.to(x.dtype), None if bias is None else bias.to(x.dtype)
    )
