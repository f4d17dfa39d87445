"""Pictures of the demo model with a LoRA, by every route that puts one on 4-bit weights, beside the
16-bit model's.

What needs ComfyUI or diffusers is imported where it is used: ComfyUI has to be started first.
"""

import argparse
import statistics
from pathlib import Path

import torch

LAYOUTS = {
    "fp8 (e4m3)": "TensorCoreFP8E4M3Layout",
    "int8": "TensorWiseINT8Layout",
    "convrot w4a4": "TensorCoreConvRotW4A4Layout",
}
NUNCHAKU = (
    "Its own loader concatenates the factors into the branch, as here, so a LoRA is as exact; a"
    " strength is one number per 16 ranks in the kernel, so changing it moves nothing. Stock Load"
    " LoRA is not taken, LoKr, LoHa and DoRA are not known, and conversion to its packing is done"
    " when a LoRA is loaded."
)


def trained(options) -> tuple[dict[str, torch.Tensor], list]:
    """A float LoRA of the demo model's block linears under Black Forest Labs' names, and prompts
    for what it was taught.
    """
    from bench import concept
    from bench.intlora import arms
    from nibble.demo import pictures

    chosen = argparse.Namespace(rank=8, batch=8, steps=options.steps, lr=2e-3, batches=1, prompts=8)
    bench = arms.Bench(chosen)
    flux = pictures.load_flux()
    layers = bench.attach(flux, None)
    optimizer = torch.optim.AdamW(
        [p for layer in layers.values() for p in (layer.lora_up, layer.lora_down)],
        lr=chosen.lr,
        weight_decay=0,
    )
    value = bench.loss(flux, 0.75, chosen.batch)
    for step in range(chosen.steps):
        value(torch.Generator().manual_seed(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = {}
    for name, layer in layers.items():
        stem = f"transformer.{name}"
        tensors |= {
            f"{stem}.lora_B.weight": layer.lora_up.detach().bfloat16(),
            f"{stem}.lora_A.weight": layer.lora_down.detach().bfloat16(),
        }
    return (
        tensors,
        [str(scene) for scene in concept.scenes()[:: 36 // options.prompts]][: options.prompts],
    )


def drawn(patcher, texts: list[str]) -> torch.Tensor:
    """Latents of one picture a prompt by ComfyUI's sampler, 8 steps."""
    import comfy.sample
    import comfy.samplers

    from nibble.demo import prompts

    out = []
    for seed, text in enumerate(texts):
        tokens, pooled = prompts.embed(prompts.word_indices([text]))
        cond = [[tokens, {"pooled_output": pooled, "guidance": 3.5}]]
        latent, noise = (
            torch.zeros(1, 16, 8, 8),
            torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(seed)),
        )
        out.append(
            comfy.sample.sample(
                patcher,
                noise,
                8,
                1.0,
                "euler",
                "simple",
                cond,
                cond,
                latent,
                disable_pbar=True,
                seed=seed,
            )
        )
    return torch.cat(out)


def decibels(signal: torch.Tensor, noise: torch.Tensor) -> float:
    return float(10 * torch.log10(signal.square().sum() / noise.square().sum()))


def requantized(dense, layout: str, patches: dict, share: float = 1.0):
    """A copy of the 16-bit model whose block linears hold a quantized weight with the patches, as
    ComfyUI's `set_weight` rounds it; and the change kept.
    """
    import comfy.lora
    import comfy.utils
    from comfy.quant_ops import QuantizedTensor

    errors, kept = [], []
    for key, entries in patches.items():
        linear = comfy.utils.get_attr(dense.model, key.removesuffix(".weight"))
        weight = linear.weight.detach().float()
        base = (
            QuantizedTensor.from_float(weight.bfloat16(), layout, scale="recalculate")
            if "W4A4" not in layout
            else QuantizedTensor.from_float(weight.bfloat16(), layout)
        )
        plain = base.dequantize().float()
        changed = (
            comfy.lora.calculate_weight(entries, plain.clone(), key) if share else plain.clone()
        )
        if share:
            scale = {} if "W4A4" in layout else {"scale": "recalculate"}
            after = (
                base.requantize_from_float(
                    changed, stochastic_rounding=comfy.utils.string_to_seed(key), **scale
                )
                .dequantize()
                .float()
            )
            delta = changed - plain
            errors.append(decibels(delta, after - plain - delta))
            kept.append(float(((after - plain) * delta).sum() / delta.square().sum()))
        else:
            after = plain
        linear.weight = torch.nn.Parameter(after.to(linear.weight.dtype), requires_grad=False)
    return errors, kept


def in_the_branch(path: Path, texts: list[str], with_lora) -> tuple:
    """Latents with and without the LoRA of the demo model at 4 bits, and how each weight changed
    beside what ComfyUI computes for it.
    """
    import comfy.lora
    import comfy.utils

    from nibble.demo import pictures
    from nibble.nodes.bridge.quantized import layouts, loading
    from nibble.quant.svdquant.quantize import quantize_checkpoint
    from nibble.quant.svdquant.recipe import Recipe

    if not path.exists():
        quantize_checkpoint(pictures.FLUX_FILE, path, Recipe.from_preset("fast"))
    ours = loading.load(path, dtype="fp32")

    def effective(key):
        weight = comfy.utils.get_attr(ours.model, key)
        return layouts.effective_weight(weight)

    patched = with_lora(ours)
    keys = [
        key for key in patched.patches if layouts.is_ours(comfy.utils.get_attr(ours.model, key))
    ]
    without, plain = drawn(ours, texts), {key: effective(key) for key in keys}
    latents, errors, kept = drawn(patched, texts), [], []
    for key, before in plain.items():
        delta = comfy.lora.calculate_weight(patched.patches[key], before.clone(), key) - before
        change = effective(key) - before
        errors.append(decibels(delta, change - delta))
        kept.append(float((change * delta).sum() / delta.square().sum()))
    return latents, without, errors, kept


def picture(options) -> dict:
    import comfy.sd

    from nibble.demo import pictures

    tensors, texts = trained(options)

    def dense():
        return comfy.sd.load_diffusion_model(
            str(pictures.FLUX_FILE), model_options={"dtype": torch.float32}
        )

    def with_lora(patcher, strength=1.0):
        return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)[0]

    exact = dense()
    base, target = drawn(exact, texts), drawn(with_lora(exact), texts)
    patches = with_lora(exact).patches
    rows = [{"route": "16 bit, LoRA left off", "db": decibels(target, base - target)}]

    def note(route, latents, without, errors=(), kept=()):
        rows.append(
            {
                "route": route,
                "db": decibels(target, latents - target),
                "db without the LoRA": decibels(base, without - base),
                "effect": float(
                    ((latents - without) * (target - base)).sum() / (target - base).square().sum()
                ),
                "effect db": decibels(target - base, (latents - without) - (target - base)),
                "change": statistics.median(errors) if errors else None,
                "worst change": min(errors) if errors else None,
                "share": statistics.mean(kept) if kept else None,
            }
        )
        print(
            {
                key: round(value, 4) if isinstance(value, float) else value
                for key, value in rows[-1].items()
            },
            flush=True,
        )

    note(
        "ours, fast: in the branch",
        *in_the_branch(options.folder / "demo-fast.safetensors", texts, with_lora),
    )
    for name, layout in LAYOUTS.items():
        try:
            plain = dense()
            requantized(plain, layout, patches, share=0.0)
            without = drawn(plain, texts)
            changed = dense()
            errors, kept = requantized(changed, layout, patches)
            note(f"{name}, requantized", drawn(changed, texts), without, errors, kept)
        except (NotImplementedError, RuntimeError, TypeError, KeyError, ValueError) as error:
            rows.append(
                {"route": name, "absent": f"{type(error).__name__}: {error}".splitlines()[0]}
            )
            print(rows[-1], flush=True)
    return {"rows": rows, "prompts": texts, "steps": options.steps, "nunchaku, on paper": NUNCHAKU}
