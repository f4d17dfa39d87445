"""Seconds of putting a LoRA on two blocks of FLUX.1 inside ComfyUI, changing its strength, and
taking it off.
"""

import json
import statistics
import time

import torch

from bench.lora import rank
from random_flux import flux_shapes

BLOCKS = {"double": 19, "single": 38}


def seconds(run) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def big_model(hidden: int):
    """One double and one single block of FLUX's shapes with random 4-bit weights, as Load SVDQuant
    Model makes a model.
    """
    import comfy.sd

    from nibble.nodes.bridge.quantized import loading
    from nibble.nodes.bridge.quantized.linear import NibbleOperations

    generator = torch.Generator().manual_seed(0)
    state, layers = {}, {}
    for name, shape in flux_shapes(hidden=hidden, double=1, single=1).items():
        stem = name.removesuffix(".weight")
        if (
            name.endswith(".weight")
            and "blocks" in name
            and "_mod" not in name
            and ".modulation" not in name
        ):
            parts = rank.draw(*shape, 32, generator)
            for part, tensor in parts.items():
                if part == "weight":
                    state[f"{stem}.weight"] = tensor
                elif part != "bias":
                    state[f"{stem}.weight_{part.removeprefix('weight_')}"] = tensor
            layers[stem] = {"format": "svdquant_w4a4", "rank": 32}
        else:
            state[name] = (
                torch.ones(shape, dtype=torch.bfloat16)
                if len(shape) == 1
                else (torch.randn(shape, generator=generator) * 0.01).bfloat16()
            )
    packed = loading.packed(state, layers, torch.bfloat16)
    return comfy.sd.load_diffusion_model_state_dict(
        packed, model_options={"custom_operations": NibbleOperations}
    ), list(layers)


def switch(options) -> dict:
    """Seconds of putting on, changing and taking off; with what ComfyUI itself needs to compute the
    patched weights.
    """
    import comfy.lora
    import comfy.model_management
    import comfy.sd

    from nibble.nodes.bridge.quantized import layouts, lora

    model, names = big_model(options.hidden)
    linears = {name: model.model.diffusion_model.get_submodule(name) for name in names}
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, linear in linears.items():
        (n, k), stem = linear.weight.shape, "lora_unet_" + name.replace(".", "_")
        tensors |= {
            f"{stem}.lora_up.weight": torch.randn(n, 16, generator=generator).bfloat16() * 0.02,
            f"{stem}.lora_down.weight": torch.randn(16, k, generator=generator).bfloat16() * 0.02,
        }

    def load(patcher):
        lora.plan_patches(lambda chosen: comfy.model_management.load_models_gpu([chosen]), patcher)

    def with_lora(strength):
        return comfy.sd.load_lora_for_models(model, None, tensors, strength, 0)[0]

    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    found = {
        "base": seconds(lambda: load(model)),
        "put on": seconds(lambda: load(with_lora(1.0))),
        "strength changed": statistics.median(
            seconds(lambda s=s: load(with_lora(s))) for s in (0.5, 0.8, -1.0)
        ),
        "bytes made": sum(
            tensor.nbytes
            for linear in linears.values()
            for tensor in (linear.weight.params.proj_down, linear.weight.params.proj_up)
        ),
        "bytes of the 4-bit weights": sum(
            linear.weight._qdata.nbytes for linear in linears.values()
        ),
        "taken off": seconds(lambda: load(model)),
    }
    after = model.model.state_dict()
    found["base back bit for bit"] = all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )
    name, linear = max(linears.items(), key=lambda item: item[1].weight.numel())
    patches, key = with_lora(1.0).patches[f"diffusion_model.{name}.weight"], name

    def difference():
        dense = layouts.effective_weight(linear.weight)
        return comfy.lora.calculate_weight(patches, dense, key)

    patched = difference()
    found["largest layer alone"] = {
        "shape": list(linear.weight.shape),
        "ComfyUI's new weight, dequantized": seconds(difference),
        "its factors out of the difference": seconds(
            lambda: lora.absorb_dense(linear.weight, patched)
        ),
    }
    slow = seconds(lambda: comfy.model_management.load_models_gpu([with_lora(1.0)]))
    found["put on from the difference of weights"] = slow
    weights = sum(linear.weight.numel() for linear in linears.values())
    found["of FLUX.1 dev"] = options.hidden == 3072 and flux_share(linears, weights)
    for step in (
        "put on",
        "strength changed",
        "taken off",
        "put on from the difference of weights",
    ):
        found[f"{step}, all of FLUX.1 dev (extrapolated)"] = (
            found[step] / found["of FLUX.1 dev"] if found["of FLUX.1 dev"] else None
        )
    print(json.dumps(found, indent=1), flush=True)
    return found


def flux_share(linears: dict, weights: int) -> float:
    """These linears' share of the weights of all blocks' linears in FLUX.1 dev."""

    def of(kind):
        return sum(
            linear.weight.numel() for name, linear in linears.items() if name.startswith(kind)
        )

    return weights / (BLOCKS["double"] * of("double") + BLOCKS["single"] * of("single"))
